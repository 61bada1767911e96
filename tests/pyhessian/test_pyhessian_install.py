"""install(): old imports find the drop-in, and scripts for PyHessian run unchanged."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

import fasthessian as fh
from fasthessian import pyhessian
from fasthessian.pyhessian import (
    group_product,
    hessian,
)
from fasthessian.pyhessian.density_plot import get_esd_plot

pytestmark = pytest.mark.slow

ALIASES = (
    "pyhessian",
    "pyhessian.hessian",
    "pyhessian.utils",
    "pyhessian.density_plot",
    "density_plot",
)


@pytest.fixture
def no_aliases():
    held = {name: sys.modules.pop(name) for name in ALIASES if name in sys.modules}
    yield
    for name in ALIASES:
        sys.modules.pop(name, None)
    sys.modules.update(held)


@pytest.mark.usefixtures("no_aliases")
def test_install_serves_every_import_in_use():
    pyhessian.install()
    pyhessian.install()  # a second call changes nothing and gives no warning
    import density_plot as plot_module
    import pyhessian as module
    import pyhessian.density_plot as inner
    from density_plot import get_esd_plot as plot
    from pyhessian import hessian as a
    from pyhessian.hessian import hessian as b
    from pyhessian.utils import group_product as c

    assert a is b is module.hessian is hessian
    assert c is group_product
    assert plot is get_esd_plot is plot_module.get_esd_plot
    assert inner is plot_module
    assert module.get_esd_plot is get_esd_plot
    assert module.density_plot is plot_module
    assert isinstance(type("X", (module.hessian,), {}), type)


@pytest.mark.usefixtures("no_aliases")
def test_install_over_the_real_package_warns_once():
    sys.modules["pyhessian"] = types.ModuleType("pyhessian")
    sys.modules["density_plot"] = types.ModuleType("density_plot")
    with pytest.warns(UserWarning, match=r"pyhessian, density_plot.*install\(\) first") as caught:
        pyhessian.install()
    assert len(caught) == 1
    assert sys.modules["pyhessian"] is pyhessian


def in_a_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = Path(fh.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(root), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_script_written_for_pyhessian_runs_unchanged(tmp_path):
    script = Path(__file__).parents[1] / "support/script_for_pyhessian.py"
    result = in_a_process(
        "import fasthessian.pyhessian, runpy; fasthessian.pyhessian.install(); "
        f"runpy.run_path({str(script)!r}, run_name='__main__')",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")
    assert (tmp_path / "example.pdf").exists()


def test_import_does_not_load_matplotlib(tmp_path):
    result = in_a_process(
        "import fasthessian.pyhessian, sys; fasthessian.pyhessian.install()\n"
        "print('matplotlib' in sys.modules)\n"
        "from pyhessian import *\n"
        "from pyhessian.utils import *\n"
        "print('matplotlib' in sys.modules)\n",
        tmp_path,
    )
    assert result.stdout == "False\nFalse\n", result.stderr


PLOTS = """
import os, importlib.util
import torch
real = importlib.util.find_spec
there = os.fork() == 0  # with matplotlib in the child, and then without in the parent
if not there:
    assert os.wait()[1] == 0
    importlib.util.find_spec = lambda n, *a: None if n == 'matplotlib' else real(n, *a)
import fasthessian.pyhessian
fasthessian.pyhessian.install()
from density_plot import *
density, grids = density_generate([[1.0, 2.0]], [[0.5, 0.5]])
print(np.isfinite(density).all(), math.pi > 3, 'plt' in globals(), 'mpl' in globals(), flush=True)
if there:
    plt.figure()
"""


def test_star_import_of_the_plots_with_matplotlib_and_without(tmp_path):
    result = in_a_process(PLOTS, tmp_path)
    lines = "True True True True", "True True False False"
    assert tuple(result.stdout.splitlines()) == lines, result.stderr


def test_the_package_exports_the_class():
    assert fh.hessian is hessian


def test_unknown_names_of_the_plots_are_attribute_errors():
    from fasthessian.pyhessian import density_plot

    with pytest.raises(AttributeError, match="has no attribute 'pltt'"):
        density_plot.pltt  # noqa: B018


@pytest.mark.usefixtures("no_aliases")
def test_the_advice_of_install_works():
    sys.modules["pyhessian"] = types.ModuleType("pyhessian")
    with pytest.warns(UserWarning, match=r"call install\(\) first"):
        pyhessian.install()
    del sys.modules["pyhessian"]
    pyhessian.install()  # first, and no warning
    from pyhessian import hessian as found

    assert found is hessian
