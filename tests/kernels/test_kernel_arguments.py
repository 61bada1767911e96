"""Arguments that the kernel contract rejects, and the choice of a backend."""

import pytest
import torch

from fasthessian import kernels
from fasthessian.kernels import native, reference
from tests.support.kernel_cases import F64, each_backend

BAD = [
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(9, 5)), "1 to 8 rows"),
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(1, 6)), "one length"),
    (lambda b: b.project_(torch.ones(2, 5).bfloat16(), torch.ones(1, 5)), "V must be"),
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(1, 5).half()), "W must be"),
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(1, 5), count=3), "count must be in 0..2"),
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(1, 5), count=torch.ones(1)), "count must"),
    (
        lambda b: b.project_(torch.ones(2, 5), torch.ones(1, 5), count=torch.tensor([3])),
        "count must be in 0..2",
    ),
    (
        lambda b: b.update_(torch.ones(2, 5), torch.ones(1, 5), torch.ones(2, 1), append=1.0),
        "append needs count",
    ),
    (
        lambda b: b.update_(
            torch.ones(2, 5), torch.ones(1, 5), torch.ones(2, 1), count=2, append=1.0
        ),
        "count must be in 0..1",
    ),
    (lambda b: b.recur_(*[torch.ones(2, 2)] * 4, count=0), "gauges must have shape"),
    (lambda b: b.project_(torch.ones(2, 5, device="meta"), torch.ones(1, 5)), "move one"),
    (lambda b: b.project_(torch.ones(5, 2).T, torch.ones(1, 5)), "unit stride"),
    (
        lambda b: b.update_(torch.ones(2, 5), torch.ones(1, 5), torch.ones(1, 2)),
        "H must have shape",
    ),
    (lambda b: b.signs_(torch.ones(5), -1), "seed"),
    (lambda b: b.normal_(torch.ones(5), 1, -1), "offset"),
    (lambda b: b.normal_(torch.ones(5, dtype=torch.int64), 1), "out must be"),
    (lambda b: b.pack_(torch.ones(5), [torch.ones(4)]), "room for 5"),
    (lambda b: b.pack_(torch.ones(5), [torch.ones(5, dtype=F64)]), "tensors must be"),
]


@each_backend
@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_refused_in_one_line(row, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(row.module())
    assert "\n" not in str(caught.value)


def test_select_prefers_native_and_says_why_a_backend_cannot_serve(monkeypatch):
    assert kernels.select("cpu", "reference") is reference
    monkeypatch.setenv("FASTHESSIAN_BACKEND", "reference")
    assert kernels.select("cpu") is reference
    monkeypatch.setenv("FASTHESSIAN_BACKEND", "cobol")
    with pytest.raises(ValueError, match="native, triton, reference"):
        kernels.select("cpu")
    monkeypatch.delenv("FASTHESSIAN_BACKEND")
    assert kernels.select("meta") is reference
    with pytest.raises(RuntimeError, match="meta"):
        kernels.select("meta", "native")
    monkeypatch.setattr(native, "_reason", "the extension is not built")
    assert kernels.select("cpu") is reference
    assert "no: the extension is not built" in " ".join(kernels.report())
    with pytest.raises(RuntimeError, match="not built"):
        kernels.select("cpu", "native")
