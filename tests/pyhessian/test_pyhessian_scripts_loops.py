"""Small versions of public scripts that use PyHessian: layers, gradients and their own loops.

They import the names of PyHessian, as the scripts do.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.pyhessian_cases import batches, by_magnitude, cross_entropy, mean_loss_hessian
from tests.support.pyhessian_scripts import MARKS, about, flat, installed, near, problem, units

__all__ = ["installed"]
pytestmark = MARKS


def test_one_layer_trainable_at_a_time():
    from pyhessian import hessian

    model, (data,), _ = problem()
    for name in ("0", "2"):
        for p in model.parameters():
            p.requires_grad = False
        weight = model.get_submodule(name).weight
        weight.requires_grad = True
        samples = hessian(model, cross_entropy, data=data, cuda=False).trace(maxIter=600, tol=0)
        about(samples, mean_loss_hessian(model, [data], [weight]).trace())


def test_layer_found_by_identity_in_params():
    from pyhessian import hessian

    model, (data,), _ = problem()
    for module in (model[0], model[2]):
        comp = hessian(model, cross_entropy, data=data, cuda=False)
        i = next(i for i, p in enumerate(comp.params) if p is module.weight)
        comp.params, comp.gradsH = [comp.params[i]], [comp.gradsH[i]]
        values, _ = comp.eigenvalues(maxIter=300, tol=1e-5, top_n=1)
        near(values[-1], by_magnitude(mean_loss_hessian(model, [data], [module.weight]))[0])
        model.zero_grad(set_to_none=True)


def test_subclass_that_reads_grad_of_each_layer():
    from pyhessian import group_product, hessian, hessian_vector_product, normalization

    class PerLayer(hessian):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
            self.first = {layer: layer.weight.grad + 0.0 for layer in layers}

        def layers(self, steps):
            for layer, grad in self.first.items():
                v = normalization([torch.randn(layer.weight.size()).to(self.device)])
                for _ in range(steps):
                    self.model.zero_grad()
                    Hv = hessian_vector_product(grad, layer.weight, v)
                    value = group_product(Hv, v).cpu().item()
                    v = normalization(Hv)
                yield layer, value

    model, (data,), _ = problem()
    torch.manual_seed(0)
    for layer, value in PerLayer(model, cross_entropy, data=data, cuda=False).layers(100):
        near(value, by_magnitude(mean_loss_hessian(model, [data], [layer.weight]))[0])


def test_traces_of_layers_by_single_tensors():
    from pyhessian import hessian
    from pyhessian.utils import group_product, hessian_vector_product

    model, (data,), _ = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    for grad, p in zip(comp.gradsH, comp.params, strict=True):
        total = 0.0
        for (v,) in units([p]):
            total += group_product(hessian_vector_product(grad, p, [v]), [v]).cpu().item()
        near(total, mean_loss_hessian(model, [data], [p]).trace())


def test_newton_step_with_the_gradients_of_the_constructor():
    import pyhessian
    import pyhessian.utils

    model, (data,), H = problem()
    comp = pyhessian.hessian(model, F.cross_entropy, data=data, cuda=False)
    _, grads = pyhessian.utils.get_params_grad(model)
    g = torch.autograd.grad(cross_entropy(model(data[0]), data[1]), model.parameters())
    torch.testing.assert_close(flat(grads), flat(g))
    values, vectors = comp.eigenvalues(tol=1e-6)
    v = flat(vectors[0])
    near((v @ flat(grads)).abs() / values[0], (v @ flat(g)).abs() / by_magnitude(H)[0])


def test_gradients_of_the_constructor_differentiated_again():
    from pyhessian import get_params_grad, hessian

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    params, grads = get_params_grad(comp.model)
    v = [torch.ones_like(p) for p in params]
    Hv = torch.autograd.grad(grads, params, grad_outputs=v, only_inputs=True, retain_graph=True)
    torch.testing.assert_close(flat(Hv), H.sum(1), rtol=1e-3, atol=1e-5)


def test_subclass_without_biases():
    from pyhessian.hessian import hessian
    from pyhessian.utils import group_product, hessian_vector_product

    def weights_and_gradients(model):
        named = [(n, p) for n, p in model.named_parameters() if "bias" not in n]
        return [p for _, p in named], [0.0 if p.grad is None else p.grad + 0.0 for _, p in named]

    class Weights(hessian):
        def __init__(self, model, criterion, data=None, dataloader=None, cuda=True):
            super().__init__(model, criterion, data, dataloader, cuda)
            self.params, self.gradsH = weights_and_gradients(self.model)

        def traces(self):
            sums = [0.0 for _ in self.params]
            for v in units(self.params):
                Hv = hessian_vector_product(self.gradsH, self.params, v)
                sums = [s + torch.sum(x * y).item() for s, x, y in zip(sums, Hv, v, strict=True)]
            return sums

    model, (data,), _ = problem()
    comp = Weights(model, cross_entropy, data, None, False)
    H = mean_loss_hessian(model, [data], [model[0].weight, model[2].weight])
    near(comp.eigenvalues(tol=1e-5)[0][0], by_magnitude(H)[0])
    near(sum(comp.traces()), H.trace())
    assert group_product(comp.gradsH, comp.gradsH).item() > 0


def test_subclass_with_a_penalty_in_its_gradients():
    from pyhessian import hessian

    class Decayed(hessian):
        def __init__(self, model, criterion, data, decay):
            super().__init__(model, criterion, data=data, cuda=False)
            loss = self.criterion(self.model(self.inputs), self.targets)
            loss = loss + 0.5 * decay * sum(p.square().sum() for p in self.params)
            self.gradsH = torch.autograd.grad(loss, self.params, create_graph=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    model(torch.randn(20, 4))  # moves the statistics of the layer, which eval mode then uses
    (data,) = batches()
    top = by_magnitude(mean_loss_hessian(model, [data]))[0] + 0.5
    near(Decayed(model, cross_entropy, data, 0.5).eigenvalues(tol=1e-5)[0][0], top)


def test_subclass_of_dictionaries_without_super():
    import pyhessian
    from pyhessian.utils import get_params_grad, group_product

    class General(pyhessian.hessian):
        def __init__(self, model, loss, loader):
            self.model, self.loss = model.eval(), loss
            self.data, self.full_dataset, self.device = loader, True, "cpu"
            self.params, _ = get_params_grad(self.model)

        def dataloader_hv_product(self, v):
            total, count = [torch.zeros(p.size()) for p in self.params], 0
            for batch in self.data:
                self.model.zero_grad()
                self.loss(self.model, batch).backward(create_graph=True)
                params, grads = get_params_grad(self.model)
                self.model.zero_grad()
                Hv = torch.autograd.grad(grads, params, grad_outputs=v, retain_graph=False)
                total = [t + h * len(batch["x"]) for t, h in zip(total, Hv, strict=True)]
                count += len(batch["x"])
            total = [t / count for t in total]
            return group_product(total, v).cpu().item(), total

    model, data, H = problem((8, 4))
    loader = [{"x": x, "y": y} for x, y in data]
    comp = General(model, lambda m, b: cross_entropy(m(b["x"]), b["y"]), loader)
    near(comp.eigenvalues(tol=1e-5)[0][0], by_magnitude(H)[0])
    about(comp.trace(maxIter=300, tol=0), H.trace())


def test_whole_matrix_column_by_column():
    from pyhessian import hessian

    model, data, H = problem((6, 6))
    comp = hessian(model, cross_entropy, dataloader=data, cuda=False)
    columns = [flat(comp.dataloader_hv_product(e)[1]) for e in units(list(model.parameters()))]
    torch.testing.assert_close(torch.stack(columns), H, rtol=1e-3, atol=1e-5)


def test_exact_trace_with_unit_vectors():
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)

    def hvp(v):
        comp.model.zero_grad()
        return hessian_vector_product(comp.gradsH, comp.params, v)

    total = sum(float(flat(hvp(e)) @ flat(e)) for e in units(comp.params))
    near(total, H.trace())


def test_the_users_own_hutchinson_loop():
    from pyhessian import group_product, hessian, hessian_vector_product

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    torch.manual_seed(0)
    samples = []
    for _ in range(400):
        v = [torch.randint_like(p, high=2) * 2 - 1 for p in comp.params]
        Hv = hessian_vector_product(comp.gradsH, comp.params, (x for x in v))
        samples.append(group_product(Hv, v).cpu().item())
    about(samples, H.trace())


def test_overlap_of_the_gradient_with_its_product():
    from pyhessian import group_product, hessian, hessian_vector_product, normalization

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    g = flat(torch.autograd.grad(cross_entropy(model(data[0]), data[1]), model.parameters()))
    Hg = hessian_vector_product(comp.gradsH, comp.params, comp.gradsH)
    overlap = group_product(normalization(Hg), normalization(comp.gradsH)).detach().cpu()
    near(overlap, (H @ g) @ g / (H @ g).norm() / g.norm())


def test_gradient_projected_on_eigenvectors():
    from pyhessian import hessian

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    g = flat(comp.gradsH)
    values, vectors = comp.eigenvalues(top_n=4, maxIter=2000, tol=1e-6)
    V = torch.stack([flat(v) for v in vectors])
    w, Q = torch.linalg.eigh(H)
    top = Q[:, w.abs().argsort(descending=True)[:4]]
    near((V @ g).square().sum() / (g @ g), (top.T @ g).square().sum() / (g @ g), rel=0.05)
    near(values[0] - max(values), 0.0)


def test_norm_of_one_gradient():
    from pyhessian import hessian

    model, (data,), _ = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    g = torch.autograd.grad(cross_entropy(model(data[0]), data[1]), model[0].weight)[0]
    near(torch.linalg.norm(comp.gradsH[0]).item(), g.norm())
    near(torch.linalg.norm(model[0].weight.grad).item(), g.norm())


def test_step_taken_and_taken_back():
    from pyhessian import group_add, hessian, hessian_vector_product

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    grads, v = comp.gradsH, [torch.ones_like(p) for p in comp.params]
    group_add(comp.params, v, alpha=0.25)
    group_add(comp.params, v, alpha=-0.25)
    Hv = hessian_vector_product(grads, comp.params, v)
    torch.testing.assert_close(flat(Hv), H.sum(1), rtol=1e-3, atol=1e-5)


def test_the_users_own_deflated_power_iteration():
    from pyhessian.utils import (
        get_params_grad,
        group_product,
        hessian_vector_product,
        normalization,
        orthnormal,
    )

    model, ((x, y),), H = problem()
    cross_entropy(model(x), y).backward(create_graph=True)
    params, grads = get_params_grad(model)
    model.zero_grad()
    torch.manual_seed(0)
    found, values = [], []
    for _ in range(2):
        v = normalization([torch.randn(p.size()) for p in params])
        for _ in range(300):
            v = orthnormal(v, found)
            Hv = hessian_vector_product(grads, params, v)
            value = group_product(Hv, v).cpu().item()
            v = normalization(Hv)
        found.append(v)
        values.append(value)
    np.testing.assert_allclose(values, by_magnitude(H)[:2], rtol=0.02)
