import base64
import dataclasses
import math
import re

import pytest
import torch

from fasthessian.app.report import study_page as pages
from fasthessian.app.report.study_page import study_page
from fasthessian.results.records import Landscape
from fasthessian.study.networks import Network
from fasthessian.study.records import DIVERGED, TRAINED, Measurement, Study, Training
from fasthessian.study.sheets import VERDICTS, Claim, Figure, Table

SETTINGS = {
    "version": "9.8",
    "recipe": {"epochs": 20, "lrs": [0.1, 0.05], "checkpoints": [0, 5], "images": None},
    "data": {"name": "cifar10", "fingerprint": "f00d"},
}
WITH, WITHOUT = Network(20), Network(20, "no-bn")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def training(network, seed=0, status=TRAINED):
    one = numbers(0.5)
    last = math.nan if status == DIVERGED else 0.5
    return Training(
        network.depth, network.variant, seed, 0.1, status,
        one, numbers(last), one, numbers(last), one, one, 1800.0,
    )  # fmt: skip


def measurement(network, epoch, mode="eval", seed=0):
    one = numbers(1.0)
    return Measurement(
        network.depth, network.variant, seed, 0.1, epoch, mode, 100, 50, 0.5, 0.6, 1.0, 0.1,
        one, one, True, 10.0, (9.0, 11.0), ("stem",), one, one, one, one, one, one, 0.1, 4, 1.0,
        90.0,
    )  # fmt: skip


def landscape(points=5):
    x = torch.linspace(-1, 1, points, dtype=torch.float64)
    return Landscape(x, x, 0.1 + x[:, None] ** 2 + 2 * x**2)


def whole(**changes):
    found = [measurement(WITH, e, mode) for e in (0, 5) for mode in ("eval", "train")]
    found += [measurement(WITHOUT, e) for e in (0, 5)]
    landscapes = {(one.run, one.epoch, one.mode): landscape() for one in found}
    study = Study(SETTINGS, (training(WITH), training(WITHOUT)), tuple(found), landscapes)
    return dataclasses.replace(study, **changes)


def figure(kind, name, title, png=b"png", svg=b"svg+"):
    return Figure(kind, name, title, f"Caption of {name} <Figure 2>.", png, svg)


def section(html, anchor):
    """The text of a section without tags."""
    found = re.search(rf"<section id='{anchor}'>(.*?)</section>", html, re.DOTALL)
    return re.sub(r"<script.*?</script>|<[^>]+>", " ", found[1], flags=re.DOTALL) if found else ""


def test_a_study_is_one_file_that_loads_nothing():
    figures = [figure("trace", "trace", "Trace")]
    html = study_page(whole(), figures, [], [])
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:|#)|url\(|https?:", html)
    assert html.count("</html>") == 1 and len(html) < 60_000


def test_what_was_run_is_told_first():
    html = study_page(whole(), [], [], [])
    assert html.index("What was run") < html.index(">Claims<")
    text = " ".join(section(html, "run").split())
    for words in ("name: cifar10; fingerprint: f00d", "ResNet-20, ResNet-20, no BN", "epochs: 20",
                  "6 at 4 checkpoints", "training 1.0 h, analysis 9.0 min", "lrs 0.1, 0.05",
                  "images automatic", "version 9.8"):  # fmt: skip
        assert words in text, words


def test_claims_have_their_verdict_numbers_and_reason():
    columns, rows = ("network", "trace"), (("A <1>", "10 [9, 11]"),)
    claims = [
        Claim(f"Statement {verdict}.", "Section 4", columns, rows, verdict, f"Why {verdict}.")
        for verdict in (*VERDICTS, "confirmed")
    ]
    text = " ".join(section(study_page(whole(), [], [], claims), "claims").split())
    summary = "✓ confirmed 2, ✗ contradicted 1, ? not decided 1, – not measured 1"  # noqa: RUF001
    assert summary in text
    words = "✗ contradicted Statement contradicted. Why contradicted. network trace A &lt;1&gt;"
    assert words + " 10 [9, 11] Source: Section 4" in text
    assert text.index("✗ contradicted Statement contradicted. ? not decided") < text.index(words)


def test_tables_have_columns_rows_and_captions():
    tables = [Table("accuracy", "Accuracy", ("network", "paper"), (("20", "92.1 %"),), "Table I.")]
    html = study_page(whole(), [], tables, [])
    assert " ".join(section(html, "tables").split()) == (
        "Tables Accuracy network paper 20 92.1 % Table I."
    )
    assert not section(study_page(whole(), [], [], []), "tables")


def test_figures_stand_by_kind_in_their_smaller_format():
    figures = [
        figure("trace", "trace-20", "Trace, depth 20", png=b"p", svg=b"long"),
        figure("trace", "trace-32", "Trace, depth 32", png=b"long", svg=b"s"),
        figure("density", "density", "Density, depth 20"),
    ]
    html = study_page(whole(), figures, [], [])
    assert re.findall(r"data:([^;]+);base64,([^']+)", html) == [
        ("image/png", base64.b64encode(b"p").decode()),
        ("image/svg+xml", base64.b64encode(b"s").decode()),
        ("image/png", base64.b64encode(b"png").decode()),
    ]
    assert re.findall(r"<h2>(.*?)</h2>", html)[3:5] == ["Trace", "Density, depth 20"]
    text = section(html, "kind-trace")
    assert "Trace, depth 32" in text and "Caption of trace-32 &lt;Figure 2&gt;." in text


def test_the_contents_lead_to_every_section():
    html = study_page(whole(), [figure("trace", "trace", "Trace")], [], [])
    links = re.findall(r"<a href='#([^']+)'>", html)
    assert links == ["claims", "kind-trace", "landscapes", "missing"]
    assert all(f"id='{link}'" in html for link in links)


def test_landscapes_are_chosen_by_network_seed_epoch_and_mode():
    html = study_page(whole(), [], [], [])
    keys = re.findall(r"data-key='([^']+)'", html)
    assert [key.replace("&#34;", "") for key in keys] == [
        "[ResNet-20, 0, 5, eval]", "[ResNet-20, 0, 5, train]", "[ResNet-20, 0, 0, eval]",
        "[ResNet-20, 0, 0, train]", "[ResNet-20, no BN, 0, 5, eval]",
        "[ResNet-20, no BN, 0, 0, eval]",
    ]  # fmt: skip
    lists = [re.findall(r"<option>(.*?)<", part) for part in html.split("<select>")[1:]]
    assert lists == [["ResNet-20", "ResNet-20, no BN"], ["0"], ["5", "0"], ["eval", "train"]]


def test_a_page_stays_small_and_says_which_landscapes_it_lacks(monkeypatch):
    monkeypatch.setattr(pages, "LARGEST", 3 * 8 * 25)
    html = study_page(whole(), [], [], [])
    assert len(re.findall(r"data-key='.*?5&#34;, .*?'", html)) == html.count("data-key=") == 3
    assert "3 of early epochs are omitted" in html


def test_what_is_missing_is_said_with_its_reason():
    assert "Nothing: all networks" in section(study_page(whole(), [], [], []), "missing")
    study = whole()
    measured = tuple(one for one in study.measurements if (one.epoch, one.mode) != (5, "train"))
    trainings = (
        *study.trainings, training(WITH, seed=1), training(Network(20, "no-res"), 0, DIVERGED)
    )  # fmt: skip
    study = whole(measurements=measured, trainings=trainings)
    html = study_page(study, [], [], [], {"stages": "no network was measured"})
    rows = [" ".join(line.split()) for line in section(html, "missing").splitlines()]
    assert [row for row in rows if row][1:] == [
        "ResNet-20, seed 0 not measured at epoch 5 (train)",
        "ResNet-20, seed 1 not measured",
        "ResNet-20, no residual, seed 0 diverged with the initial rate 0.1; not measured",
        "ResNet-20, no BN no training ended for seed 1",
        "ResNet-20, no residual no training ended for seed 1",
        "stages no network was measured",
    ]


@pytest.mark.parametrize("settings", [{}, {"recipe": "laptop", "data": None}])
def test_a_study_without_results_has_a_page(settings):
    html = study_page(Study(settings, (), (), {}), [], [], [])
    assert "none yet" in html and "No claim was examined" in html and "<script" not in html
