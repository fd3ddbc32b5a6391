"""Answer the modules of a block from what they returned before, so that each runs only once.

A block is run up to every group of its layers in turn.  What was computed on the way to one group
is the same on the way to the next, apart from the layers that are quantized in between.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class _Output:
    """What a module returned in one of its calls."""

    value: Any
    versions: list[int]
    """Versions of its tensors, which tell whether the model has written into them since."""
    calls_within: Counter[str]
    """Calls of modules inside this one, which it does not make when it is answered."""

    def is_intact(self) -> bool:
        """Whether the tensors hold what the module returned."""
        return [tensor._version for tensor in _tensors(self.value)] == self.versions


class Replay:
    """Outputs of the modules of one block, by batch.

    Only modules with layers in them are answered: they take nearly all the time.  The output of a
    module is final, and kept, if no layer that is still to be replaced ran before it or in it.
    Outputs are kept as they are, without a copy; one that the model writes into later, as some do
    when they add to the residual stream, is computed again.

    Args:
        layers: names of the layers within the block.
        pending: those that are still to be replaced; `finish` removes them.
        limit: bytes of outputs that may be kept.  What exceeds them is computed again.
    """

    def __init__(self, layers: Iterable[str], *, pending: Iterable[str], limit: int) -> None:
        self.layers = list(layers)
        self.limit = limit
        self._pending = set(pending)
        self._kept: dict[int, dict[tuple[str, int], _Output]] = {}
        self._bytes: Counter[int] = Counter()

    def finish(self, layer: str) -> None:
        """Have the outputs of a layer, which was replaced just now, count as final."""
        self._pending.discard(layer)

    def forget(self, batch: int) -> None:
        """Drop the outputs of a batch."""
        self._kept.pop(batch, None)
        self._bytes.pop(batch, None)

    @contextmanager
    def answering(self, block: nn.Module, batch: int, watched: Collection[str]) -> Iterator[None]:
        """Have the modules of the block answered while it runs on a batch.

        Args:
            block: the block.
            batch: number of the batch.
            watched: names of modules whose calls are observed.  What contains one of them runs.
        """
        run = _Run(self, batch)
        before: list[tuple[nn.Module, Any]] = []
        try:
            for name, module in block.named_modules():
                if name and _contains(name, self.layers):
                    before.append((module, vars(module).get("forward")))
                    is_open = any(other.startswith(f"{name}.") for other in watched)
                    module.forward = run.answer(name, module.forward, keep=not is_open)
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def is_pending(self, name: str) -> bool:
        """Whether a module is, or contains, a layer that is still to be replaced."""
        return _contains(name, self._pending)

    def find(self, batch: int, name: str, call: int) -> _Output | None:
        """Return the output of a module in one of its calls, if it is kept and intact."""
        output = self._kept.get(batch, {}).get((name, call))
        return output if output is not None and output.is_intact() else None

    def keep(
        self, batch: int, name: str, call: int, output: _Output, *, before: Counter[str]
    ) -> None:
        """Keep an output, instead of those of the modules inside, if the limit allows it.

        Args:
            batch: number of the batch.
            name: name of the module.
            call: number of its call in the run.
            output: what it returned.
            before: calls of all modules before this one.
        """
        kept = self._kept.setdefault(batch, {})
        replaced = [(name, call)]
        for inner, count in output.calls_within.items():
            replaced += [(inner, before[inner] + number) for number in range(count)]
        for key in replaced:
            if key in kept:
                self._bytes[batch] -= _size(kept.pop(key).value)
        size = _size(output.value)
        if self._bytes.total() + size <= self.limit:
            kept[name, call] = output
            self._bytes[batch] += size


class _Run:
    """One run of a block, whose modules are answered where that is possible."""

    def __init__(self, replay: Replay, batch: int) -> None:
        self.replay = replay
        self.batch = batch
        self.calls: Counter[str] = Counter()
        self.is_final = True

    def answer(self, name: str, forward: Any, *, keep: bool) -> Any:
        """Return what takes the place of the forward of a module; see `Replay.answering`."""

        def answered(*args: Any, **kwargs: Any) -> Any:
            call = self.calls[name]
            self.calls[name] += 1
            known = self.replay.find(self.batch, name, call) if keep else None
            if known is not None:
                self.calls.update(known.calls_within)
                return known.value
            before = self.calls.copy()
            inputs = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
            value = forward(*args, **kwargs)
            self.is_final = self.is_final and not self.replay.is_pending(name)
            unchanged = all(tensor._version == version for tensor, version in inputs)
            if keep and self.is_final and unchanged:
                versions = [tensor._version for tensor in _tensors(value)]
                output = _Output(value, versions, self.calls - before)
                self.replay.keep(self.batch, name, call, output, before=before)
            return value

        return answered


def _contains(name: str, layers: Iterable[str]) -> bool:
    """Whether a module is one of some layers, or contains one."""
    return any(layer == name or layer.startswith(f"{name}.") for layer in layers)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _size(value: Any) -> int:
    """Return the bytes of the tensors in a structure."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
