"""The state of PyTorch and of the user's modules that a product needs, and how it is restored.

A Hessian-vector product differentiates twice, which PyTorch does not support in every state: fused
attention kernels have no second derivative, hooks change gradients, batch normalisation writes its
running statistics. This room sets what a product needs and puts everything back afterwards, even
after an interrupt. It knows nothing of losses and data.

Entry points, one per module:

* ``scopes``: changes that are undone at the end of a ``with`` block, after Ctrl-C at any line, too.
* ``lock``: the lock of the process; products of several threads run one after another.
* ``product_state``: everything that a product needs, in one scope.
* ``module_state``: buffers, parameters and training flags of modules, kept and restored.
* ``random_state``: random generators, seeded and restored.
* ``gradient_hooks``: the user's hooks on gradients, suspended while a product is computed.
* ``patches``: functions of torch, replaced by those of ``layer_rewrites`` (faster second
  derivatives, which use ``convolution``) and of ``workarounds`` (missing or wrong ones).
* ``changes``: what changed since the last product; built on ``reachable`` and ``snapshot``.
"""
