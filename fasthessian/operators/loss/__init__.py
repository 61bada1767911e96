"""What is differentiated: the loss of a model over batches, or the loss of a closure.

Both are weighted sums of parts, and an operator adds up the products of the parts. This room knows
how to call a model and its criterion on a batch, how to read the data again at each product, and
how much each part weighs. It does not differentiate twice; that is the room ``products``.

Entry points:

* ``model_loss.ModelLoss`` and ``closure_loss.ClosureLoss``: the loss as parts.
* ``coupling.coupling``: whether a batch is the mean of its samples, so that it may be cut.
* ``likelihood``: which cross-entropy or other likelihood a criterion is, for Fisher matrices.

They use ``batches`` (one batch in all its forms), ``sources`` (memory or a loader), ``calls`` (how
model and criterion are called), ``criteria`` (the options of a criterion) and ``model_checks``
(models that are refused). ``terms`` explains how the terms of a loss are counted; ``counting``,
``denominators`` and ``halving`` do that.
"""
