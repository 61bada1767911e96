"""The libraries that fasthessian is compared with, one per module, as installed from PyPI.

A function ``product(model, criterion, batch)`` returns a function that maps a vector (n,) to H v,
flat or as a sequence of tensors, whichever the library returns.
"""
