"""Diagonal blocks of a curvature matrix as operators.

A block H_ii is the curvature of the loss with respect to some of the parameters. All blocks share
the graphs of the whole matrix and the passes over its data. A product with one block runs only
through the part of a graph that leads to the parameters of the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.vectors import Layout

ROOT = "(root)"  # name of the block of the parameters that the model owns directly


class Block(SymmetricOperator):
    """The diagonal block of a curvature matrix that belongs to some of its parameters.

    The method ``blocks`` of a curvature matrix makes it. The engine of the whole matrix makes the
    products; only the block counts them.

    Attributes:
        n, dtype, device, matvecs: see ``SymmetricOperator``.
        layout: names, shapes and positions of the block's parameters in a vector of the block.
    """

    def __init__(self, parent: SymmetricOperator, layout: Layout, places: Iterable[int]) -> None:
        self._parent, self._places = parent, tuple(places)
        self.layout = layout.subset(self._places)
        self._kept = parent._kept
        self._set_size(self.layout.n, parent.dtype, parent.device)

    @property
    def _matrix(self) -> SymmetricOperator:
        return self._parent

    @property
    def one_layer(self) -> bool:
        """Whether the parameters belong to a single layer."""
        return len({name.rpartition(".")[0] for name in self.layout.names}) == 1

    def _relative_error(self) -> float:
        return self._parent._relative_error()

    def _capture_obstacle(self) -> str | None:
        return "blocks share the graphs of one matrix"

    def flatten(self, tensors: Mapping[str, Tensor] | list[Tensor]) -> Tensor:
        """A vector (n,) from tensors by parameter name, or in the order of the parameters."""
        return self.layout.flatten(tensors)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Views of v (n,) by parameter name, in the parameters' shapes."""
        return self.layout.unflatten(v)


def partition(
    names: tuple[str, ...], by: Any, model: nn.Module | None = None
) -> dict[str, list[int]]:
    """Positions of parameters by block name; see ``Curvature.blocks`` for ``by``.

    Raises:
        ValueError: a block has no parameters, or a parameter belongs to two blocks.
        TypeError: ``by`` has no known form.
    """
    if isinstance(by, str) and by == "layer":
        return _grouped(names, lambda name: _layer(name, model))
    if isinstance(by, str) and by == "stage":
        return _grouped(names, _stages(names, model))
    if isinstance(by, (str, re.Pattern)):
        pattern = _compiled(by)
        found = _grouped(names, lambda name: _label(pattern.search(name)))
        if not found:
            raise InputError(_nothing(f"the pattern {pattern.pattern!r}", names))
        return found
    if isinstance(by, Mapping):
        return _by_patterns(names, by)
    if not callable(by):
        raise InputTypeError(
            f"by must be 'layer', 'stage', a regular expression, a mapping of block names to "
            f"regular expressions, or a callable of a parameter's name, got {type(by).__name__}"
        )
    found = _grouped(names, by)
    if not found:
        raise InputError(_nothing("the callable", names))
    return found


def _grouped(names: tuple[str, ...], key: Callable[[str], Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        label = key(name)
        if label is None:
            continue
        if not isinstance(label, str):
            raise InputTypeError(
                f"by must return a block's name or None, got {type(label).__name__} for {name!r}"
            )
        found.setdefault(label, []).append(position)
    return found


def _by_patterns(names: tuple[str, ...], by: Mapping[Any, Any]) -> dict[str, list[int]]:
    if not by:
        raise InputError("by is an empty mapping; give block names and regular expressions")
    found: dict[str, list[int]] = {}
    owner: dict[int, str] = {}
    for label, text in by.items():
        pattern = _compiled(text)
        positions = [i for i, name in enumerate(names) if pattern.search(name)]
        if not positions:
            raise InputError(_nothing(f"the pattern {pattern.pattern!r} of {label!r}", names))
        for i in positions:
            if i in owner:
                raise InputError(
                    f"the blocks {owner[i]!r} and {label!r} overlap: both patterns match "
                    f"{names[i]!r}; make one of them narrower"
                )
            owner[i] = str(label)
        found[str(label)] = positions
    return found


def _compiled(text: Any) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise InputError(f"{text!r} is no regular expression: {error}") from None


def _label(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match.group(0))


def _nothing(what: str, names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{what} matches no parameter; their names are {shown}"


def _layer(name: str, model: nn.Module | None) -> str:
    """The name of the module that owns the parameter; without a model, each tensor is a layer."""
    owner = name.rpartition(".")[0]
    return owner or (name if model is None else ROOT)


def _stages(names: tuple[str, ...], model: nn.Module | None) -> Callable[[str], str]:
    """The stage of a parameter: a child of the model, or an entry of a ModuleList within it.

    The stages of a ResNet are Sequentials and are not divided. The layers of a transformer are in a
    ModuleList at some depth; each layer is a stage. An only child is replaced by its children.
    """
    owners = [_layer(name, model).split(".") for name in names]

    def is_divided(head: list[str]) -> bool:
        *above, _ = head
        siblings = {tuple(o[: len(head)]) for o in owners if o[: len(above)] == above}
        if model is None or len(siblings) == 1:
            return len(siblings) == 1
        within = model.get_submodule(".".join(head)).modules()
        return any(isinstance(module, nn.ModuleList) for module in within)

    def stage(name: str) -> str:
        parts = _layer(name, model).split(".")
        depth = 1
        while depth < len(parts) and is_divided(parts[:depth]):
            depth += 1
            above = model.get_submodule(".".join(parts[: depth - 1])) if model else None
            if isinstance(above, nn.ModuleList):
                break
        return ".".join(parts[:depth])

    return stage
