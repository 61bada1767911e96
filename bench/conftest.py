"""The ``row`` fixture, and the closing table of a run, which is also written as JSON.

A benchmark first checks the answers, then times all contestants in interleaved rounds and reports
ratios. Absolute times of a shared machine mean little; ratios within one run can be compared.
"""

import pytest

from bench.harness.record import printed, written

ROWS: list[dict] = []


@pytest.fixture
def row():
    """Function that adds a row to the closing table; value None needs a note that says why."""

    def add(what, value, unit="x", *, target=None, **details):
        ROWS.append({"what": what, "value": value, "unit": unit, "target": target, **details})

    return add


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.write_line("")
    for line in printed(ROWS):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"written to bench/results/{written(ROWS).name}")
