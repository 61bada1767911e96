"""The map of the package, which ``make map`` prints, and its copy in CONTRIBUTING.md."""

from tests.support.house import (
    CONTRIBUTING,
    FLOORS,
    between,
    calls,
    chain,
    imports,
    map_lines,
    upward,
    written,
)


def pack_():
    return None


def test_the_map_names_every_room_once_with_a_sentence():
    text = list(map_lines())
    for name in (name for rooms in FLOORS for name in rooms):
        (at,) = (
            i for i, line in enumerate(text)
            if line[:2].strip().isdigit()
            and line[4:].split(" (")[0] == (name or "fasthessian").replace(".", "/")
        )  # fmt: skip
        assert len(text[at + 1].split()) >= 4, text[at + 1]


def test_the_chain_leads_from_a_product_to_the_kernel():
    steps = chain()
    assert steps[0] == "operators.base: __matmul__" and steps[-1] == "kernels: pack_"
    assert 4 < len(steps) < 20 and any(step.startswith("operators.products") for step in steps)


def test_only_calls_of_the_package_are_in_the_chain():
    assert calls(pack_, "pack_") == [] and calls(lambda: None, "pack_") == []


def test_imports_between_rooms_and_upwards_are_counted():
    arrows = {
        "krylov.lanczos": {"kernels", "krylov.basis"}, "krylov.basis": {"kernels.native"},
        "kernels": {"kernels.native"}, "kernels.native": {"app.main"}, "app.main": set(),
    }  # fmt: skip
    assert between(arrows)["krylov"] == {"kernels": 2}
    assert upward(arrows) == [("kernels.native", "app.main")] and upward(imports()) == []


def test_the_map_in_contributing_is_up_to_date():
    """If it fails, run: python tests/support/house.py --write."""
    text = CONTRIBUTING.read_text()
    assert text == written(text)
