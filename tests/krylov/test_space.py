"""Every dot product of the engine goes through one function, where ranks can be summed."""

import ast

import torch

import fasthessian as fh
from fasthessian.krylov.space import Space
from tests.support.house import modules


def test_only_space_takes_dot_products():
    """No line outside of the kernels and of ``krylov/space.py`` names ``project_``."""
    naming = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "project_"
    }
    outside = {name for name in naming if not name.startswith("kernels")}
    assert outside == {"krylov.space"}


def test_dots_and_gram_are_those_of_the_rows():
    V, W = torch.randn(5, 40), torch.randn(3, 40)
    space = Space(fh.SymmetricOperator(lambda v: v, 40))
    C, G = space.dots(V, W, count=4)
    torch.testing.assert_close(C[:4], V[:4].double() @ W.double().T)
    assert not C[4:].any() and torch.equal(G, space.gram(W))
    torch.testing.assert_close(G, W.double() @ W.double().T)
    H, rest = torch.randn(5, 3, dtype=torch.float64), W.clone()
    C, _ = space.dots(V, rest, H)
    torch.testing.assert_close(rest, (W.double() - H.T @ V.double()).float())
    torch.testing.assert_close(C, V.double() @ rest.double().T)
