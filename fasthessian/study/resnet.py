"""CIFAR residual networks (He et al. 2015, section 4.2) whose parts can be left out."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn import functional as F

from fasthessian.errors import InputError

STAGES = (1, 2, 3)


class Block(nn.Module):
    """Two 3x3 convolutions; with ``residual`` the input is added before the last activation.

    If the shape changes, the shortcut is a strided 1x1 convolution (option B of the paper).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, batch_norm: bool, residual: bool):
        """Make the layers, with an identity in place of a batch normalisation that is left out."""
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = norm(outputs, batch_norm)
        self.conv2 = conv3x3(outputs, outputs, 1)
        self.bn2 = norm(outputs, batch_norm)
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if residual and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs, batch_norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.residual:
            y = y + self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Stem, three stages of blocks at widths w, 2w, 4w, average pooling, one linear layer."""

    def __init__(
        self,
        blocks: int,
        width: int,
        num_classes: int,
        bn_stages: Collection[int],
        res_stages: Collection[int],
        *,
        stem_norm: bool,
    ):
        """Make the network; ``bn_stages`` and ``res_stages`` list the stages with that part."""
        super().__init__()
        self.stem = conv3x3(3, width, 1)
        self.stem_bn = norm(width, stem_norm)
        inputs = width
        stages = []
        for stage in STAGES:
            outputs = width * 2 ** (stage - 1)
            rows = []
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                rows.append(
                    Block(
                        inputs,
                        outputs,
                        stride,
                        batch_norm=stage in bn_stages,
                        residual=stage in res_stages,
                    )
                )
                inputs = outputs
            stages.append(nn.Sequential(*rows))
        self.stage1, self.stage2, self.stage3 = stages
        self.head = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, h, w) -> logits (N, num_classes)."""
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """A padded 3x3 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def norm(channels: int, batch_norm: bool) -> nn.Module:
    """Batch normalisation, or nothing."""
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


def resnet(
    depth: int = 20,
    *,
    batch_norm: bool = True,
    residual: bool = True,
    no_bn_stages: Collection[int] = (),
    no_res_stages: Collection[int] = (),
    num_classes: int = 10,
    width: int = 16,
) -> ResNet:
    """A ResNet for 32x32 images, of depth 6 m + 2, as PyHessian's experiments use it.

    Torch's global generator draws the weights: call ``torch.manual_seed`` first to repeat them.

    Args:
        depth: 8, 14, 20, 26, 32, ...; depth 20 has 272,474 parameters in 65 tensors.
        batch_norm: False leaves out every batch normalisation.
        residual: False leaves out every shortcut.
        no_bn_stages: stages among 1, 2, 3 without batch normalisation (the stem keeps its own).
        no_res_stages: stages among 1, 2, 3 without shortcuts.
        num_classes: length of the logits.
        width: channels of the first stage.

    Raises:
        ValueError: the depth is not 6 m + 2, a stage does not exist, or a size is below 1.

    Example:
        >>> sum(p.numel() for p in resnet(20).parameters())
        272474
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
        raise InputError(f"depth={depth!r} is not 6 m + 2; use 8, 14, 20, 26, 32, 38, 44, 56, ...")
    for name, size in (("num_classes", num_classes), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name}={size!r} is not a positive integer")
    bn_stages = [s for s in STAGES if s not in valid_stages("no_bn_stages", no_bn_stages)]
    res_stages = [s for s in STAGES if s not in valid_stages("no_res_stages", no_res_stages)]
    return ResNet(
        (depth - 2) // 6,
        width,
        num_classes,
        bn_stages if batch_norm else (),
        res_stages if residual else (),
        stem_norm=batch_norm,
    )


def valid_stages(name: str, stages: Collection[int]) -> set[int]:
    """The stages as a set, or a ValueError that names the argument."""
    if not isinstance(stages, Collection) or not set(stages) <= set(STAGES):
        raise InputError(f"{name}={stages!r} is not a collection of stages among 1, 2, 3")
    return set(stages)
