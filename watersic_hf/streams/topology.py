"""Where the layers of a model are: its blocks, and the layers of a block that share an input.

Read from the modules and from the data that flows through them; no table of architectures.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.streams.attention import AttentionWatch

Stack = list[tuple[str, nn.Module]]
"""Repeated blocks, in order, with their names."""


def block_stacks(model: nn.Module, layers: Iterable[str]) -> list[Stack]:
    """The stacks of repeated blocks that hold layers: one, or an encoder's and a decoder's.

    They are the outermost `nn.ModuleList` modules that do.

    Raises:
        ValueError: no list of modules holds any of the layers.
    """
    layers = list(layers)
    stacks: dict[str, Stack] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in stacks)
        held = any(layer.startswith(f"{name}.") for layer in layers)
        if isinstance(module, nn.ModuleList) and outermost and held:
            stacks[name] = [(f"{name}.{i}", block) for i, block in enumerate(module)]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__}: no list of blocks holds any of the {len(layers)} linear "
            f"layers to quantize, so the model cannot be calibrated block by block. Quantize it "
            f"without `dataset`."
        )
    return list(stacks.values())


def decoder_blocks(model: nn.Module, layers: Iterable[str]) -> Stack:
    """The blocks of the stack that holds most of `layers`; see `block_stacks`."""
    layers = list(layers)
    return max(block_stacks(model, layers), key=lambda stack: len(inside(stack, layers)))


def inside(stack: Stack, layers: Iterable[str]) -> list[str]:
    """Those of `layers` that are in the blocks of a stack."""
    prefixes = tuple(f"{name}." for name, _ in stack)
    return [layer for layer in layers if layer.startswith(prefixes)]


@dataclass(frozen=True)
class InputGroup:
    """Layers of one block that are applied to the same tensor, as q, k and v are."""

    layers: tuple[str, ...]
    """Names within the block, in the order in which they are called."""

    calls: int
    """How often the first of them is called in one forward of the block."""

    residual: str | None = None
    """Where the residual stream is that the output of the group's only layer is added to: the name
    of the module in the block that has it as its input, "" for the input of the block itself; None
    if the output is not simply added to it, as where a norm follows the layer."""

    beside: str | None = None
    """The layer, called before, whose output is added to the residual stream in one sum with that
    of this one, where attention and MLP run side by side."""

    feeds_attention: bool = False
    """Whether the layers are called before the block's attention, as q, k and v are."""


def input_groups(
    block: nn.Module, layers: Iterable[str], run: Callable[[], Tensor], hidden: Tensor
) -> list[InputGroup]:
    """Group a block's layers by the tensor that they are applied to, in the order of use.

    Args:
        block: the block.
        layers: names within the block of the layers to group.
        run: runs the block once, on `hidden`, and returns its output.
        hidden: the hidden states that `run` puts into the block.

    Returns:
        The groups.  Layers that `run` does not reach are in none of them.
    """
    trace = _Trace(block, frozenset(layers), hidden)
    trace.record(run)
    calls = [name for name, _ in trace.calls]
    groups: list[tuple[Tensor, bool, list[str]]] = []
    for name, tensor in trace.calls:
        if any(name in names for *_, names in groups):
            continue
        feeds = name in calls[: trace.before_attention]
        for shared, feeding, names in groups:
            if shared is tensor and feeding == feeds:
                names.append(name)
                break
        else:
            groups.append((tensor, feeds, [name]))
    alone = [names[0] for *_, names in groups if len(names) == calls.count(names[0]) == 1]
    writers = trace.writers(alone)
    return [
        InputGroup(tuple(names), calls.count(names[0]), *writers.get(names[0], (None, None)), feeds)
        for _, feeds, names in groups
    ]


class _Trace:
    """What happens in a block in one run."""

    def __init__(self, block: nn.Module, layers: Collection[str], hidden: Tensor) -> None:
        self.block = block
        self.layers = layers
        self.calls: list[tuple[str, Tensor]] = []
        """Calls of the layers, each with its input."""
        self.before_attention = 0
        """How many of them come before the attention."""
        self.attentions = 0
        self.outputs: dict[str, Tensor] = {}
        """What layers put out that may write to the residual stream."""
        self.states: dict[str, Tensor] = {"": hidden}
        """Inputs of all modules, which may be states of the residual stream."""
        self.earlier: dict[str, int] = {}
        """How many of them were there when a layer was called."""

    def record(self, run: Callable[[], Tensor]) -> None:
        handles = []
        for name, module in self.block.named_modules():
            if name:
                before = functools.partial(self._module, name)
                handles.append(module.register_forward_pre_hook(before))
            if name in self.layers:
                handles.append(module.register_forward_hook(functools.partial(self._layer, name)))
        try:
            with AttentionWatch(self._attention):
                self.result = run()
        finally:
            for handle in handles:
                handle.remove()

    def writers(self, layers: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """The layers that write to the residual stream.

        Returns:
            By layer, the state that its output is added to, and the layer whose output is added to
            it in the same sum, if there is one.
        """
        layers = [layer for layer in layers if layer in self.outputs]
        found: dict[str, tuple[str, str | None]] = {}
        for layer in layers:
            state = self._base(layer)
            if state is not None:
                found[layer] = (state, None)
        left = [layer for layer in layers if layer not in found]
        for first, second in itertools.combinations(left, 2):
            state = self._base(second, beside=first)
            if state is not None:
                found[second] = (state, first)
        return found

    def _base(self, layer: str, *, beside: str | None = None) -> str | None:
        """The state that, with the layer's output added, is another state or the block's result.

        Judged by the numbers, which the same sum gives bit for bit; of two outputs in any order.
        """
        y = self.outputs[layer]
        known = [s for s in (*self.states.values(), self.result) if s.numel() == y.numel()]
        for name, state in itertools.islice(self.states.items(), self.earlier[layer]):
            if state.numel() != y.numel() or state.shape[-1] != y.shape[-1]:
                continue
            x, y = state.to(y.device), y.reshape(state.shape)
            totals = [x + y]
            if beside is not None:
                other = self.outputs[beside].reshape(state.shape)
                totals = [(x + y) + other, (x + other) + y, x + (y + other)]
            for total in totals:
                if any(torch.equal(total, other.reshape(total.shape)) for other in known):
                    return name
        return None

    def _layer(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.calls.append((name, args[0]))
        self.earlier[name] = len(self.states)
        if output.shape[-1] == self.states[""].shape[-1]:
            # it may be added to in place
            self.outputs[name] = output.clone()

    def _module(self, name: str, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            self.states[name] = args[0]

    def _attention(self) -> None:
        self.attentions += 1
        # which layers feed which of several cannot be told: self and cross attention, for one
        self.before_attention = len(self.calls) if self.attentions == 1 else 0
