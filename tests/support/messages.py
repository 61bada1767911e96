"""Every message of the package - errors, warnings - as its text with the inserted values left open.

python tests/support/messages.py > tests/house/messages.txt      after a change that is meant
"""

import ast
from pathlib import Path

import fasthessian

ROOT = Path(fasthessian.__file__).parent

NAMES = ("Error", "warn", "Warning", "fail")  # how the names of what is called end


def messages() -> list[str]:
    """Templates of all messages, each once, sorted."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found |= {text(node.exc)}
            elif isinstance(node, ast.Call) and name_of(node).endswith(NAMES):
                found |= {text(node)}
    return sorted(found - {""})


def name_of(call: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def text(call: ast.Call) -> str:
    """The words of the first argument that has some."""
    for argument in call.args:
        parts = list(words(argument))
        if any(part != "{}" for part in parts):
            return " ".join("".join(parts).split())
    return ""


def words(node: ast.AST) -> list[str]:
    """The pieces of a string, an f-string, or strings that are added."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [word for value in node.values for word in words(value)]
    if isinstance(node, ast.FormattedValue):
        return ["{}"]
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    if isinstance(node, ast.IfExp):
        return words(node.body) + words(node.orelse)
    return []


if __name__ == "__main__":
    print("\n".join(messages()))
