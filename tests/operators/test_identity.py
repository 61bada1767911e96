"""What tells operators apart, and what rounding may change."""

import pytest
import torch

import fasthessian as fh
from fasthessian.operators.identity import difference, fingerprint, identity
from tests.support.checkpoints import classifier, diagonal

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("before", "now", "dtype", "words"),
    [
        ({"loss": 0.3}, {"loss": 0.3 * (1 + 8e-6)}, F32, ""),
        ({"loss": 0.3}, {"loss": 0.3 * (1 + 8e-6)}, F64, "the loss is 0.300002, not 0.3"),
        ({"loss": 0.52}, {"loss": 0.31}, F32, "the data or the criterion differ: the loss is 0.31"),
        ({"loss": 0.3}, {"loss": 0.3 * (1 + 8e-10)}, F64, ""),
        ({"loss": float("nan")}, {"loss": float("nan")}, F32, ""),
        ({"loss": 0.3}, {"loss": float("inf")}, F32, "the loss is inf, not 0.3"),
        ({"loss": 0.0}, {"loss": 0.0}, F32, ""),
        ({"loss": 0.3}, {"norm": 2.0, "component": 1.0}, F32, "the products with the same vector"),
        ({"norm": 2.0, "component": 1e-6}, {"norm": 2.0, "component": 2e-6}, F32, ""),
        ({"norm": 2.0, "component": 1e-6}, {"norm": 2.0, "component": 1e-3}, F32, "the products"),
    ],
)
def test_numbers_are_compared_to_rounding(before, now, dtype, words):
    found = difference(before, now, dtype)
    assert words in found and bool(words) == bool(found)


def test_a_fingerprint_is_no_product_and_changes_nothing():
    for A in (diagonal(), fh.Hessian(*classifier())):
        first, again = fingerprint(A), fingerprint(A)
        assert first == again and A.matvecs == 0
        assert difference(identity(A), identity(A)) == ""


def test_an_operator_with_a_loss_is_known_by_it_and_a_block_by_that_of_the_whole():
    A = fh.Hessian(*classifier())
    block = A.blocks("layer")["2"]
    assert fingerprint(A) == fingerprint(block) == {"loss": A.loss()}
    assert set(fingerprint(diagonal())) == {"norm", "component"}
