"""Products in float32 do not use TF32, by both of torch's sets of switches.

Once a program has set one of the newer switches, torch refuses to read the older ones.
"""

import subprocess
import sys

import pytest
import torch

from fasthessian.operators.torch_state.product_state import _float32, _no_cudnn

if not hasattr(torch.backends.cudnn, "conv"):
    pytest.skip("this torch has only the older switches", allow_module_level=True)
SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def precisions():
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.fixture(params=["all", "matmul", "rnn"])
def newer(request):
    """The user set one of the newer switches, so that reading the older ones raises."""
    held = [torch.backends.fp32_precision, *precisions()]
    if request.param == "all":
        torch.backends.fp32_precision = "tf32"
    elif request.param == "matmul":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield precisions()
    torch.backends.fp32_precision = held[0]
    for switch, value in zip(SWITCHES, held[1:], strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("tf32", [False, True])
def test_newer_switches_are_set_and_brought_back(newer, tf32):
    with pytest.raises(ZeroDivisionError), _float32(tf32), _no_cudnn():
        assert precisions() == ["tf32" if tf32 else "ieee"] * 3
        assert not torch.backends.cudnn.enabled
        raise ZeroDivisionError
    assert precisions() == newer and torch.backends.cudnn.enabled


LATER = """
import torch
from fasthessian.operators.torch_state.product_state import _float32
backends = torch.backends
backends.fp32_precision = "tf32"
with _float32(False):
    pass
backends.fp32_precision = "ieee"
switches = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
assert [switch.fp32_precision for switch in switches] == ["ieee"] * 3
"""


def test_a_later_choice_for_all_backends_still_applies():
    """This needs its own process: a switch that inherits cannot be recognised or set back."""
    subprocess.run([sys.executable, "-c", LATER], check=True)


def test_older_switches_are_set_and_brought_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32, word in ((True, "high"), (False, "highest")):
        with _float32(tf32):
            assert torch.get_float32_matmul_precision() == word
            assert torch.backends.cudnn.allow_tf32 is tf32
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
