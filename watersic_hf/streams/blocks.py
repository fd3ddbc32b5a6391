"""Where the weights of a block are before, during and after its turn."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from watersic_hf.streams.memory import free_memory
from watersic_hf.streams.processes import rank_and_size

#: Fraction of the free memory that outputs of a block may take.
SPARE_FRACTION = 0.25


class ResidentBlocks:
    """Source of blocks for a model that is completely in memory.

    Code that works on one block, here or anywhere in the calibration, does so within `hold`; code
    that runs the model as a whole does so within `flow`.  In other sources, blocks can be without
    weights at any other time.

    Args:
        device: device of a block while it is held; default: the one that it is on.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device

    @contextmanager
    def hold(self, name: str, block: nn.Module) -> Iterator[None]:
        """Have the weights of a block on the device that computes with them.

        Args:
            name: name of the block in the model.
            block: the block.
        """
        home = next(block.parameters()).device
        block.to(self.device or home)
        try:
            yield
        finally:
            block.to(home)

    def spare_memory(self, block: nn.Module) -> int:
        """Return the bytes that outputs of a block that is held may take on its device."""
        device = next(block.parameters()).device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
        else:
            free = free_memory()
        _, processes = rank_and_size()
        return int(SPARE_FRACTION * free / processes)

    def stored(self, name: str, block: nn.Module) -> dict[str, Tensor]:
        """Return the tensors to store of a finished block, by name within it, while it is held."""
        return block.state_dict()

    @contextmanager
    def flow(self) -> Iterator[None]:
        """Have the weights of every block while the block runs as part of its model."""
        yield


#: Source of the blocks of a model that is in memory, each on its own device.
RESIDENT = ResidentBlocks()


def copy_sharing_weights(block: nn.Module) -> nn.Module:
    """Copy a block, so that modules can be replaced in it, without copying its weights.

    The weights are those of the original block: they take no additional memory, and must not be
    modified in place.
    """
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in block.parameters()}
    return copy.deepcopy(block, shared)
