"""Tests that need a GPU: captured steps, waits of the host, streams, rows of over 2^31 numbers."""

import pytest
import torch

import fasthessian as fh
from fasthessian import kernels
from fasthessian.krylov.cuda_graph import FEW
from fasthessian.krylov.lanczos import Lanczos
from tests.support.cuda_checks import (
    check_captured,
    check_curvatures,
    check_failed_capture,
    check_launches,
    check_long_logits,
    check_long_rows,
    check_problem,
    check_quiet_steps,
    check_unchanged,
    grown,
    mlp,
    moved,
    no_waiting,
    operator,
    same_steps,
)
from tests.support.models import PROBLEMS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
F32, CUDA = torch.float32, torch.device("cuda")
each_problem = pytest.mark.parametrize("name", PROBLEMS)


@each_problem
def test_results_match_the_dense_matrix(name):
    check_problem(name, CUDA)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gru"])
def test_matrices_engines_and_blocks(name):
    check_curvatures(name, CUDA)


@pytest.mark.parametrize("graph", [True, False])
def test_steps_do_not_wait_for_the_device(graph):
    check_quiet_steps(CUDA, graph)


@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_captured_steps_equal_eager_ones(basis):
    check_captured(CUDA, basis)


@each_problem
def test_every_problem_is_captured(name):
    A = operator(name, CUDA)
    found = Lanczos(A, 12, seed=0)
    found.step()
    few = f"eager: {A.n} steps are too few to pay for a capture"
    assert found.graph == ("captured" if A.n >= FEW else few)


def planted_error(count):
    raise RuntimeError("planted")


@pytest.mark.parametrize("plant", [planted_error, int], ids=["raises", "reads the counter"])
def test_a_failed_capture_falls_back(monkeypatch, plant):
    check_failed_capture(CUDA, monkeypatch, plant)


def test_capture_while_a_graph_of_the_user_is_alive():
    """That graph keeps the gradient nodes of the parameters on the default stream."""
    A = mlp(CUDA)
    model = A._loss.roots[0]
    loss = model(torch.randn(4, 20, device=CUDA)).square().mean()
    same_steps(grown(A), grown(mlp(CUDA), graph=False))
    loss.backward()


def test_steps_with_class_weights_do_not_wait_for_the_device():
    model, _, (x, y) = moved("mlp", CUDA, F32)
    criterion = torch.nn.CrossEntropyLoss(weight=torch.rand(3, device=CUDA))
    krylov = Lanczos(fh.Hessian(model, criterion, (x, y)), 20, seed=0)
    krylov.step()
    with no_waiting(CUDA):
        krylov.step()
    assert krylov.graph == "captured"


def test_an_offloaded_basis_equals_the_full_one():
    A, options = mlp(CUDA), {"graph": False}
    same_steps(grown(A, basis="offload", **options), grown(A, **options))
    full, away = (fh.eigsh(A, 3, "LA", tol=1e-4, basis=b).values for b in ("full", "offload"))
    torch.testing.assert_close(full, away, rtol=1e-4, atol=0)


# the node belongs to the stream of the first run
@pytest.mark.filterwarnings("ignore:The AccumulateGrad")
def test_a_second_run_does_not_free_the_graphs_of_the_first():
    """A run between steps of another run rebuilds the graphs. The other must keep the old ones."""
    A = mlp(CUDA)
    krylov = Lanczos(A, 30, seed=0)
    for _ in range(10):
        krylov.step()
    fh.density(A, steps=10)
    torch.cuda.empty_cache()
    while krylov.size < 30:
        krylov.step()
    krylov.poll(wait=True)
    same_steps(krylov, grown(mlp(CUDA), graph=False))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_step_launches_at_most_four_kernels(backend):
    if kernels.BACKENDS[backend].unavailable(CUDA) is not None:
        pytest.skip(kernels.BACKENDS[backend].unavailable(CUDA))
    check_launches(CUDA, backend)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_rows_longer_than_31_bits(backend):
    module = kernels.BACKENDS[backend]
    if module.unavailable(CUDA) is not None:
        pytest.skip(module.unavailable(CUDA))
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    check_long_rows(module, CUDA, 2**31 + 64)
    torch.cuda.empty_cache()
    check_long_logits(module, CUDA, 2**31 // 1000 + 1, 1000)
    torch.cuda.empty_cache()


def test_work_on_the_stream_of_the_caller():
    want = fh.density(mlp(CUDA), steps=20).nodes
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = fh.density(mlp(CUDA), steps=20).nodes
        assert torch.cuda.current_stream() == stream
    for end in (torch.max, torch.min):
        torch.testing.assert_close(end(found), end(want), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_work_on_a_second_device():
    check_problem("mlp", torch.device("cuda:1"))
    check_captured(torch.device("cuda:1"), "full")
    assert torch.cuda.current_device() == 0


def test_the_state_of_the_user_is_unchanged():
    check_unchanged(CUDA)


def test_a_default_device_of_the_user():
    """With torch.set_default_device("cuda"), factories without a device create GPU tensors."""
    want = fh.eigsh(mlp(CUDA), 2, "LA").values
    with CUDA:
        found = fh.eigsh(mlp(CUDA), 2, "LA").values
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=0)
