"""Tables of a study: ours beside the paper's, also where a network did not train."""

import csv
import dataclasses
import io

import pytest

from fasthessian.study import paper
from fasthessian.study.networks import VARIANTS, Network
from fasthessian.study.records import DIVERGED, UNTRAINED
from fasthessian.study.tables import as_csv, as_markdown, ours, tables
from fasthessian.study.text import number
from tests.support.synthetic_study import PLANTS, Plant, synthetic


@pytest.fixture(scope="module")
def made():
    return {table.name: table for table in tables(synthetic())}


def cells(table, first):
    """The rows that begin with a name, as dictionaries by column."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == first]


def test_each_table_has_rows_of_its_columns_and_a_caption(made):
    assert list(made) == ["accuracy", "accuracy-no-bn-stages", "curvature", "trainings"]
    for table in made.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table.title and table.caption
        assert all(cell for row in table.rows for cell in row)


def test_accuracies_stand_beside_those_of_the_paper(made):
    (row,) = cells(made["accuracy"], "no BN")
    mean, _, deviation = row["depth 20, ours"].split()
    assert float(mean) == pytest.approx(100 * PLANTS[Network(20, "no-bn")].accuracy, abs=0.02)
    assert float(deviation) == pytest.approx(0.44, abs=0.01)  # of the two planted seeds
    assert row["depth 20, paper"] == "87.27" and row["depth 32, paper"] == "66.57"
    assert "Table I," in made["accuracy"].caption
    assert [row[0] for row in made["accuracy-no-bn-stages"].rows] == ["ResNet", "no BN in stage 3"]


def test_another_data_set_has_no_numbers_of_the_paper():
    study = synthetic()
    for data, words in (("CIFAR-100", "Tables A.5 to A.7,"), ("digits", "Table I,")):
        settings = {**study.settings, "data": {"name": data}}
        table = tables(dataclasses.replace(study, settings=settings))[0]
        assert {row[2] for row in table.rows} == {"-"}
        assert words in table.caption and "not available here" in table.caption


def test_networks_that_did_not_train_appear_as_such():
    plants = {
        Network(56): Plant(),
        Network(56, "no-bn"): Plant(status=DIVERGED),
        Network(56, "no-res"): Plant(status=UNTRAINED),
    }
    found = {table.name: table for table in tables(synthetic(plants, depths=(56,)))}
    ours_and_paper = {row[0]: row[1:] for row in found["accuracy"].rows}
    assert ours_and_paper["no BN"] == ("diverged", "not trained")
    assert ours_and_paper["no residual"][0] == "not trained (10.0)"
    statuses = {row[0]: row[3] for row in found["trainings"].rows}
    assert statuses["ResNet-56, no BN"] == "diverged"
    assert cells(found["trainings"], "ResNet-56, no BN")[0]["test accuracy (%)"] == "-"
    named = [row[0] for row in found["curvature"].rows]
    assert "ResNet-56, no residual (not trained)" in named
    assert not any("no BN" in name for name in named)


def test_some_seeds_may_diverge():
    good, bad = (
        synthetic({Network(20): Plant(status=status)}, depths=(20,)).kept()
        for status in ("trained", DIVERGED)
    )
    assert ours([good[0], bad[1]]) == "70.30; 1 of 2 diverged"


def test_the_rate_that_was_kept_is_marked(made):
    rows = cells(made["trainings"], "ResNet-20")
    assert [(row["initial rate"], row["kept"]) for row in rows] == [
        ("0.01", "no"), ("0.1", "yes"), ("0.1", "yes"),
    ]  # fmt: skip


def test_measurements_of_a_rate_that_was_not_kept_are_left_out(made):
    study = synthetic()
    other = dataclasses.replace(study.measurements[0], lr=0.01, epoch=21, trace=1.0)
    study = dataclasses.replace(study, measurements=(*study.measurements, other))
    assert {table.name: table for table in tables(study)} == made


def test_curvature_is_given_for_both_kinds_of_statistics(made):
    rows = cells(made["curvature"], "ResNet-32")
    assert [row["statistics"].split()[0] for row in rows] == ["running"] * 2 + ["batch"] * 2
    assert rows[0]["trace"] == "721 [692, 750]"
    assert [row["trace, paper"] for row in rows] == ["about 2000"] * 2 + ["-"] * 2
    assert cells(made["curvature"], "ResNet-20")[0]["trace, paper"] == "-"
    (without, _) = cells(made["curvature"], "ResNet-32, no BN")
    assert without["statistics"] == "no batch normalisation"
    assert without["trace, paper"] == "about 10000"


def test_csv_and_markdown_hold_every_cell(made):
    for table in made.values():
        read = list(csv.reader(io.StringIO(as_csv(table))))
        assert read == [list(table.columns), *map(list, table.rows)]
        lines = as_markdown(table).splitlines()
        assert lines[0] == f"### {table.title}" and lines[-1] == table.caption
        body = [line for line in lines if line.startswith("| ")]
        assert len(body) == 1 + len(table.rows)
        assert body[1].strip("| ").split(" | ") == list(table.rows[0])


def test_the_paper_has_a_number_for_each_network_on_cifar10_alone():
    for variant in VARIANTS:
        for depth in paper.DEPTHS:
            value = paper.accuracy(Network(depth, variant), "CIFAR-10")
            assert value == paper.UNTRAINABLE or 50 < value < 95
            assert paper.accuracy(Network(depth, variant), "CIFAR-100") is None
    assert paper.accuracy(Network(26), "CIFAR-10") is None
    assert paper.accuracy(Network(56, "no-bn"), "CIFAR-10") == "not trained"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"), (1.0, "1.00"), (9.999, "10.0"), (999.6, "1000"), (123456, "123000"),
        (1e6, "1.00e+06"), (0.001234, "0.00123"), (1.2e-4, "1.20e-04"), (-2.5, "-2.50"),
        (float("nan"), "not finite"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(x, text):
    assert number(x) == text
