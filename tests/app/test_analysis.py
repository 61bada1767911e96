import pytest

from fasthessian.app.analysis import default_span


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_default_span_follows_the_scale_of_parameters_not_of_the_loss(scale):
    assert default_span(0.2 * scale, 4.0 * scale) == default_span(0.2, 4.0) == 1.0
    assert default_span(0.2, 0.04) == 10.0  # ten times wider parameters
    assert default_span(-1.0, 2.0) == default_span(1.0, -2.0) == 1.0
