"""The advice of ``check()`` and of out-of-memory errors works when it is followed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasthessian as fh
from tests.support.advice_models import CE, HALVES, Call, H, X, Y, detached, net


class Broken(fh.Hessian):
    """A Hessian whose products are wrong by ``wrong(V)`` with the engine ``retained``."""

    def _multiply(self, requests):
        super()._multiply(requests)
        if self.engine.startswith("retained"):
            for request in requests:
                request.out.add_(self.wrong(request.V))


@pytest.mark.parametrize(
    ("wrong", "row", "words"),
    [
        (lambda V: V.roll(1, 1), "symmetry", "products are wrong: use another engine"),
        (lambda V: V, "difference", "try another engine"),
    ],
)
def test_a_check_that_advises_another_engine(wrong, row, words):
    A, B = (Broken(net(), CE, (X, Y), engine=engine) for engine in ("retained", "recompute"))
    Broken.wrong = staticmethod(wrong)
    found = A.check()
    assert not found.ok and words in line(found, row)
    assert B.check().ok


def line(check, row):
    return next(line for line in str(check).splitlines() if line.startswith(row))


def test_a_check_that_advises_to_fix_random_numbers():
    generator = torch.Generator().manual_seed(0)
    noise = [0.0]
    layer = Call(lambda x: x + noise[0] * torch.rand(x.shape, generator=generator))
    A = fh.Hessian(net(layer), CE, (X, Y), engine="recompute")
    noise[0] = 1.0
    assert "fix its random numbers" in line(A.check(), "repetition")
    noise[0] = 0.0
    assert A.check().ok


def test_a_check_of_a_loss_that_detaches():
    with pytest.warns(UserWarning, match="detaches a part of itself"):
        A = fh.Hessian(net(), detached, (X, Y))
    assert "which detaches a part of itself" in line(A.check(), "gradient")
    assert fh.Hessian(net(), lambda z, y: F.cross_entropy(z * z, y), (X, Y)).check().ok


class InTraining(nn.Module):
    """Detaches a part of the loss in eval mode; the loss in training mode is a different one."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        z = self.inner(x)
        return z * (1.1 * z if self.training else z.detach())


def test_a_check_of_a_model_that_detaches_in_eval_mode():
    with pytest.warns(UserWarning, match="detaches a part of itself"):
        A = fh.Hessian(InTraining(), CE, (X, Y))
    assert "try mode='train'" in line(A.check(), "gradient")
    B = fh.Hessian(InTraining(), CE, (X, Y), mode="train")
    assert " ok" in line(B.check(), "gradient")


def test_a_check_of_samples_that_are_coupled():
    layer = Call(lambda x: x - x.mean(0))
    A = fh.Hessian(net(layer), CE, (X, Y))
    assert "pass weights=, or samples are coupled" in line(A.check(), "weights")
    assert fh.Hessian(net(), CE, (X, Y)).check().ok


class Greedy(nn.Module):
    """Runs out of memory with more than ``most`` samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.most = net(), 99

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.inner(x)


def test_out_of_memory_advises_smaller_parts_or_no_graphs():
    model = Greedy()
    A = fh.Hessian(model, CE, HALVES, engine="retained")
    v, want = torch.linspace(-1, 1, A.n), fh.Hessian(net(), CE, (X, Y))
    with torch.no_grad():  # so that graphs are rebuilt
        model.inner[0].bias.add_(0.0)
    model.most = 2
    with pytest.raises(MemoryError) as info:
        A @ v
    message = str(info.value)
    assert "engine='recompute' keeps no graph" in message and "microbatch=1 and more cut" in message
    model.most = 99
    B = fh.Hessian(model, CE, HALVES, microbatch=1)
    C = fh.Hessian(model, CE, HALVES, engine="recompute")
    torch.testing.assert_close(C @ v, want @ v)
    model.most = 2
    torch.testing.assert_close(B @ v, want @ v)


class Outputs:
    def __init__(self, logits):
        self.logits = logits


def test_gauss_newton_of_an_unknown_function_in_the_loss_of_an_output_object():
    model, g = nn.Sequential(net(), Call(Outputs)), torch.ones(8, 1)

    def normed(out, y):
        return F.cross_entropy(torch._weight_norm_interface(out.logits, g, 0)[0], y)

    def plain(out, y):
        z = out.logits
        return F.cross_entropy(z, y) + z.square().mean()

    with pytest.raises(RuntimeError, match="use Hessian, or a criterion of torch's operations"):
        H(model, normed, kind=fh.GaussNewton)
    with pytest.raises(RuntimeError, match="or use engine='difference' with Hessian"):
        H(model, normed)  # Hessian can check it
    H(model, normed, engine="difference")
    H(model, plain, kind=fh.GaussNewton)
