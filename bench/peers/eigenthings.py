"""hessian-eigenthings: its Hessian product, its density, its curvature of the loss."""

import torch


def preload():
    """Import the library now, so that no measurement of memory holds the import."""
    import hessian_eigenthings.loss_fns  # noqa: F401


def product(model, criterion, batch):
    """Double backward; the graph is built again for each product."""
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    loss = supervised_loss(criterion)
    return HessianOperator(model, [batch], loss, full_dataset=False).matvec


def density(model, criterion, data):
    """Its density as a function of the number of steps that returns the outermost nodes."""
    from hessian_eigenthings.algorithms import spectral_density
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    operator = HessianOperator(model=model, dataloader=[data], loss_fn=supervised_loss(criterion))

    def call(steps):
        found = spectral_density(operator, num_runs=1, lanczos_steps=steps, seed=0)
        nodes = found.raw_eigenvalues[0]
        return float(nodes.min()), float(nodes.max())

    return call


def logit_curvature(Z, U, y):
    """What GGNOperator._matvec_one_batch does between J and J', as a function without arguments."""
    from hessian_eigenthings.loss_fns import supervised_loss_of_output

    loss = supervised_loss_of_output(torch.nn.CrossEntropyLoss())

    def product():
        z = Z.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(loss(z, (None, y)), z, create_graph=True)
        return torch.autograd.grad(slopes, z, U)[0]

    return product
