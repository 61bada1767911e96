"""Flat vectors as lists of tensors, the form that the other libraries take."""


def split(v, params):
    """The pieces of a flat vector, each of the shape of its parameter."""
    return [a.view_as(p) for a, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
