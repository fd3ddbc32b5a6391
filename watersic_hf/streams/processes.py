"""Several processes at work on one model: who does what, and how they come together.

They are those of torch.distributed's default group, if there is one; otherwise there is one
process, and nothing here does anything.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


#: How long a process waits for the others; one may have a large layer to itself.
_PATIENCE = timedelta(days=7)


@contextmanager
def joined() -> Iterator[None]:
    """Have the processes that `torchrun` or `accelerate launch` started in one group."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    yield
    # not after an error: the others would have to come here too, and the launcher ends them
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and of how many."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(items: Sequence[T]) -> list[T]:
    """What of some items is this process's to do."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def add_up(total: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(total)


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of values over all processes."""
    if rank_and_size()[1] == 1:
        return values.mean()
    total = torch.stack(
        [values.sum(dtype=torch.float64), values.new_tensor(values.numel()).double()]
    )
    add_up(total)
    return (total[0] / total[1]).to(values.dtype)


def gather(value: T) -> list[T]:
    """What every process has for `value`, in their order."""
    _, size = rank_and_size()
    found: list[Any] = [value] * size
    if size > 1:
        dist.all_gather_object(found, value)
    return found


def wait() -> None:
    """Go on when all processes are here."""
    gather(None)
