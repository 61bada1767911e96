"""A script as users of PyHessian write them, without any mention of fasthessian."""

import density_plot
import numpy as np
import pyhessian
import torch
import torch.nn as nn
from density_plot import get_esd_plot
from pyhessian import hessian
from pyhessian.hessian import hessian as same_hessian
from pyhessian.utils import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)

torch.manual_seed(0)
batch_num = 3
model = nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1),
    nn.BatchNorm2d(4),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(4 * 36, 3),
)
model = torch.nn.DataParallel(model)
criterion = nn.CrossEntropyLoss()
dataset = torch.utils.data.TensorDataset(torch.randn(30, 1, 6, 6), torch.randint(0, 3, (30,)))
train_loader = torch.utils.data.DataLoader(dataset, batch_size=10, shuffle=True)

# the main script: one batch
for inputs, labels in train_loader:
    hessian_dataloader = (inputs, labels)
    break
model.eval()
hessian_comp = hessian(model, criterion, data=hessian_dataloader, cuda=False)
top_eigenvalues, top_vectors = hessian_comp.eigenvalues(top_n=2)
trace = hessian_comp.trace()
density_eigen, density_weight = hessian_comp.density(iter=30, n_v=2)
print("Top Eigenvalues:", top_eigenvalues)
print("Trace:", np.mean(trace))
get_esd_plot(density_eigen, density_weight)
assert same_hessian is hessian is pyhessian.hessian
assert max(top_eigenvalues) >= np.max(density_eigen) - 1e-2
assert len(density_eigen) == 2 and len(density_eigen[0]) == 30
direction = torch.cat([p.flatten() for p in top_vectors[0]])
assert abs(direction.norm().item() - 1) < 1e-4
density, grids = density_plot.density_generate(density_eigen, density_weight)
assert abs(density.sum() * (grids[1] - grids[0]) - 1) < 1e-6

# several batches, and a loader
batches = [(x, y) for i, (x, y) in enumerate(train_loader) if i < batch_num]
listed = hessian(model, criterion, dataloader=batches, cuda=False)
loaded = hessian(model, criterion, dataloader=train_loader, cuda=False)
a, b = listed.eigenvalues()[0][-1], loaded.eigenvalues()[0][-1]
print("Full dataset:", a, b)
assert abs(a - b) < 5e-3 * abs(a)

# layer by layer
comp = hessian(model, criterion, data=hessian_dataloader, cuda=False)
params, gradsH = comp.params, comp.gradsH
layers = []
for i in range(len(params)):
    comp.params = [params[i]]
    comp.gradsH = [gradsH[i]]
    eigenvalues, vectors = comp.eigenvalues(maxIter=50, tol=1e-2)
    assert vectors[0][0].shape == params[i].shape
    layers.append(eigenvalues[0])
print("Layers:", layers)
assert max(layers) <= top_eigenvalues[0] * 1.01

# a power iteration of one's own
comp.params, comp.gradsH = params, gradsH
v = normalization([torch.randn_like(p) for p in comp.params])
found = []
for _ in range(60):
    v = orthnormal(v, found)
    Hv = hessian_vector_product(comp.gradsH, comp.params, v)
    eigenvalue = group_product(Hv, v).cpu().item()
    v = normalization(Hv)
shifted = group_add([p.clone() for p in v], v, alpha=-1)
print("Power iteration:", eigenvalue)
assert abs(eigenvalue - top_eigenvalues[0]) < 0.02 * abs(top_eigenvalues[0])
assert group_product(shifted, shifted).item() == 0
assert group_product(comp.gradsH, comp.gradsH).item() > 0


# a product of one's own: batches are dicts, some samples are masked
class MaskedHessian(pyhessian.hessian):
    def __init__(self, model, criterion, dataloader, device):
        self.model = model.eval()
        self.criterion = criterion
        self.data = dataloader
        self.full_dataset = True
        self.device = device
        self.params = [p for p in model.parameters() if p.requires_grad]

    def dataloader_hv_product(self, v):
        num_data = 0
        THv = [torch.zeros(p.size()).to(self.device) for p in self.params]
        for batch in self.data:
            self.model.zero_grad()
            outputs = self.model(batch["x"].to(self.device))[batch["mask"]]
            loss = self.criterion(outputs, batch["y"].to(self.device)[batch["mask"]])
            loss.backward(create_graph=True)
            params, gradsH = get_params_grad(self.model)
            self.model.zero_grad()
            Hv = torch.autograd.grad(
                gradsH, params, grad_outputs=v, only_inputs=True, retain_graph=False
            )
            n = float(batch["mask"].sum())
            THv = [THv[i] + Hv[i] * n + 0.0 for i in range(len(Hv))]
            num_data += n
        THv = [t / float(num_data) for t in THv]
        return group_product(THv, v).cpu().item(), THv


everything = [{"x": x, "y": y, "mask": torch.ones(len(y), dtype=torch.bool)} for x, y in batches]
masked = MaskedHessian(model, criterion, everything, "cpu")
c = masked.eigenvalues()[0][0]
print("Masked:", c)
assert abs(a - c) < 5e-3 * abs(a)
assert len(masked.trace(maxIter=20, tol=0.5)) <= 20
assert len(masked.density(iter=5)[0][0]) == 5
print("done")
