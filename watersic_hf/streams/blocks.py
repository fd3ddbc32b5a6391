"""Where blocks come from when it is their turn, and where they go after it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ResidentBlocks:
    """The blocks of a model that is in memory as a whole.

    Whoever works on a block, here or anywhere in the calibration, holds it meanwhile; whoever runs
    the model as a whole lets the blocks flow.  Another source may have no weights in the blocks
    otherwise.

    Args:
        device: where a block is while it is held; default: it stays where it is.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device

    @contextmanager
    def hold(self, name: str, block: nn.Module) -> Iterator[None]:
        """Have the weights of a block, called `name` in the model, where they are computed with."""
        home = next(block.parameters()).device
        block.to(self.device or home)
        try:
            yield
        finally:
            block.to(home)

    def stored(self, name: str, block: nn.Module) -> dict[str, Tensor]:
        """What is stored of a block that is finished, while it is held, by name within it."""
        return block.state_dict()

    @contextmanager
    def flow(self) -> Iterator[None]:
        """Have every block's weights while the block runs in its model."""
        yield


RESIDENT = ResidentBlocks()


def twin(block: nn.Module) -> nn.Module:
    """A copy of a block on the same weights, in which other modules can be put.

    The weights take no memory a second time, so nobody may write into them.
    """
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in block.parameters()}
    return copy.deepcopy(block, shared)
