"""What changed since the last product: in the parameters, the data, or anything else.

An operator keeps graphs from product to product. The user may meanwhile train the model, replace a
layer, write into a batch, or set an attribute of the criterion. No hook of torch reports all of
these. So before a product a `ChangeDetector` reads again everything that the loss depends on and
compares it with what it read the time before:

* tensors by identity, version counter and, where needed, value (``snapshot``);
* everything else that can be reached from the model, the criterion and the data (``reachable``) by
  value if it is simple (a number, a string), and by identity if not.

For example, after ``model.dropout.p = 0.5`` the entry "model.dropout.p" has another value: the
kept graphs are dropped, and the next product builds new ones.

A loss may itself change some of these entries whenever it is evaluated: counters, caches.
``ignore_own_changes`` finds them after an evaluation, and they are no longer compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor

from fasthessian.operators.torch_state.reachable import DATA, OTHER, POINT, Entry, is_simple
from fasthessian.operators.torch_state.snapshot import Snapshot


class Change(NamedTuple):
    """What changed since the last poll."""

    stale: bool = False  # kept graphs no longer stand for the loss
    name: str | None = None  # the first entry whose value changed
    recount: bool = False  # more than the model's parameters and buffers changed


class ChangeDetector:
    """Compares what a loss depends on with what it was at the last poll.

    Args:
        entries: returns all that the loss depends on now; for ``entries(False)`` only parameters,
            buffers and batches.
    """

    def __init__(self, entries: Callable[[bool], Iterable[Entry]]) -> None:
        self._entries = entries
        self._snapshots: dict[str, Snapshot] = {}  # of the tensors, by kind
        self._others: dict[str, Any] = {}  # what is no tensor, by name
        self._own: set[str] = set()  # what the loss itself changes: counters, caches
        self.written: set[str] = set()  # the tensors among these that it writes into

    def poll(self, by_version: bool = False, whole: bool = True, data: bool = True) -> Change:
        """Compare everything with the last poll, and remember how it is now.

        If ``by_version``, a value is compared only if the tensor's version counter shows a write.
        If not ``data``, the same holds for all except parameters and buffers. If not ``whole``,
        only parameters, buffers and batches are compared.
        """
        first = not self._snapshots
        tensors, others = self._read(whole or first)
        if first:
            self._snapshots = {kind: Snapshot(found) for kind, found in tensors.items()}
            self._others = others
            return Change()
        stale, names, recount = False, [], False
        for kind in (POINT, DATA, OTHER) if whole else (POINT, DATA):
            cheap = by_version or not (data or kind == POINT)
            written, changed = self._snapshots[kind].compare(tensors[kind], cheap)
            self._snapshots[kind].update(tensors[kind], [*written, *changed])
            stale |= bool(written or changed)
            names += [cast(str, name) for name in changed]
            recount |= bool(changed) and kind != POINT
        if whole:
            differing = _differing(self._others, others)
            self._others = others
            names += differing
            recount |= bool(differing)
        elif stale or names:  # graphs are built anew: all that they depend on must be known
            rest = self.poll(by_version, data=data)
            names += [] if rest.name is None else [rest.name]
            recount |= rest.recount
        return Change(stale or bool(names), names[0] if names else None, recount)

    def ignore_own_changes(self, by_version: bool = True) -> None:
        """After an evaluation of the loss: ignore from now on whatever changed during it.

        If ``by_version``, a value is compared only if the tensor's version counter shows a write.
        """
        tensors, others = self._read(True)
        before, now = self._snapshots[OTHER], tensors[OTHER]
        written, changed = before.compare(now, by_version)
        inside = [cast(str, name) for name in written + changed if name in now]
        self.written.update(name for name in inside if before.same_object(name, now[name]))
        own = [*_differing(self._others, others), *(cast(str, name) for name in written + changed)]
        if own:
            self._own.update(map(_container, own))
            tensors, self._others = self._read(True)
            self._snapshots[OTHER] = Snapshot(tensors[OTHER])

    def _read(self, whole: bool) -> tuple[dict[str, dict[Any, Tensor]], dict[str, Any]]:
        """Tensors by kind and name, and everything else by name."""
        tensors: dict[str, dict[Any, Tensor]] = {POINT: {}, DATA: {}, OTHER: {}}
        others: dict[str, Any] = {}
        for name, item, kind in self._entries(whole):
            if kind == OTHER and self._own and _container(name) in self._own:
                continue
            if isinstance(item, Tensor):
                tensors[kind][name] = item
            else:
                others[name] = item
        return tensors, others


def _container(name: str) -> str:
    """The name of the container that holds an entry: its other entries may change next time."""
    return name.partition("[")[0]


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names whose entries differ: simple ones by value, all others by identity."""
    names = [name for name in old if name not in new]
    for name, value in new.items():
        before = old.get(name, names)  # a default that equals no entry
        if before is value:
            continue
        if not (type(before) is type(value) and is_simple(value) and before == value):
            names.append(name)
    return names
