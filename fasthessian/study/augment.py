"""Random crops and mirror images for training, drawn for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(
    x: Tensor, generator: torch.Generator, *, padding: int = 4, flip: bool = True
) -> Tensor:
    """Crop each image at random from its padded copy, and mirror every second one at random.

    The augmentation of He et al. 2015, section 4.2. Zeros are padded, which is the mean colour of
    normalised images.

    Args:
        x: images (N, channels, h, w).
        generator: on the CPU; the same state gives the same bits.
        padding: pixels on each side, so that an image moves by at most this many.
        flip: whether to mirror left and right, with probability 1/2 for each image.

    Returns:
        New images (N, channels, h, w).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> crop_and_flip(torch.ones(2, 3, 8, 8), generator, padding=0).sum()
        tensor(384.)
    """
    count, channels, height, width = x.shape
    # one draw of each for all images, also without flips: the state does not depend on the option
    down, right = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator).bool()
    rows = down + torch.arange(height)
    columns = torch.arange(width).expand(count, -1)
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = right + columns
    image = torch.arange(count).reshape(-1, 1, 1, 1)
    channel = torch.arange(channels).reshape(-1, 1, 1)
    index = image, channel, rows[:, None, :, None], columns[:, None, None, :]
    return F.pad(x, (padding,) * 4)[tuple(part.to(x.device) for part in index)]
