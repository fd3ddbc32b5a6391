"""Answer the modules of a block from what they returned before, so that each runs only once.

A block is run up to every group of its layers in turn.  What was computed on the way to one group
is the same on the way to the next, apart from the layers that are quantized in between.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from watersic_hf.streams.outputs import KeptOutput, OutputStore, tensors_in

#: Stands for the attention among the names of modules.
_ATTENTION = "scaled_dot_product_attention"


class _Answer(NamedTuple):
    """What a module is answered with in one of its calls."""

    output: KeptOutput
    """What it returned."""
    calls_within: Counter[str]
    """Calls of modules inside this one, which it does not make when it is answered."""


class Replay:
    """Outputs of the modules of one block, by batch.

    Only modules with layers in them and torch's attention are answered: they take nearly all the
    time.  An output is final, and kept, if no layer that is still to be replaced ran before it or
    in it.  What the store has no place for is computed again, and so is an output in memory that
    the model writes into later, as some do when they add to the residual stream.

    Args:
        layers: names of the layers within the block.
        pending: those that are still to be replaced; `finish` removes them.
        store: keeps the outputs.
    """

    def __init__(
        self, layers: Iterable[str], *, pending: Iterable[str], store: OutputStore
    ) -> None:
        self.layers = list(layers)
        self._store = store
        self._pending = set(pending)
        self._kept: dict[int, dict[tuple[str, int], _Answer]] = {}

    def finish(self, layer: str) -> None:
        """Have the outputs of a layer, which was replaced just now, count as final."""
        self._pending.discard(layer)

    def forget(self, batch: int) -> None:
        """Drop the outputs of a batch."""
        for answer in self._kept.pop(batch, {}).values():
            answer.output.drop()

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
            with _Attention(run.answer(_ATTENTION, F.scaled_dot_product_attention, keep=True)):
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

    def find(self, batch: int, name: str, call: int) -> tuple[Any, Counter[str]] | None:
        """Return what a module returned in one of its calls, and its calls within, if known."""
        answer = self._kept.get(batch, {}).get((name, call))
        value = None if answer is None else answer.output.read()
        return None if value is None else (value, answer.calls_within)

    def keep(
        self, batch: int, name: str, value: Any, *, before: Counter[str], after: Counter[str]
    ) -> None:
        """Keep an output, instead of those of the modules inside, if there is place for it.

        Args:
            batch: number of the batch.
            name: name of the module.
            value: what it returned.
            before: calls of all modules before it returned, without its own.
            after: the same, with its own and those inside.
        """
        kept = self._kept.setdefault(batch, {})
        within = after - before
        for inner, count in within.items():
            for number in range(count):
                answer = kept.pop((inner, before[inner] + number), None)
                if answer is not None:
                    answer.output.drop()
        output = self._store.keep(value)
        if output is not None:
            within[name] -= 1
            kept[name, before[name]] = _Answer(output, +within)


class _Run:
    """One run of a block, whose modules are answered where that is possible."""

    def __init__(self, replay: Replay, batch: int) -> None:
        self.replay = replay
        self.batch = batch
        self.calls: Counter[str] = Counter()
        self.is_final = True

    def answer(self, name: str, forward: Callable, *, keep: bool) -> Callable:
        """Return what takes the place of the forward of a module; see `Replay.answering`."""

        def answered(*args: Any, **kwargs: Any) -> Any:
            call = self.calls[name]
            known = self.replay.find(self.batch, name, call) if keep else None
            if known is not None:
                value, within = known
                self.calls[name] += 1
                self.calls.update(within)
                return value
            before = self.calls.copy()
            self.calls[name] += 1
            inputs = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
            value = forward(*args, **kwargs)
            self.is_final = self.is_final and not self.replay.is_pending(name)
            unchanged = all(tensor._version == version for tensor, version in inputs)
            if keep and self.is_final and unchanged:
                self.replay.keep(self.batch, name, value, before=before, after=self.calls)
            return value

        return answered


class _Attention(TorchFunctionMode):
    """Has another function called in place of torch's attention."""

    def __init__(self, attention: Callable) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        func = self._attention if func is F.scaled_dot_product_attention else func
        return func(*args, **(kwargs or {}))


def _contains(name: str, layers: Iterable[str]) -> bool:
    """Whether a module is one of some layers, or contains one."""
    return any(layer == name or layer.startswith(f"{name}.") for layer in layers)
