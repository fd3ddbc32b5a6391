"""Several processes that quantize one model together: shards of the work, and collectives.

The processes are those of the default group of torch.distributed.  Without such a group there is
one process, and the collectives do nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


#: Longest time that a process waits for the others: one of them may have a large layer to itself.
_TIMEOUT = timedelta(days=7)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` or `accelerate launch` started into the default group."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    yield
    # not after an error: the others would have to come here too, and the launcher ends them
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(items: Sequence[T]) -> list[T]:
    """Return the items that this process is to work on: every `size`-th, beginning at its rank."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def shard_by_cost(items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """Return the items that this process is to work on, so that all finish at about the same time.

    The most expensive item that is left goes to the process with the least work so far.

    Args:
        items: the same items in all processes.
        cost: function that returns the work of an item, the same in all processes.
    """
    rank, size = rank_and_size()
    costs = [cost(item) for item in items]
    work, owners = [0.0] * size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = work.index(min(work))
        work[owners[number]] += costs[number]
    return [item for item, owner in zip(items, owners, strict=True) if owner == rank]


def all_reduce_sum(total: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(total)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean of the values of all processes, which may have different numbers of them."""
    if rank_and_size()[1] == 1:
        return values.mean()
    total = torch.stack(
        [values.sum(dtype=torch.float64), values.new_tensor(values.numel()).double()]
    )
    all_reduce_sum(total)
    return (total[0] / total[1]).to(values.dtype)


def gather(value: T) -> list[T]:
    """Return `value` of every process, by rank, in all processes."""
    _, size = rank_and_size()
    found: list[Any] = [value] * size
    if size > 1:
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait until all processes have called this."""
    gather(None)
