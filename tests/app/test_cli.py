import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fasthessian as fh
from fasthessian.app import main as cli
from fasthessian.app import problems
from fasthessian.app.report import result
from fasthessian.app.report.figures import FIGURES
from tests.support.command_line import working_folder

for extra in ("click", "rich", "matplotlib", "sklearn"):
    pytest.importorskip(extra)
ROOT = Path(cli.__file__).parents[2]

MINE = """
import torch

def problem():
    torch.manual_seed(1) if SEEDED else None
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x, y = torch.randn(20, 4), torch.randint(2, (20,))
    return model, torch.nn.CrossEntropyLoss(), (x, y)

SEEDED = False
number = 3
def two(): return 1, 2
def no_model(): return "model", None, None
def broken(): raise ValueError("this is a bug of the user")
def nan():
    model, criterion, (x, y) = problem()
    return model, criterion, (x * float("nan"), y)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the user's module ``mine``."""
    yield from working_folder(tmp_path, monkeypatch, MINE)


def run(capsys, *args):
    """Exit code, stdout, stderr of one command."""
    with pytest.raises(SystemExit) as info:
        cli.main(list(args))
    out, err = capsys.readouterr()
    return info.value.code, out, err


def refused(capsys, *args):
    """The one line of stderr of a command that is refused with exit code 2."""
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def read(path):
    """The content of a result.json, as it is read back strictly."""
    return result.read(path).to_json()


SMALL = ("--steps", "6", "--points", "3", "--trace-rtol", "0.5", "--top", "2", "--bottom", "1",
         "--blocks", "layer")  # fmt: skip


def test_analyze_writes_a_report_and_says_what_it_found(here, capsys):
    code, out, err = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 0 and out == ""
    assert sorted(os.listdir("report")) == sorted([*FIGURES, "report.html", "result.json"])
    content = read("report/result.json")
    assert content["problem"]["parameters"] == 23
    for words in ("largest λ 1", "smallest λ 1", "trace", "products", "report/report.html"):
        assert words in err, words
    assert "Lanczos steps eager: cpu has no CUDA graphs" in err
    for title in ("spectrum ...", "spectrum: ", "loss landscape: 9 in"):
        assert title in err, title
    assert not any(name.startswith(".") for name in os.listdir())


def test_blocks_are_computed_together_and_shown(here, capsys):
    code, _, err = run(capsys, "analyze", "mine:problem", *SMALL)
    found = read("report/result.json")["blocks"]
    assert code == 0 and found["names"] == ["0", "2"] and found["sizes"] == [15.0, 8.0]
    assert "2 blocks" in err and "0: λ " in err and "2: λ " in err
    with problems.seeded(0):
        model, criterion, data = __import__("mine").problem()
    for name, block in fh.Hessian(model, criterion, data).blocks("layer").items():
        exact = torch.linalg.eigvalsh(block @ torch.eye(block.n))
        i = found["names"].index(name)
        assert found["values"][i] == pytest.approx(float(exact[exact.abs().argmax()]), rel=1e-3)
        assert abs(found["traces"][i] - float(exact.sum())) <= 2 * found["errors"][i] + 1e-6
    line = refused(capsys, "analyze", "mine:problem", "--blocks", "nothing", "--out", "other")
    assert "'nothing' matches no parameter" in line
    assert not (here / "other").exists()


def test_the_self_checks_are_shown_and_written(here, capsys):
    code, _, err = run(capsys, "analyze", "mine:problem", "--check", *SMALL)
    assert code == 0
    for words in ("self-checks", "passed", "symmetry", "repetition", "difference", "weights"):
        assert words in err, words
    content = read("report/result.json")
    assert content["check"]["ok"] and content["check"]["difference"] < 1e-2
    assert "passed" in Path("report/report.html").read_text()
    _, _, err = run(capsys, "analyze", "mine:problem", "--out", "other", *SMALL)
    assert "self-checks" not in err and read("other/result.json")["check"] is None


def test_the_numbers_are_those_of_the_dense_hessian(here, capsys):
    _, out, err = run(
        capsys, "analyze", "mine:problem", "--json", "--top", "3", "--trace-rtol", "0.2",
        "--seed", "5",
    )  # fmt: skip
    content = json.loads(out)
    with problems.seeded(5):
        model, criterion, (x, y) = __import__("mine").problem()
    params = dict(model.named_parameters())

    def loss(*tensors):
        named = dict(zip(params, tensors, strict=True))
        return criterion(torch.func.functional_call(model, named, (x,)), y)

    rows = torch.autograd.functional.hessian(loss, tuple(params.values()))
    shapes = [p.numel() for p in params.values()]
    H = torch.cat(
        [
            torch.cat([block.reshape(size, -1) for block in row], 1)
            for row, size in zip(rows, shapes, strict=True)
        ]
    ).double()
    exact = torch.linalg.eigvalsh(H)
    assert content["loss"] == pytest.approx(loss(*params.values()).item(), rel=1e-6)
    top, bottom = content["top"], content["bottom"]
    for found, residual, value in zip(top["values"], top["residuals"], exact.flip(0), strict=False):
        assert abs(found - value) <= residual + 1e-6
    assert abs(bottom["values"][0] - exact[0]) <= bottom["residuals"][0] + 1e-6
    low, high = content["trace"]["interval"]
    assert low <= exact.sum() <= high
    nodes = content["density"]["nodes"][0]
    assert exact[0] - 1e-5 <= nodes[0] and nodes[-1] <= exact[-1] + 1e-5
    middle = content["landscape"]["losses"][7][7]
    assert middle == pytest.approx(content["loss"], rel=1e-6)
    assert "largest λ 3" in err and not (here / "report").exists()


TRAINED = ("logistic-digits", "--epochs", "1", "--train-images", "300", "--samples", "100")


@pytest.mark.parametrize("problem", [("mine:problem",), TRAINED], ids=lambda words: words[0])
def test_the_same_seed_gives_the_same_numbers(here, capsys, problem):
    state = torch.get_rng_state()
    runs = []
    for seed in ("3", "3", "4"):
        _, out, _ = run(capsys, "analyze", *problem, *SMALL, "--seed", seed, "--json")
        runs.append(json.loads(out))
        del runs[-1]["timing"], runs[-1]["settings"]
    assert runs[0] == runs[1]
    assert runs[0]["loss"] != runs[2]["loss"] and runs[0]["trace"] != runs[2]["trace"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compressed_basis_is_used_and_shown(here, capsys):
    code, _, _ = run(capsys, "analyze", "mine:problem", *SMALL, "--seed", "3", "--out", "full")
    assert code == 0
    options = ("--basis", "compressed", "--seed", "3", "--out", "half")
    code, _, _ = run(capsys, "analyze", "mine:problem", *SMALL, *options)
    assert code == 0
    full, half = (read(f"{name}/result.json") for name in ("full", "half"))
    assert half["settings"]["basis"] == "compressed" and full["settings"]["basis"] == "full"
    assert half["top"]["values"] == pytest.approx(full["top"]["values"], rel=1e-4)
    assert half["density"]["nodes"][0] != full["density"]["nodes"][0]
    assert "float16 rows" in (here / "half" / "report.html").read_text()
    assert "float16 rows" not in (here / "full" / "report.html").read_text()


def test_built_in_problems_train(here, capsys):
    _, out, err = run(
        capsys, "analyze", "mlp-digits", *SMALL, "--epochs", "3", "--samples", "100",
        "--batch-size", "40", "--train-images", "600", "--json", "--out", "r",
    )  # fmt: skip
    problem = json.loads(out)["problem"]
    assert problem["samples"] == 100 and problem["train_images_per_epoch"] == 600
    assert len(problem["epochs"]) == 3 and problem["test"]["accuracy"] > 0.8
    assert "training mlp-digits: 30 in" in err
    assert json.loads((here / "r" / "result.json").read_text()) == json.loads(out)


def test_resnet20_on_a_cifar_folder(here, capsys):
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        records = generator.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (here / f"{name}.bin").write_bytes(records.tobytes())
    args = ("analyze", "resnet20", "--data", ".", "--no-density", "--no-landscape", "--bottom", "0")
    _, out, _ = run(
        capsys, *args, "--epochs", "1", "--samples", "4", "--top", "1", "--trace-rtol", "0.9",
        "--max-products", "12", "--json",
    )  # fmt: skip
    content = json.loads(out)
    assert content["problem"]["data"] == "CIFAR-10"
    assert content["problem"]["parameters"] == 272_474
    assert content["density"] is content["landscape"] is content["bottom"] is None
    (here / "test_batch.bin").write_bytes(b"short")
    assert "cut short" in refused(capsys, *args)


def test_unconverged_eigenvalues_are_reported(here, capsys):
    _, out, err = run(
        capsys, "analyze", "mlp-digits", "--epochs", "1", "--no-trace", "--no-density", "--json",
        "--no-landscape", "--top", "1", "--bottom", "2", "--max-products", "3",
    )  # fmt: skip
    assert json.loads(out)["bottom"]["converged"] is False
    assert "(not converged)" in err and "note: " in err


def test_plot_draws_the_figures_again(here, capsys):
    run(capsys, "analyze", "mine:problem", *SMALL)
    code, out, _ = run(capsys, "plot", "report/result.json", "--out", "again")
    assert code == 0 and out.split() == [f"again/{name}" for name in FIGURES]
    for name in FIGURES:
        assert (here / "again" / name).read_bytes() == (here / "report" / name).read_bytes()
    assert "not empty" in refused(capsys, "plot", "report/result.json", "--out", "again")
    assert run(capsys, "plot", "report/result.json", "--out", "again", "--overwrite")[0] == 0


def test_doctor_and_help(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "reference" in out and "native" in out
    code, out, _ = run(capsys, "analyze", "--help")
    assert code == 0 and "module:function" in out and "Examples:" in out
    assert all(name in out for name in problems.BUILTIN)
    code, out, _ = run(capsys)
    assert code == 0 and "analyze" in out
    code, out, _ = run(capsys, "--version")
    assert code == 0 and "0." in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nonsense"], "nonsense"),
        (["analyze"], "PROBLEM"),
        (["analyze", "mine:problem", "--bogus"], "--bogus"),
        (["analyze", "nothing"], "no problem 'nothing'; use resnet20"),
        (["analyze", "absent:f"], "no module 'absent'"),
        (["analyze", "mine.below:f"], "no module 'mine.below'"),
        (["analyze", "mine:absent"], "no function 'absent'"),
        (["analyze", "mine:number"], "no function 'number'"),
        (["analyze", ":f"], "is not module:function"),
        (["analyze", "mine:two"], "tuple of 2; expected model, criterion, data"),
        (["analyze", "mine:no_model"], "returned a str as the model"),
        (["analyze", "mine:nan"], "nan"),
        (["analyze", "mine:problem", "--samples", "3"], "--samples is for built-in problems"),
        (["analyze", "mine:problem", "--top", "-1"], "--top"),
        (["analyze", "mine:problem", "--top", "24"], "--top 24 is more than the 23 parameters"),
        (["analyze", "mine:problem", "--top", "x"], "--top"),
        (["analyze", "mine:problem", "--steps", "0"], "--steps"),
        (["analyze", "mine:problem", "--probes", "0"], "--probes"),
        (["analyze", "mine:problem", "--points", "1"], "--points"),
        (["analyze", "mlp-digits", "--span", "nan"], "--span nan is not a positive"),
        (["analyze", "mine:problem", "--trace-rtol", "0"], "--trace-rtol 0.0 is not between"),
        (["analyze", "mine:problem", "--trace-rtol", "2"], "--trace-rtol 2.0"),
        (["analyze", "mine:problem", "--top", "0"], "--no-landscape"),
        (["analyze", "mine:problem", "--max-products", "4"], "--max-products 4"),
        (["analyze", "mine:problem", "--basis", "half"], "--basis"),
        (["analyze", "mine:problem", "--basis", "offload"], "use 'full' or 'compressed'"),
        (["analyze", "mlp-digits", "--data", "."], "takes no --data"),
        (["analyze", "resnet20", "--data", "absent"], "absent is not a folder"),
        (["analyze", "mlp-digits", "--samples", "5000"], "samples=5000 is not in 1..1437"),
        (["analyze", "mine:problem", "--out", "mine.py"], "is a file"),
        (["analyze", "mine:problem", "--out", "mine.py/x"], "is a file"),
        (["analyze", "mine:problem", "--out", "."], "is not empty"),
        (["plot", "absent.json"], "absent.json: No such file"),
        (["plot", "mine.py"], "mine.py is not JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(here, capsys, args, words):
    before = sorted(os.listdir())
    assert words in refused(capsys, *args)
    assert sorted(os.listdir()) == before


def test_nothing_at_all_to_compute(here, capsys):
    parts = ("--top", "0", "--bottom", "0", "--no-trace", "--no-density", "--no-landscape")
    assert "nothing to compute" in refused(capsys, "analyze", "mine:problem", *parts)


def test_bugs_and_errors_of_the_user_keep_their_traceback(here, monkeypatch):
    with pytest.raises(ValueError, match="a bug of the user"):
        cli.main(["analyze", "mine:broken"])
    (here / "needs.py").write_text("import absent_dependency")
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        cli.main(["analyze", "needs:f"])

    monkeypatch.setattr(
        "fasthessian.app.report.result.PARTS", None
    )  # a TypeError inside the package
    with pytest.raises(TypeError, match="not iterable"):
        cli.main(["analyze", "mine:problem", *SMALL])


def test_an_interrupt_leaves_no_report(here, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fasthessian.app.carry_out.result_of", interrupt)
    code, _, err = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 130 and err.endswith("error: interrupted; nothing was written\n")
    assert sorted(os.listdir()) == ["mine.py"]


WITHOUT = """
import os, sys
import torch
from fasthessian.app.main import main
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.modules[name] = None
        main(["analyze", "mine:problem"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_missing_extra_is_one_line(here):
    """One process imports torch; its child for each extra has none of the extras loaded."""
    extras = ("click", "rich", "matplotlib", "jinja2")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *extras],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines, codes = done.stderr.splitlines(), done.stdout.split()
    assert done.returncode == 0 and len(lines) == len(codes) == len(extras), done.stderr
    for missing, line, code in zip(extras, lines, codes, strict=True):
        assert code in ("1", "2"), line
        assert f"need{'s' if missing != 'matplotlib' else ''} {missing}; pip install" in line


def test_python_dash_m(here):
    done = subprocess.run(
        [sys.executable, "-m", "fasthessian", "plot", "absent.json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: absent.json: No such file or directory\n")
