"""The rooms of the package and the imports between them; ``make map`` prints them.

A room is a folder of the package, or a module at its top. Imports under ``TYPE_CHECKING`` and in
functions count like all others.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fasthessian"
# From the bottom: a module imports rooms of its own floor and of those below.
FLOORS = (
    ("__about__", "errors", "arguments", "memory"),
    ("kernels",),
    ("vectors",),
    ("results",),
    ("operators.torch_state", "operators.request", "operators.kept"),
    ("operators.loss",),
    ("operators.products",),
    ("operators",),
    ("krylov",),
    ("algorithms",),
    ("pyhessian", "study"),
    ("app",),
    ("", "__main__"),
)
HEIGHT = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    """The innermost room of FLOORS that a module lies in; the top of the package is its own."""
    while module and module not in HEIGHT:
        module = module.rpartition(".")[0]
    return module


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Path by dotted name without the package's own; a folder's ``__init__`` has the folder's."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = path
    return found


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports, anywhere in the file."""
    known = modules(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for imported in _imported(path):
            if imported == PACKAGE or imported.startswith(PACKAGE + "."):
                target = imported[len(PACKAGE) + 1 :]
                while target and target not in known:
                    target = target.rpartition(".")[0]
                if target != name:
                    found[name].add(target)
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found
