"""Fields of records that are right, and the refusal of a file that is not."""

import numpy as np
import pytest

from fasthessian.errors import InputError

MEAN = {"value": 1.0, "stderr": 0.1, "interval": [0.5, 1.5], "confidence": 0.95, "matvecs": 2,
        "converged": False}  # fmt: skip


BLOCKS = {name: np.ones(2) for name in ("sizes", "values", "residuals", "traces", "errors")}


def refused_file(load, path, *words):
    """The message of a file that the package refuses, in one line."""
    with pytest.raises(ValueError) as info:
        load(path)
    message = str(info.value)
    assert isinstance(info.value, InputError) and "\n" not in message and str(path) in message
    assert all(word in message for word in words), message
    return message
