"""Numbers that the paper states, to stand beside those of a study.

Yao, Gholami, Keutzer, Mahoney: "PyHessian: Neural Networks Through the Lens of the Hessian"
(arXiv 1912.07145): all 50,000 training images, 180 epochs, the best of several learning rates, one
training per network, the model in eval mode. Tables I, II and III are for CIFAR-10; they have their
first row in common. The same tables for CIFAR-100 are in its appendix, A.5 to A.7; their values are
not available here, which ``None`` stands for. The traces are those that its text names. All
numbers are quoted from a summary of the paper that has the three tables in full.
"""

from __future__ import annotations

from fasthessian.study.networks import Network

DEPTHS = (20, 32, 38, 56)
UNTRAINABLE = "not trained"  # the paper: the network of this depth cannot be trained

# Test accuracy in percent on CIFAR-10, by variant, at DEPTHS.
_CIFAR10: dict[str, tuple[float | str, ...]] = {
    "resnet": (92.01, 92.05, 92.37, 93.59),  # Tables I, II, III
    "no-bn": (87.27, 66.57, 53.65, UNTRAINABLE),  # Table I
    "no-res": (90.66, 89.8, 88.92, 87.38),
    "no-bn-stage1": (91.28, 91.98, 92.20, 92.19),  # Table II
    "no-bn-stage2": (91.49, 91.94, 91.70, 92.20),
    "no-bn-stage3": (90.59, 88.57, 86.96, 73.77),
    "no-res-stage1": (91.52, 92.27, 91.74, 91.79),  # Table III
    "no-res-stage2": (91.06, 91.07, 91.08, 91.28),
    "no-res-stage3": (91.54, 92.09, 92.14, 92.34),
}
# Trace on CIFAR-10 at the end of training, to one digit, as the text to Figure 2 gives it.
_TRACES = {Network(32, "resnet"): 2e3, Network(32, "no-bn"): 1e4}


def accuracy(network: Network, data: str) -> float | str | None:
    """The paper's test accuracy in percent, UNTRAINABLE, or None if it is not available here.

    Args:
        network: depth and variant.
        data: name of the data; only "CIFAR-10" has numbers.

    Example:
        >>> accuracy(Network(20, "no-bn"), "CIFAR-10")
        87.27
    """
    if data != "CIFAR-10" or network.depth not in DEPTHS:
        return None
    return _CIFAR10[network.variant][DEPTHS.index(network.depth)]


def trace(network: Network, data: str) -> float | None:
    """The paper's trace at the end of training, to one digit, or None if its text has none.

    Example:
        >>> trace(Network(32), "CIFAR-10")
        2000.0
    """
    return _TRACES.get(network) if data == "CIFAR-10" else None
