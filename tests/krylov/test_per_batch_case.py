"""The bench case of traces per batch runs, and small groups of images narrow the interval."""

import dataclasses

from bench.cases import per_batch_trace
from fasthessian.study import data


def test_fewer_images_per_vector_narrow_the_interval_of_a_resnet20(capsys, monkeypatch):
    monkeypatch.setattr(per_batch_trace, "SHARING", (1, 6))
    monkeypatch.setattr(per_batch_trace, "BATCH", 32)
    images = data.digits(size=8)
    few = dataclasses.replace(images, train_x=images.train_x[:96], train_y=images.train_y[:96])
    per_batch_trace.resnet20(few, None, width=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "96 images in batches of 32, weights before training"
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [row[0] for row in rows] == ["1", "6"] and {row[3] for row in rows} == {"1"}
    narrow, wide = (float(row[2].rstrip("%")) for row in rows)
    assert 0 < narrow < abs(wide)  # the trace before training may be negative
