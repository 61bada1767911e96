"""The rooms of the package, the imports between them and a call through them: ``make map``.

``python tests/support/house.py --write`` also puts the map into CONTRIBUTING.md.

A room is a folder of the package, or a module at its top. Imports under ``TYPE_CHECKING`` and in
functions count like all others.
"""

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fasthessian"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
EXTENSION = f"{PACKAGE}._native"  # compiled: no module of a room
# From the bottom: a module imports rooms of its own floor and of those below.
FLOORS = (
    ("__about__", "errors", "arguments", "memory"),
    ("kernels", "distributed", "planning"),
    ("vectors",),
    ("results",),
    ("checkpoints",),
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
            if imported != EXTENSION and f"{imported}.".startswith(f"{PACKAGE}."):
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


def upward(arrows: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a module by one of a lower floor."""
    floor = {name: HEIGHT[room(name)] for name in arrows}
    pairs = ((name, other) for name in arrows for other in arrows[name])
    return sorted((name, other) for name, other in pairs if floor[other] > floor[name])


def between(arrows: Mapping[str, set[str]]) -> dict[str, Counter[str]]:
    """How many imports lead from each room to each other room."""
    found: dict[str, Counter[str]] = {name: Counter() for name in HEIGHT}
    for name, others in arrows.items():
        found[room(name)].update(room(other) for other in others if room(other) != room(name))
    return found


def calls(product: Callable[[], object], last: str) -> list[str]:
    """The calls in the package, ``module: function``, that led to the first call of ``last``."""
    found: list[str] = []

    def record_call(frame, event, argument):
        if event == "call" and frame.f_code.co_name == last and not found:
            while frame is not None:
                module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
                if module.startswith(PACKAGE + ".") and name not in INLINED:
                    found.insert(0, f"{module.removeprefix(PACKAGE + '.')}: {name}")
                frame = frame.f_back

    before = sys.getprofile()
    sys.setprofile(record_call)
    try:
        product()
    finally:
        sys.setprofile(before)
    return found


INLINED = ("<listcomp>", "<setcomp>", "<dictcomp>")  # frames of their own before Python 3.12


def chain() -> list[str]:
    """The longest chain of calls from ``A @ v`` to ``pack_`` over operators and engines."""
    import torch

    import fasthessian as fh

    def made(kind, engine):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        data = torch.ones(5, 3), torch.zeros(5, dtype=torch.int64)
        A = kind(model, torch.nn.CrossEntropyLoss(), [data, data], engine=engine)
        v = torch.ones(A.n)
        return calls(lambda: A @ v, "pack_")

    kinds = (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher)
    engines = ("retained", "recompute", "forward", "difference")
    chains = [made(kind, engine) for kind in kinds for engine in engines]
    longest = max(chains, key=len)
    start = longest.index("operators.base: __matmul__")
    return [*longest[start:-1], "kernels: pack_"]  # of the backend that serves here


def sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def map_lines(root: Path = ROOT) -> Iterator[str]:
    """The map: rooms by floor, imports between them, numbers, and the chain of calls."""
    arrows, paths = imports(root), modules(root)
    counts, doors = Counter(map(room, arrows)), between(arrows)
    yield "Rooms by floor, the top floor first. Imports go down; the number counts them."
    for level, rooms in reversed(list(enumerate(FLOORS, 1))):
        for name in rooms:
            size = "1 module" if counts[name] == 1 else f"{counts[name]} modules"
            yield ""
            yield f"{level:2}  {(name or PACKAGE).replace('.', '/')} ({size})"
            yield f"    {sentence(paths[name])}"
            lower = sorted(doors[name].items(), key=lambda item: (-HEIGHT[item[0]], item[0]))
            names = [f"{other.replace('.', '/') or PACKAGE} {count}" for other, count in lower]
            for i in range(0, len(names), 6):
                yield ("    imports " if i == 0 else "            ") + ", ".join(names[i : i + 6])
    yield ""
    yield f"modules             {len(arrows)}"
    yield f"floors              {len(FLOORS)}"
    yield f"imports             {sum(map(len, arrows.values()))} (module to module)"
    yield f"circles             {len(circles(arrows)) or 'none'}"
    yield f"upward imports      {len(upward(arrows)) or 'none'}"
    steps = chain()
    yield f"longest chain       {len(steps)} functions from A @ v to pack_"
    yield ""
    yield from (f"  {step}" for step in steps)


def written(text: str) -> str:
    """The text of CONTRIBUTING.md with the map of this tree between its two comments."""
    before, start, rest = text.partition("<!-- make map -->\n")
    _, end, after = rest.partition("<!-- end -->")
    return "".join(
        (before, start, "```text\n", *(f"{line}\n" for line in map_lines()), "```\n", end, after)
    )


if __name__ == "__main__":
    print("\n".join(map_lines()))
    if sys.argv[1:] == ["--write"]:
        CONTRIBUTING.write_text(written(CONTRIBUTING.read_text()))
