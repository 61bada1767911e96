"""Random generators of torch, NumPy and Python: seeded for a while, then restored."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import torch

from fasthessian.operators.torch_state.scopes import UndoLog, scope


@scope
def seeded(undo: UndoLog, seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Seed the global generators of torch, NumPy and Python, and the given ``generators``."""
    # torch.manual_seed would queue a seed for a CUDA context that does not exist yet
    own = [torch.default_generator, *generators]
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        own += torch.cuda.default_generators
    for generator in own:
        undo(generator.set_state, generator.get_state())
        generator.manual_seed(seed)
    undo(random.setstate, random.getstate())
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy:
        undo(numpy.random.set_state, numpy.random.get_state())
        numpy.random.seed(seed)
