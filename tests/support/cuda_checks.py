"""The checks of test_cuda.py as functions of a device; test_gpu_rehearsal.py runs them on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fasthessian as fh
from bench.gpu.meter import no_waiting, per_step
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from tests.support.krylov_runs import rows_of
from tests.support.models import PROBLEMS

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def moved(name, device, dtype):
    """A problem's (model, criterion, data) on a device."""
    model, criterion, data = PROBLEMS[name].make(dtype)
    if data is None:
        inner = criterion

        def criterion(model):
            with device:  # the closure makes its points itself
                return inner(model)

    else:
        data = tuple(t.to(device) for t in data)
    return model.to(device), criterion, data


def operator(name, device, dtype=F64):
    return PROBLEMS[name].operator(*moved(name, device, dtype))


def mlp(device, width=64):
    """A Hessian whose steps can be captured, large enough for 60 rows."""
    # the same on any default device of the caller's
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, width), torch.nn.Tanh(), torch.nn.Linear(width, 5)
        ).to(device)
        data = torch.randn(50, 20).to(device), torch.randint(5, (50,)).to(device)
    return fh.Hessian(model, torch.nn.CrossEntropyLoss(), data)


def grown(A, steps=30, **options):
    krylov = Lanczos(A, steps, seed=0, deferred=True, **options)
    while krylov.size < steps:
        krylov.step()
    krylov.poll(wait=True)
    return krylov


def expected_words(device):
    return "captured" if device.type == "cuda" else "eager: cpu has no CUDA graphs"


def same_steps(found, expected):
    """To rounding, which Lanczos amplifies: the first rows of T, and the outermost Ritz values."""
    scale = float(expected.state.T.abs().max())
    assert float((found.state.T - expected.state.T)[:8, :8].abs().max()) < 1e-3 * scale
    ends = [krylov.ritz()[0][[0, -3, -2, -1]] for krylov in (found, expected)]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3 * scale)


def check_problem(name, device):
    """Eigenpairs, trace and density against the dense matrix made on the CPU in float64."""
    problem = PROBLEMS[name]
    dense = problem.dense(*problem.make(F64))
    spectrum = torch.linalg.eigvalsh(dense)
    # cuDNN multiplies float32 in TF32, of 11 bits, unless it is told not to
    for dtype, bound in ((F64, 1e-9), (F32, 3e-3 if name == "cnn" else 1e-4)):
        A = operator(name, device, dtype)
        found = fh.eigsh(A, 3, "LA", tol=1e-6 if dtype is F64 else 1e-4)
        scale = float(spectrum.abs().max())
        assert float((found.values - spectrum.flip(0)[:3]).abs().max()) < bound * scale
        assert found.vectors.device == A.device
    A = operator(name, device)
    estimate = fh.trace(A, rtol=0.1, max_matvecs=5000)
    here = fh.trace(operator(name, torch.device("cpu")), rtol=0.1, max_matvecs=5000)
    assert abs(estimate.value / here.value - 1) < 1e-6  # the same signs
    low, high = estimate.interval
    assert low - (high - low) < float(dense.trace()) < high + (high - low)
    nodes = fh.density(A, steps=8).nodes
    want = fh.density(operator(name, torch.device("cpu")), steps=8).nodes
    torch.testing.assert_close(nodes, want, rtol=1e-6, atol=1e-8 * scale)
    assert spectrum[0] - 1e-8 * scale <= nodes.min() and nodes.max() <= spectrum[-1] + 1e-8 * scale


def check_quiet_steps(device, graph):
    """Steps after the first make the host wait for nothing."""
    krylov = Lanczos(mlp(device), 30, seed=0, deferred=True, graph=graph)
    krylov.step()
    quiet = no_waiting(device) if device.type == "cuda" else NothingReadBack()
    with quiet:
        for _ in range(10):
            krylov.step()
        krylov.poll(wait=False)
    assert krylov.graph == (expected_words(device) if graph else "eager: graph=False")


def check_captured(device, basis):
    A = mlp(device)
    found = grown(A, basis=basis)
    assert found.graph == expected_words(device) and A.matvecs == 30
    same_steps(found, grown(mlp(device), basis=basis, graph=False))
    found.restart(torch.arange(5))  # the counter goes back with it
    while found.size < 20:
        found.step()
    found.poll(wait=True)
    V = rows_of(found, 20).double()
    bound = 1e-6 if basis == "full" else 1e-3
    assert float((V @ V.T - torch.eye(20, device=device)).abs().max()) < bound


def check_failed_capture(device, monkeypatch, plant):
    """The eager steps that follow are right; the caller's stream and generator are as before."""
    expected = grown(mlp(device), graph=False)
    original = Lanczos.delayed_step

    def failing(self, made, *counts):
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            original(self, made, *counts)  # torch warns of a capture without a kernel
            plant(made)
        else:
            original(self, made, *counts)

    monkeypatch.setattr(Lanczos, "delayed_step", failing)
    before = torch.cuda.current_stream() if device.type == "cuda" else None
    found = grown(mlp(device))
    if device.type == "cuda":
        assert found.graph.startswith("eager: the capture failed: ")
        assert torch.cuda.current_stream() == before
    same_steps(found, expected)
    torch.rand(3, device=device)  # a generator left in a capture would refuse


def check_unchanged(device):
    """Model, gradients and random states, captured steps included."""
    model, criterion, data = moved("mlp", device, F32)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)

    def world():
        seen = [torch.get_rng_state()]
        if device.type == "cuda":
            seen.append(torch.cuda.get_rng_state(device))
        seen += [t.detach().clone() for t in model.state_dict().values()]
        return [*seen, model[0].weight.grad.clone()], [p._version for p in model.parameters()]

    tensors, versions = world()
    fh.density(fh.Hessian(model, criterion, data), steps=12, probes=2)
    after, now = world()
    assert now == versions and all(map(torch.equal, tensors, after))
    assert [p.grad is None for p in model.parameters()].count(True) == len(versions) - 1


def check_launches(device, backend):
    """Kernels of an eager step outside its product, polls included."""
    d = torch.linspace(1, 3, 100_003, device=device)
    A = fh.SymmetricOperator(lambda v: d * v, len(d), device=device, check=False)
    krylov = Lanczos(A, 70, seed=0, backend=backend, deferred=True)
    u, w = torch.randn(1, len(d), device=device), torch.empty(1, len(d), device=device)

    def steps(count, every=4):
        for _ in range(count):
            krylov.step()
            if krylov.size % every == 0:
                krylov.poll(wait=False)

    def products(count):
        for _ in range(count):
            multiply([Request(A, u, w, deferred=True)])

    steps(3)
    step, product = per_step(steps, device), per_step(products, device)
    assert step["kernels"] - product["kernels"] <= 4, (step, product)
    # a poll may wait until the device reaches the previous one; a step never waits
    assert per_step(lambda count: steps(count, 100), device)["waits"] == 0


def check_long_rows(backend, device, n):
    """Indices beyond 2^31: marked entries in rows of anything else."""
    V, W = torch.ones(3, n, dtype=F16, device=device), torch.zeros(1, n, device=device)
    marks = [0, n // 2, n - 65, n - 1]
    for i, mark in enumerate(marks):
        W[0, mark], V[1, mark] = i + 1.0, 2.0
    C, G = backend.project_(V, W, count=2)
    assert C[:, 0].tolist() == [10.0, 20.0, 0.0] and float(G) == 30.0
    H = torch.tensor([[1.0], [-2.0], [5.0]], dtype=F64, device=device)
    backend.update_(V, W, H, count=2, append=0.5)  # W - V0 + 2 V1
    assert [float(W[0, mark]) for mark in marks] == [4.0, 5.0, 6.0, 7.0]
    assert [float(V[2, mark]) for mark in marks] == [2.0, 2.5, 3.0, 3.5]
    assert float(W[0, n - 2]) == 1.0 and float(V[2, n - 2]) == 0.5
    for fill in (backend.signs_, backend.normal_):
        fill(W[0], 5, 3)
        tail = fill(torch.empty(1000, device=device), 5, 3 + n - 1000)
        assert torch.equal(W[0, n - 1000 :], tail)


def check_long_logits(backend, device, rows, classes):
    """Indices beyond 2^31: the same row at the start, in the middle and at the end of zeros."""
    for shape in ((rows, classes, 1), (1, classes, rows)):
        U, Z = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        scale = torch.zeros(shape[0], shape[2], dtype=F64, device=device)
        u, z = torch.randn(2, classes, device=device)
        for row in (0, rows // 2, rows - 1):
            place = (row, slice(None), 0) if shape[2] == 1 else (0, slice(None), row)
            U[place], Z[place], scale.view(-1)[row] = u, z, 1.0
        p = torch.softmax(z.double(), 0)
        want = (p * (u - p @ u.double())).float()
        backend.softmax_curvature_(U, Z, scale)
        for row in (0, rows // 2, rows - 1):
            found = U[row, :, 0] if shape[2] == 1 else U[0, :, row]
            torch.testing.assert_close(found, want)
        assert int(torch.count_nonzero(U)) == 3 * classes


def check_curvatures(name, device):
    """Every matrix by every engine, and its blocks, are on the device what they are on the CPU."""
    there, here = moved(name, device, F64), PROBLEMS[name].make(F64)
    for kind in (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher):
        want = kind(*here)
        eye = torch.eye(want.n, dtype=F64)
        whole = want @ eye
        # the GPU's fused GRU cell has no forward derivative
        forward = () if (name, device.type) == ("gru", "cuda") else ("forward",)
        for engine in ("retained", "recompute", *forward):
            found = kind(*there, engine=engine) @ eye.to(device)
            torch.testing.assert_close(found.cpu(), whole, rtol=1e-9, atol=1e-11)
        blocks = kind(*there).blocks("layer")
        top = fh.eigsh(blocks, 1, tol=1e-9)
        for key, block in want.blocks("layer").items():
            matrix = block @ torch.eye(block.n, dtype=F64)
            values = torch.linalg.eigvalsh(matrix)
            best = values[values.abs().argmax()]
            torch.testing.assert_close(top[key].values[0], best, rtol=1e-7, atol=1e-11)
    F = fh.Fisher(*there, samples=3)
    v = torch.ones(F.n, dtype=F64, device=device)
    assert torch.equal(F @ v, fh.Fisher(*there, samples=3) @ v) and v @ (F @ v) > 0


class NothingReadBack(TorchDispatchMode):
    """Fails on every operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation unless its result depends on the values of a tensor."""
        name = str(func.overloadpacket)
        waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
        assert name.removeprefix("aten.") not in waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
