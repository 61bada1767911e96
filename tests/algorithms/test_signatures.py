"""The signatures that an editor shows, and what the algorithms know of each other."""

import inspect
from typing import get_overloads

import pytest

import fasthessian as fh
from tests.support.house import imports

OVERLOADED = (fh.eigsh, fh.density, fh.trace, fh.spectrum)


@pytest.mark.parametrize("function", OVERLOADED, ids=lambda f: f.__name__)
def test_overloads_name_every_option(function):
    """One operator gives a record, a mapping of operators a dictionary of records."""
    whole = inspect.signature(function).parameters
    one, many = map(inspect.signature, get_overloads(function))
    for signature in (one, many):
        assert list(signature.parameters) == list(whole)
        for name, parameter in signature.parameters.items():
            assert parameter.kind is whole[name].kind
            assert parameter.default == whole[name].default
            if name not in ("A", "deflate"):
                assert parameter.annotation == whole[name].annotation
    assert one.parameters["A"].annotation == "SymmetricOperator"
    assert many.parameters["A"].annotation == "Mapping[str, SymmetricOperator]"
    assert many.return_annotation == f"dict[str, {one.return_annotation}]"


def test_algorithms_import_nothing_from_each_other():
    """What two of them share is a part of the engine; `resume` calls any of them."""
    for name, imported in imports().items():
        if name.startswith("algorithms.") and name != "algorithms.resume":
            assert not [other for other in imported if other.startswith("algorithms")], name
