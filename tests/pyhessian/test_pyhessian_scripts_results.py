"""Small versions of public scripts that use PyHessian: what they do with results and names.

They import the names of PyHessian, as the scripts do.
"""

from __future__ import annotations

import json
import pickle

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from tests.support.pyhessian_cases import by_magnitude, cross_entropy
from tests.support.pyhessian_scripts import MARKS, flat, installed, near, problem

__all__ = ["installed"]
pytestmark = MARKS


def test_density_saved_as_text():
    from pyhessian import hessian

    model, (data,), H = problem()
    nodes, weights = hessian(model, cross_entropy, data=data, cuda=False).density(iter=30, n_v=2)
    np.savetxt("nodes.txt", nodes)
    with open("all.txt", "w") as file:
        for e, w in zip(nodes[0], weights[0], strict=True):
            file.write(f"{e:.10f} {w:.10f}\n")  # as with %lf
    near(np.loadtxt("nodes.txt").max(), by_magnitude(H)[0])
    near(np.loadtxt("all.txt")[:, 1].sum(), 1.0)


def test_density_saved_and_loaded_by_torch():
    from pyhessian import hessian

    model, (data,), H = problem()
    nodes, weights = hessian(model, cross_entropy, data=data, cuda=False).density(iter=30)
    torch.save(nodes, "nodes.pt")
    torch.save(weights, "weights.pt")
    loaded = torch.load("nodes.pt")
    near(sorted(loaded[0], key=abs)[-1], by_magnitude(H)[0])
    near(sum(torch.load("weights.pt")[0]), 1.0)


def test_eigenpairs_saved_and_loaded_by_torch():
    from pyhessian import hessian

    model, (data,), H = problem()
    values, vectors = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues(top_n=2)
    torch.save({"values": values, "vectors": vectors}, "pairs.pt")
    loaded = torch.load("pairs.pt", map_location="cpu")
    near(loaded["values"][0], by_magnitude(H)[0])
    near(flat(loaded["vectors"][0]).norm(), 1.0)


def test_results_pickled_and_in_json():
    from pyhessian import hessian

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    found = {"values": comp.eigenvalues()[0], "trace": comp.trace(maxIter=20, tol=0)}
    assert pickle.loads(pickle.dumps(found)) == found
    assert json.loads(json.dumps(found)) == found
    near(found["values"][0], by_magnitude(H)[0])


def test_results_printed_and_read_again():
    from pyhessian import hessian

    model, (data,), H = problem()
    values = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues()[0]
    near(json.loads(str(values))[0], by_magnitude(H)[0])
    near(str(values[0]), by_magnitude(H)[0])


def test_density_values_with_item():
    from pyhessian import hessian

    model, (data,), H = problem()
    nodes, weights = hessian(model, cross_entropy, data=data, cuda=False).density(iter=30)
    near(max(x.item() for x in nodes[0]), by_magnitude(H)[0])
    near(sum(w.item().real for w in weights[0]), 1.0)


def test_eigenvalues_with_item():
    from pyhessian import hessian

    model, (data,), H = problem()
    values, _ = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues()
    near(max([value.item() for value in values]), by_magnitude(H)[0])


def test_eigenvalues_in_a_tensor():
    from pyhessian import hessian

    model, (data,), H = problem()
    values, vectors = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues(top_n=2)
    assert torch.tensor(values).dtype == torch.float64  # their precision is kept
    scaled = torch.diag(torch.tensor(values).float()) @ torch.stack(
        [x[0].flatten() for x in vectors]
    )
    near(torch.tensor(values)[0], by_magnitude(H)[0])
    assert scaled.shape == (2, 40)


def test_eigenvector_as_one_vector():
    from pyhessian import hessian

    model, (data,), H = problem()
    values, vectors = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues(tol=1e-6)
    v = parameters_to_vector(vectors[0]).double()
    assert float((H @ v - values[0] * v).norm()) < 1e-2 * values[0]


def test_share_of_negative_curvature():
    from density_plot import density_generate
    from pyhessian import hessian

    model, (data,), H = problem()
    torch.manual_seed(0)
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    density, grids = density_generate(*comp.density(iter=12, n_v=100), num_bins=2000)
    near(np.sum(density * grids) / np.sum(density), H.trace() / len(H), rel=0.3)


def test_names_and_keyword_of_a_fork():
    from pyhessian import density_generate, get_esd_plot, hessian

    model, (data,), H = problem()
    comp = hessian(model, cross_entropy, data=data, device=torch.device("cpu"))
    near(comp.eigenvalues(top_n=2)[0][0], by_magnitude(H)[0])
    density, grids = density_generate(*comp.density(iter=20))
    near(density.sum() * (grids[1] - grids[0]), 1.0)
    assert callable(get_esd_plot)


def test_loader_and_device_of_a_fork():
    from pyhessian import hessian

    model, data, H = problem((6, 6))
    comp = hessian(model, cross_entropy, dataloader=data, device="cpu")
    near(comp.eigenvalues()[0][0], by_magnitude(H)[0])


def test_density_plot_inside_the_package():
    from pyhessian import density_plot, hessian

    model, (data,), H = problem()
    nodes, weights = hessian(model, cross_entropy, data=data, cuda=False).density(iter=20, n_v=2)
    _, grids = density_plot.density_generate(nodes, weights, num_bins=1000)
    assert grids[0] < -0.01
    near(grids[-1], by_magnitude(H)[0], rel=0.1)
    density_plot.get_esd_plot(nodes, weights)


def test_star_import_of_the_helpers():
    names = {}
    exec("from pyhessian.utils import *\nfrom pyhessian import hessian", names)
    model, (data,), H = problem()
    comp = names["hessian"](model, cross_entropy, data=data, cuda=False)
    v = [names["Variable"](names["torch"].ones(p.size())) for p in comp.params]
    Hv = names["hessian_vector_product"](comp.gradsH, comp.params, v)
    near(names["group_product"](Hv, v).item(), H.sum())
    near(names["np"].sqrt(4.0), names["math"].sqrt(4.0))


def test_star_import_of_the_package():
    names = {}
    exec("from pyhessian import *", names)
    model, (data,), H = problem()
    near(
        names["hessian"](model, cross_entropy, data=data, cuda=False).eigenvalues()[0][0],
        by_magnitude(H)[0],
    )
    assert names["os"].sep and names["argparse"].ArgumentParser and names["utils"].group_add


def test_star_import_of_the_class():
    names = {}
    exec("from pyhessian.hessian import *", names)
    near(names["np"].sqrt(4.0), names["math"].sqrt(4.0))
    assert names["hessian"] and names["orthnormal"] and names["torch"] is torch


def test_star_import_of_the_plots():
    names = {}
    exec("from density_plot import *", names)
    model, (data,), _ = problem()
    exec("from pyhessian import hessian", names)
    nodes, weights = names["hessian"](model, cross_entropy, data=data, cuda=False).density(iter=9)
    names["get_esd_plot"](nodes, weights)
    names["plt"].savefig("again.pdf")
    names["plt"].close("all")
    near(names["np"].sqrt(4.0), names["math"].sqrt(4.0))


def test_device_given_as_cuda():
    from pyhessian import hessian

    model, data, H = problem()
    device = "cuda:0" if torch.cuda.is_available() else ""
    comp = hessian(model, cross_entropy, dataloader=data, cuda=device)
    near(comp.eigenvalues(top_n=1)[0][0], by_magnitude(H)[0])
