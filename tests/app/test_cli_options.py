"""``analyze`` has the options that its messages name: their advice is followed and works."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import fasthessian as fh
from fasthessian.app import main as cli
from fasthessian.app.advice import as_options
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.report import figures, method, result, summary
from tests.support.command_line import working_folder

for extra in ("click", "rich", "matplotlib", "sklearn"):
    pytest.importorskip(extra)

MINE = """
import torch
from torch import nn
from torch.autograd.function import once_differentiable

torch.manual_seed(1)
x, y = torch.randn(20, 4), torch.randint(2, (20,))

def problem(*layers, criterion=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), *(layers or [nn.Tanh()]), nn.Linear(3, 2))
    return model, criterion or nn.CrossEntropyLoss(), (x, y)

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()
    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def forward(self, x):
        return self.function.apply(x)

class Centred(nn.Module):
    def forward(self, x):
        return torch.tanh(x - x.mean(0))

def once(): return problem(Layer(Once))
def plain(): return problem(Layer(Plain))
def normed(): return problem(nn.BatchNorm1d(3), nn.Tanh())
def centred(): return problem(Centred())
def concave(): return problem(criterion=lambda z, t: -(z ** 2).mean() + z.mean())
"""
SMALL = ("--top", "1", "--bottom", "0", "--steps", "4", "--points", "3", "--trace-rtol", "0.9")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder with the user's module ``mine``."""
    yield from working_folder(tmp_path, monkeypatch, MINE)


def run(capsys, *args):
    """Exit code and stderr of ``analyze`` in a folder that may have a report."""
    with pytest.raises(SystemExit) as info:
        cli.main(["analyze", *args, *SMALL, "--overwrite"])
    return info.value.code, capsys.readouterr().err


def read(path):
    """The content of a result.json, as it is read back strictly."""
    return result.read(path).to_json()


def without(args, *names):
    """The arguments without these options and their values."""
    words = list(args)
    for name in names:
        at = words.index(name)
        del words[at : at + 2]
    return words


@pytest.mark.parametrize(
    ("args", "words", "drop", "take"),
    [
        (["mine:once"], "use --engine difference", [], "--engine difference"),
        (["mine:plain", "--engine", "forward"], "use --engine retained or recompute",
         ["--engine"], "--engine recompute"),
        (["mine:normed", "--mode", "train", "--microbatch", "4"],
         "--microbatch must be left out for this model: '1' normalises over the batch; "
         "use --mode eval", ["--mode"], "--mode eval"),
        (["mine:normed", "--mode", "train", "--microbatch", "4"], "--microbatch must be left out",
         ["--microbatch"], ""),
        (["mine:centred", "--microbatch", "5"], "use no --microbatch", ["--microbatch"], ""),
        (["mine:concave", "--matrix", "ggn"], "use --matrix hessian", ["--matrix"],
         "--matrix hessian"),
        (["mine:problem", "--engine", "forward", "--precision", "bf16"],
         "--precision must be left out with --engine forward, got 'bf16'", ["--precision"], ""),
        (["mine:problem", "--precision", "tf32"], "--precision must be left out or 'bf16' on cpu",
         ["--precision"], "--precision bf16"),
        (["mine:problem", "--params", "^9"], "its names are 0.weight, 0.bias, 2.weight, 2.bias",
         ["--params"], "--params ^2.weight"),
        (["mine:problem", "--params", "("], "--params '(' is not a regular expression",
         ["--params"], "--params 0"),
        (["mine:problem", "--weight-decay", "-1"], "is not a number of at least 0",
         ["--weight-decay"], "--weight-decay 0"),
        (["mine:problem", "--basis", "offload"], "use 'full' or 'compressed'", ["--basis"],
         "--basis compressed"),
        (["mlp-digits", "--lr", "1e30", "--epochs", "1"], "use a smaller --lr", ["--lr"],
         "--lr 0.05"),
        (["mlp-digits", "--lr", "nan"], "lr=nan is not a positive number", ["--lr"],
         "--lr 0.05 --epochs 1"),
    ],
)  # fmt: skip
def test_the_advice_of_an_error_works(capsys, args, words, drop, take):
    code, err = run(capsys, *args)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and words in err, err
    code, err = run(capsys, *without(args, *drop), *shlex.split(take))
    assert code == 0, err
    assert Path("report/report.html").exists()


def test_the_advice_of_a_note_works(capsys):
    args = ["mlp-digits", "--epochs", "1", "--no-density", "--no-landscape"]
    code, err = run(capsys, *args, "--max-products", "3", "--no-trace")
    note = next(line for line in err.splitlines() if line.startswith("note: "))
    assert code == 0 and "raise --max-products, or accept" in note
    assert note.removeprefix("note: ") in read("report/result.json")["notes"]
    code, err = run(capsys, *args, "--no-trace")
    assert code == 0 and "note: " not in err and read("report/result.json")["notes"] == []


def words_of(capsys, *args):
    """Exit code and the last line of stderr of ``analyze``."""
    with pytest.raises(SystemExit) as info:
        cli.main(["analyze", *args])
    return info.value.code, capsys.readouterr().err.splitlines()[-1]


def test_the_advice_of_a_plan_works(capsys):
    none = ["mine:problem", "--top", "0", "--bottom", "0", "--no-trace", "--no-density", "--json"]
    code, err = words_of(capsys, *none, "--no-landscape")
    assert code == 2 and "ask for --top, --bottom, --trace or --density" in err
    for option in ("--top=1", "--bottom=1", "--trace", "--density"):
        assert words_of(capsys, *none, "--no-landscape", option)[0] == 0, option
    code, err = words_of(capsys, *none, "--trace")
    assert code == 2 and "give --top 1 or more, or --no-landscape" in err
    assert words_of(capsys, *none, "--trace", "--top", "1")[0] == 0


def test_the_advice_about_a_problem_works(capsys):
    for spec in ("./mine.py:problem", "mine.py:problem"):
        code, err = words_of(capsys, spec)
        way = re.search(r"; from its folder write (\S+)", err)
        assert code == 2 and way is not None, err
        assert words_of(capsys, way.group(1), *SMALL, "--json")[0] == 0
    code, err = words_of(capsys, "mlp", "--json")
    assert code == 2 and "use resnet20, mlp-digits" in err
    assert words_of(capsys, "mlp-digits", *SMALL, "--epochs", "1", "--json")[0] == 0


def test_the_advice_about_a_folder_works(capsys):
    assert words_of(capsys, "mine:problem", *SMALL)[0] == 0
    code, err = words_of(capsys, "mine:problem", *SMALL)
    assert code == 2 and "use --overwrite or another --out" in err
    assert words_of(capsys, "mine:problem", *SMALL, "--out", "other")[0] == 0
    assert words_of(capsys, "mine:problem", *SMALL, "--overwrite")[0] == 0
    code, err = words_of(capsys, "mine:problem", *SMALL, "--out", "mine.py")
    assert code == 2 and "choose another --out" in err
    assert words_of(capsys, "mine:problem", *SMALL, "--out", "third")[0] == 0


def test_options_reach_the_operator_and_the_report(capsys):
    options = ("--matrix", "ggn", "--params", "^2", "--weight-decay", "0.5", "--microbatch", "7",
               "--engine", "recompute", "--mode", "train", "--blocks", "layer")  # fmt: skip
    code, err = run(capsys, "mine:problem", *options)
    assert code == 0 and "Gauss-Newton spectrum" in err and "Hessian" not in err
    content = read("report/result.json")
    found = content["settings"]
    asked = dict(matrix="ggn", params="^2", weight_decay=0.5, microbatch=7, engine="recompute",
                 mode="train")  # fmt: skip
    assert {name: found[name] for name in asked} == asked
    assert content["environment"]["engine"] == "recompute"

    import mine

    model, criterion, (x, y) = mine.problem()
    hidden = model[:2](x).detach()

    def loss(weight, bias):  # of the last layer alone, where the Gauss-Newton part is all there is
        return criterion(hidden @ weight.T + bias, y)

    parts = (model[2].weight.detach(), model[2].bias.detach())
    rows = torch.autograd.functional.hessian(loss, parts)
    sizes = [p.numel() for p in parts]
    H = torch.cat([torch.cat([block.reshape(m, -1) for block in row], 1)
                   for row, m in zip(rows, sizes, strict=True)]).double()  # fmt: skip
    exact = torch.linalg.eigvalsh(H + 0.5 * torch.eye(len(H)))
    assert content["problem"]["parameters"] == len(H) == 8
    assert content["top"]["values"][0] == pytest.approx(float(exact[-1]), rel=1e-3)

    text = Path("report/report.html").read_text()
    shown = re.sub("base64,[^']*", "", text)
    for words in ("Gauss-Newton spectrum of mine:problem", "Gauss-Newton matrix of the loss",
                  "those whose name matches ^2", "0.5 times the identity"):  # fmt: skip
        assert words in shown, words
    assert "Hessian" not in shown


def test_the_figures_name_the_matrix(monkeypatch, capsys):
    seen = []
    png = figures.png

    def spy(fig):
        seen.append([t.get_text() for ax in fig.axes
                     for t in (ax.title, ax.xaxis.label, ax.yaxis.label)])  # fmt: skip
        return png(fig)

    monkeypatch.setattr(figures, "png", spy)
    assert run(capsys, "mine:problem", "--matrix", "fisher", "--blocks", "layer")[0] == 0
    words = " ".join(text for texts in seen for text in texts)
    assert "eigenvalue of the Fisher matrix" in words and "blocks of the Fisher matrix" in words
    assert "Hessian" not in words
    seen.clear()
    assert run(capsys, "mine:problem", "--blocks", "layer")[0] == 0
    assert "eigenvalue of the Hessian" in " ".join(text for texts in seen for text in texts)


def test_the_fisher_matrix_is_the_one_of_the_seed(capsys):
    assert run(capsys, "mine:problem", "--matrix", "fisher", "--seed", "3")[0] == 0
    import mine

    F = fh.Fisher(*mine.problem(), seed=3)
    exact = torch.linalg.eigvalsh((F @ torch.eye(F.n)).double())
    found = read("report/result.json")["top"]["values"][0]
    assert found == pytest.approx(float(exact[-1]), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exact, by double backward"),
        ({"engine": "difference"}, "by central differences of gradients"),
        ({"engine": "forward"}, "exact, in forward mode over reverse mode"),
        ({"precision": "bf16"}, "in bf16, by double backward"),
    ],
)
def test_the_report_says_how_products_were_made(settings, words):
    assert method.products(AnalysisOptions(**settings)) == words
    assert summary.kind(result.Result.from_json({})) == "Hessian"


@pytest.mark.parametrize(
    ("message", "translated"),
    [
        ("engine='recompute' keeps no graph, microbatch=1 and more cut the batches",
         "--engine recompute keeps no graph, --microbatch 1 and more cut the batches"),
        ("basis='compressed' needs 3 GiB, or basis='none' needs 1.2 GiB",
         "--basis compressed needs 3 GiB, or leave the density out (--no-density)"),
        ("5 rows would fit (fewer steps or pairs, or a smaller ncv)",
         "5 rows would fit (fewer --steps, --top or --bottom)"),
        ("raise max_matvecs or rtol", "raise --trace-rtol"),
        ("raise max_matvecs or steps, or accept", "raise --max-products, or accept"),
        ("raise max_matvecs or tol; residuals under 2e-4 ||A|| need basis='full'",
         "raise --max-products; residuals under 2e-4 ||A|| need --basis full"),
        ("with sigma=0.1 take basis='full', or a sigma of at least 0.2", "take --basis full"),
        ("use Hessian, or a criterion of torch's operations",
         "use --matrix hessian, or a criterion of torch's operations"),
        ("use Hessian.from_closure(closure, params)", "use Hessian.from_closure(closure, params)"),
        ("pass weights=lambda batch: <its number of terms>, or all data as one batch",
         "return all data as one batch"),
        ("pass all data as one batch without microbatch, or weights=lambda batch: <its share>",
         "pass all data as one batch without --microbatch"),
        ("samples=5000 is not in 1..1437", "samples=5000 is not in 1..1437"),
    ],
)  # fmt: skip
def test_arguments_of_python_become_options(message, translated):
    assert as_options(message) == translated


def test_a_file_whose_name_is_no_identifier_is_imported(capsys, tmp_path):
    Path("my-own.py").write_text(Path("mine.py").read_text())
    assert words_of(capsys, "my-own:problem", *SMALL, "--json")[0] == 0
    code, err = words_of(capsys, "my-own.py:problem", *SMALL, "--json")
    assert code == 2 and "from its folder write my-own:problem" in err


def test_what_the_users_code_prints_is_not_among_the_json(capsys):
    Path("prints.py").write_text("print('from the module')\n" + Path("mine.py").read_text())
    with pytest.raises(SystemExit) as info:
        cli.main(["analyze", "prints:problem", *SMALL, "--json"])
    printed = capsys.readouterr()
    assert info.value.code == 0
    assert json.loads(printed.out)["format"] and "from the module" in printed.err
