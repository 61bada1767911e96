"""``fasthessian plan``: its examples, its numbers, its bad input and what it advises."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")

from fasthessian.app import main as cli
from fasthessian.app import this_machine
from fasthessian.planning.steps import BASES, collectives

GIB = 2**30
SMALL = ("--params", "1M", "--ranks", "4", "--memory", "1", "--host-memory", "1")
KNOWN = (*SMALL, "--bandwidth", "10", "--memory-bandwidth", "100", "--host-bandwidth", "10",
         "--product-seconds", "0.5", "--activation-memory", "0.25")  # fmt: skip


def run(capsys, *args):
    """Exit code, stdout, stderr of one plan."""
    with pytest.raises(SystemExit) as info:
        cli.main(["plan", *args])
    out, err = capsys.readouterr()
    return info.value.code, out, err


def shown(capsys, *args):
    """What is printed for a plan that is made."""
    code, out, err = run(capsys, *args)
    assert code == 0 and err == "", err
    return out


def content(capsys, *args):
    """The JSON of a plan."""
    return json.loads(shown(capsys, *args, "--json"))


def refused(capsys, *args):
    """The one line of stderr of a plan that is refused."""
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def examples():
    """The examples of the help text."""
    from fasthessian.app.plan import HELP

    return re.findall(r"^  fasthessian plan (.*)$", HELP, re.MULTILINE)


@pytest.fixture
def quick(monkeypatch):
    """This machine is not measured."""
    monkeypatch.setattr(this_machine, "read_bandwidth", lambda device: 20e9)


@pytest.mark.parametrize("example", examples())
def test_an_example_of_the_help_text_runs(capsys, quick, example):
    out = shown(capsys, *shlex.split(example))
    if "--json" in example:
        assert json.loads(out)["recommended"] is not None
    else:
        assert "take: basis='" in out and "note: times and memory are estimates" in out


def test_the_help_text_says_what_is_an_estimate(capsys):
    out = shown(capsys, "--help")
    said = ("All times and sizes are estimates", "peaks of its data sheet", "sharded",
            "H100 SXM 80 GB", "wall time", "--activation-memory", "--largest-module")  # fmt: skip
    for words in said:
        assert words in out, words
    assert len(examples()) >= 5
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "plan " in capsys.readouterr().out


def test_the_plan_is_a_command_of_its_own():
    command = [sys.executable, "-m", "fasthessian", "plan", "--params", "7B", "--json"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)["asked"]["n"] == 7 * 10**9 and made.stderr == ""


def test_the_json_has_every_number(capsys):
    found = content(capsys, *KNOWN, "--disk-bandwidth", "2", "--machine", "h100", "--pairs", "2")
    assert found["format"] == "fasthessian plan 1"
    assert set(found) == {
        "format", "machine", "asked", "choices", "recommended", "enough_ranks", "notes"
    }  # fmt: skip
    assert found["asked"] == {
        "n": 10**6, "ranks": 4, "steps": 100, "pairs": 2, "dtype": "float32",
        "product_seconds": 0.5, "activations": GIB // 4, "largest": 0.05,
    }  # fmt: skip
    assert found["machine"]["memory"] == GIB and found["machine"]["bandwidth"] == 10e9
    assert found["machine"]["node_bandwidth"] == 450e9 and found["machine"]["ranks_per_node"] == 8
    assert len(found["choices"]) == 3 * 2 * 3 and found["recommended"] in found["choices"]
    for each in found["choices"]:
        assert set(each) == {
            "basis", "sharded", "wrap", "model_bytes", "space_bytes", "host_bytes", "device_bytes",
            "fits", "collectives", "sent_bytes", "gathered_bytes", "streamed_bytes", "step",
            "run_seconds", "wall_seconds", "checkpoint_bytes", "checkpoint_seconds",
            "largest_params", "most_steps",
        }  # fmt: skip
        assert set(each["step"]) == {"product", "gathers", "streams", "collectives", "total"}
        assert None not in each.values() and None not in each["step"].values()
        assert each["device_bytes"] == each["model_bytes"] + each["space_bytes"]
        counted = collectives(10**6, 4, 49, sharded=each["sharded"], basis=each["basis"])
        assert each["collectives"] == [list(one) for one in counted]


def test_options_have_the_units_that_they_name(capsys):
    values = ("--latency", "7", "--memory", "2", "--host-memory", "3", "--memory-bandwidth", "4",
              "--bandwidth", "5", "--node-bandwidth", "6", "--host-bandwidth", "8",
              "--disk-bandwidth", "9", "--ranks-per-node", "1")  # fmt: skip
    found = content(capsys, "--params", "1M", "--machine", "h100", *values)["machine"]
    for name in ("flops", "gpu", "about"):
        del found[name]
    assert found == pytest.approx({
        "latency": 7e-6, "memory": 2 * GIB, "host_memory": 3 * GIB, "memory_bandwidth": 4e9,
        "bandwidth": 5e9, "node_bandwidth": 6e9, "host_bandwidth": 8e9, "disk_bandwidth": 9e9,
        "ranks_per_node": 1,
    })  # fmt: skip


def test_what_is_not_known_is_null_and_named(capsys):
    found = content(capsys, "--params", "1M", "--ranks", "4")
    for each in found["choices"]:
        assert each["fits"] is each["run_seconds"] is each["largest_params"] is None
    notes = "; ".join(found["notes"])
    options = ("--product-seconds", "--activation-memory", "--memory", "--host-memory",
               "--bandwidth", "--memory-bandwidth")  # fmt: skip
    for option in options:
        assert re.search(rf"give {option}\b", notes), option
    known = "; ".join(content(capsys, *KNOWN)["notes"])
    assert "give " not in known
    assert "give " not in "; ".join(content(capsys, *KNOWN, "--basis", "full")["notes"])


def test_notes_name_what_is_assumed(capsys):
    def notes(*args):
        return "; ".join(content(capsys, *KNOWN, *args)["notes"])

    assert "figures of a data sheet, H200 SXM 141 GB" in notes("--machine", "h200")
    assert "the largest module is assumed to have 5%" in notes()
    assert "assumed" not in notes("--largest-module", "50K", "--latency", "3")
    assert "largest module" not in notes("--wrap", "plain")
    assert "only 1000000 of 2000000 steps" in notes("--steps", "2000000")
    out = content(capsys, "--params", "1M", "--samples", "10", "--machine", "a100")
    assert "products are assumed to reach 40%" in "; ".join(out["notes"])


def test_the_tables_show_the_numbers(capsys):
    out = shown(capsys, *KNOWN, "--disk-bandwidth", "2")
    rows = [line.split() for line in out.splitlines()]
    taken = next(row for row in rows if row[:2] == ["full", "sharded"])
    found = content(capsys, *KNOWN, "--disk-bandwidth", "2")["recommended"]
    assert taken[4] == "yes" and taken[5] == "3"
    assert float(taken[2]) == pytest.approx(found["device_bytes"] / 2**20, rel=1e-2)
    assert "take: basis='full', sharded=True; model: plain" in out
    assert "1,000,000 parameters in float32 on 4 ranks, 100 Lanczos steps" in out
    assert re.search(r"ask the scheduler for: --time=00:07:00 --signal=B:USR1@120", out)
    assert max(len(line) for line in out.splitlines() if line[:4] in ("full", "comp")) <= 80
    assert [row[0] for row in rows if row and row[0] in ("plain", "unshard", "regather")] == [
        "plain", "unshard", "regather"
    ]  # fmt: skip


def test_a_step_without_its_product_is_marked(capsys):
    out = shown(capsys, *KNOWN[:10], "--memory-bandwidth", "100")
    assert re.search(r"full +sharded .* \+ [\d.]+ ms +\? ", out), out


def test_a_checkpoint_that_is_slow_asks_for_an_earlier_signal(capsys):
    out = shown(capsys, *KNOWN, "--disk-bandwidth", "0.001")
    # 408 MB at 1 MB/s, twice, and a step
    assert "--signal=B:USR1@820" in out and "torchrun kills its ranks 30 s after SIGTERM" in out


def test_nothing_fits(capsys):
    args = ("--params", "100M", "--memory", "8", "--pairs", "1", "--basis", "full")
    out = shown(capsys, *args)
    assert "take:" not in out and "largest model that fits: 20.2M parameters" in out
    ranks = int(re.search(r"nothing fits: ([\d,]+) ranks would do", out)[1].replace(",", ""))
    assert "take: basis='full'" in shown(capsys, *args, "--ranks", str(ranks))
    assert content(capsys, *args)["enough_ranks"] == ranks
    assert "more ranks do not help" in shown(capsys, "--params", "10B", "--memory", "8")


@pytest.mark.parametrize(
    ("text", "value"),
    [("7e9", 7 * 10**9), ("7B", 7 * 10**9), ("1.5b", 15 * 10**8), ("350M", 350 * 10**6),
     ("64k", 64_000), ("11,173,962", 11_173_962), ("1_000", 1000), ("2 G", 2 * 10**9), ("1", 1),
     ("1.2e+3", 1200)],
)  # fmt: skip
def test_counts(capsys, text, value):
    assert content(capsys, "--params", text)["asked"]["n"] == value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Missing option '--params'"),
        (["--params", "0"], "'0' is not a count such as 7e9, 7B, 350M or 11173962"),
        (["--params", "1.5"], "'1.5' is not a count"),
        (["--params", "1..5M"], "'1..5M' is not a count"),
        (["--params", "-7B"], "'-7B' is not a count"),
        (["--params", "7Q"], "'7Q' is not a count"),
        (["--params", "1e40"], "'1e40' is not a count"),
        (["--params", "7B", "--ranks", "0"], "0 is not in the range x>=1"),
        (["--params", "7B", "--steps", "0"], "0 is not in the range x>=1"),
        (["--params", "7B", "--memory", "nan"], "'--memory': nan is not a positive number"),
        (["--params", "7B", "--bandwidth", "-1"], "'--bandwidth': -1.0 is not a positive number"),
        (["--params", "7B", "--latency", "0"], "'--latency': 0.0 is not a positive number"),
        (["--params", "7B", "--dtype", "int8"], "'int8' is not one of 'float64'"),
        (["--params", "7B", "--machine", "v100"], "'v100' is not one of 'a100'"),
        (["--params", "7B", "--basis", "half"], "'half' is not one of 'full'"),
        (["--params", "1M", "--largest-module", "2M"],
         "--largest-module 2000000 is more than the 1000000 of --params"),
        (["--params", "1M", "--samples", "2", "--gradient-seconds", "1"],
         "--gradient-seconds and --samples both say how long a product takes; give one"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(capsys, args, words):
    assert words in refused(capsys, *args)


@pytest.mark.parametrize(
    ("args", "words", "drop", "take"),
    [
        (["--params", "1M", "--ranks", "10", "--machine", "h100"],
         "use --ranks 16, or --ranks-per-node 2", "--ranks", ["--ranks", "16"]),
        (["--params", "1M", "--ranks", "10", "--machine", "h100"],
         "use --ranks 16, or --ranks-per-node 2", None, ["--ranks-per-node", "2"]),
        (["--params", "1M", "--basis", "none", "--pairs", "3"],
         "use --basis compressed, or --pairs 0", "--basis", ["--basis", "compressed"]),
        (["--params", "1M", "--basis", "none", "--pairs", "3"],
         "use --basis compressed, or --pairs 0", "--pairs", ["--pairs", "0"]),
        (["--params", "1M", "--wrap", "unshard"], "use --wrap plain, or raise --ranks",
         "--wrap", ["--wrap", "plain"]),
        (["--params", "1M", "--wrap", "unshard"], "use --wrap plain, or raise --ranks",
         None, ["--ranks", "2"]),
        (["--params", "1M", "--machine", "here", "--basis", "offload"], "use --basis compressed",
         "--basis", ["--basis", "compressed"]),
        (["--params", "1M", "--samples", "3"], "give --flops as well, or --machine h100",
         None, ["--flops", "10"]),
        (["--params", "1M", "--samples", "3"], "give --flops as well, or --machine h100",
         None, ["--machine", "h100"]),
        (["--params", "1M", "--flops", "3"], "give --samples as well", None, ["--samples", "9"]),
        (["--params", "1M", "--samples", "3", "--flops", "1", "--product-seconds", "4"],
         "give one", "--product-seconds", []),
    ],
)  # fmt: skip
def test_the_advice_of_an_error_works(capsys, monkeypatch, quick, args, words, drop, take):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in refused(capsys, *args)
    if drop is not None:
        at = args.index(drop)
        args = args[:at] + args[at + 2 :]
    assert content(capsys, *args, *take)["recommended"] is not None


def test_the_advice_of_a_note_works(capsys):
    advice = {
        "--product-seconds": "1", "--samples": "5", "--activation-memory": "1", "--memory": "8",
        "--host-memory": "8", "--bandwidth": "10", "--memory-bandwidth": "100",
    }  # fmt: skip
    args = ("--params", "1M", "--ranks", "4", "--flops", "2", "--samples", "5")
    plain = ("--params", "1M", "--ranks", "4")
    for option, value in advice.items():
        before = content(capsys, *plain)["notes"]
        given = args if option == "--samples" else (*plain, option, value)
        left = [note for note in before if note not in content(capsys, *given)["notes"]]
        assert len(left) == 1 and re.search(rf"\b(?:give|or) {option}\b", left[0]), option


def test_the_time_of_a_product(capsys):
    def product(*args):
        return content(capsys, "--params", "1B", *args)["choices"][0]["step"]["product"]

    assert product("--product-seconds", "3") == 3
    assert product("--gradient-seconds", "2") == pytest.approx(4.6)
    assert product("--samples", "1K", "--flops", "12") == pytest.approx(1.0)
    # 40 % of the peak of the dtype
    assert product("--samples", "1K", "--machine", "h100") == pytest.approx(12 / (0.4 * 67))
    half = ("--dtype", "bfloat16", "--samples", "1K", "--machine", "h100")
    assert product(*half) == pytest.approx(12 / (0.4 * 989))
    assert product("--machine", "h100") is None


@pytest.mark.parametrize("basis", BASES)
def test_only_what_is_asked_for_is_compared(capsys, basis):
    found = content(capsys, *SMALL, "--basis", basis, "--wrap", "regather")["choices"]
    assert [(c["basis"], c["sharded"], c["wrap"]) for c in found] == [
        (basis, False, "regather"), (basis, True, "regather")
    ]  # fmt: skip


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(this_machine, "NUMBERS", 1 << 22)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(this_machine, "available_bytes", lambda device: 12 * GIB)
    found = this_machine.this_machine(4)
    assert found.memory == found.host_memory == 3 * GIB  # a quarter for each rank
    assert found.ranks_per_node == 4 and not found.gpu and found.bandwidth is None
    assert 1e8 < found.memory_bandwidth < 1e13


def test_ranks_share_a_cpu_but_not_a_gpu(monkeypatch, quick):
    monkeypatch.setattr(this_machine, "available_bytes", lambda d: {"cpu": 8, "cuda": 5}[d.type])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = this_machine.this_machine(2)
    assert on_gpu.gpu and on_gpu.memory == 5 and on_gpu.host_memory == 4
    assert on_gpu.memory_bandwidth == 20e9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_machine.this_machine(2).memory_bandwidth == 10e9
