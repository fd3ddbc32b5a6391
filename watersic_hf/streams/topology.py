"""Structure of a model: its blocks, and how the layers of a block are connected.

Layers are grouped by the input that they share, and those that write to the residual stream are
identified.  All of it is read from the modules and from the data that flows through them, not from
a list of architectures.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.streams.attention import AttentionObserver

Stack = list[tuple[str, nn.Module]]
"""Repeated blocks of a model with their full names, in order."""


def block_stacks(model: nn.Module, layers: Iterable[str]) -> list[Stack]:
    """Return the stacks of repeated blocks that contain layers, such as an encoder and a decoder.

    They are the outermost `nn.ModuleList` modules with any of them inside of their modules.  A list
    of layers, such as projections beside the blocks, is no stack.

    Args:
        model: the model.
        layers: full names of the layers.

    Raises:
        ValueError: no list of modules contains any of the layers.
    """
    layers = list(layers)
    stacks: dict[str, Stack] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and outermost:
            stack = [(f"{name}.{i}", block) for i, block in enumerate(module)]
            if layers_of_blocks(stack, layers):
                stacks[name] = stack
    if not stacks:
        raise ValueError(
            f"{type(model).__name__}: no list of blocks holds any of the {len(layers)} linear "
            f"layers to quantize, so the model cannot be calibrated block by block. Quantize it "
            f"without `dataset`."
        )
    return list(stacks.values())


def decoder_blocks(model: nn.Module, layers: Iterable[str]) -> Stack:
    """Return the blocks of the stack with the most of `layers`; see `block_stacks`."""
    layers = list(layers)
    return max(block_stacks(model, layers), key=lambda stack: len(layers_of_blocks(stack, layers)))


def layers_of_blocks(stack: Stack, layers: Iterable[str]) -> list[str]:
    """Return those of `layers` that are in the blocks of a stack."""
    prefixes = tuple(f"{name}." for name, _ in stack)
    return [layer for layer in layers if layer.startswith(prefixes)]


@dataclass(frozen=True)
class InputGroup:
    """Layers of one block that are applied to the same tensor, as q, k and v are."""

    layers: tuple[str, ...]
    """Names within the block, in the order in which they are called."""

    calls: int
    """Number of calls of the first of them in one forward pass of the block."""

    residual: str | None = None
    """The state of the residual stream that the output of the group's only layer is added to: the
    name of the module in the block whose input it is, or "" for the input of the block itself.
    None if the output is not simply added to it, for example because a norm follows the layer."""

    parallel_layer: str | None = None
    """Name of a layer, called earlier, whose output is added to the residual stream in the same sum
    as the output of this one, as in blocks that run attention and MLP in parallel."""

    feeds_attention: bool = False
    """Whether the layers are called before the attention of the block, as q, k and v are."""


def input_groups(
    block: nn.Module, layers: Iterable[str], run: Callable[[], Tensor], hidden: Tensor
) -> list[InputGroup]:
    """Group the layers of a block by the tensor that they are applied to, in the order of use.

    Args:
        block: the block.
        layers: names of the layers within the block.
        run: runs the block once, on `hidden`, and returns its output.
        hidden: the hidden states that `run` passes to the block.

    Returns:
        The groups.  Layers that `run` does not reach are not part of any.
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
    """Calls of layers, and states of the residual stream, in one run of a block."""

    def __init__(self, block: nn.Module, layers: Collection[str], hidden: Tensor) -> None:
        self.block = block
        self.layers = layers
        self.calls: list[tuple[str, Tensor]] = []
        """Calls of the layers: name and input of each."""
        self.before_attention = 0
        """Number of these calls before the attention; 0 if there are several attentions."""
        self.attentions = 0
        """Number of calls of an attention."""
        self.outputs: dict[str, Tensor] = {}
        """Outputs of layers that may write to the residual stream, by layer."""
        self.states: dict[str, Tensor] = {"": hidden}
        """Inputs of all modules, which may be states of the residual stream, by module."""
        self.earlier: dict[str, int] = {}
        """Number of these states known when a layer was called, by layer."""

    def record(self, run: Callable[[], Tensor]) -> None:
        """Run the block once with hooks on all of its modules."""
        handles = []
        for name, module in self.block.named_modules():
            if name:
                before = functools.partial(self._record_input, name)
                handles.append(module.register_forward_pre_hook(before))
            if name in self.layers:
                after = functools.partial(self._record_call, name)
                handles.append(module.register_forward_hook(after))
        try:
            with AttentionObserver(self._count_attention):
                self.result = run()
        finally:
            for handle in handles:
                handle.remove()

    def writers(self, layers: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """Find the layers that write to the residual stream.

        Returns:
            By layer, the state that its output is added to, and the parallel layer whose output is
            added to it in the same sum, if there is one.
        """
        layers = [layer for layer in layers if layer in self.outputs]
        found: dict[str, tuple[str, str | None]] = {}
        for layer in layers:
            state = self._base(layer)
            if state is not None:
                found[layer] = (state, None)
        others = [layer for layer in layers if layer not in found]
        for first, second in itertools.combinations(others, 2):
            state = self._base(second, parallel=first)
            if state is not None:
                found[second] = (state, first)
        return found

    def _base(self, layer: str, *, parallel: str | None = None) -> str | None:
        """Return the name of the state that a layer writes to, or None if there is none.

        Adding the output of the layer to that state gives another state, or the output of the
        block, bit for bit.  With a parallel layer, both outputs are added, in any order.
        """
        y = self.outputs[layer]
        sums = [s for s in (*self.states.values(), self.result) if s.numel() == y.numel()]
        for name, state in itertools.islice(self.states.items(), self.earlier[layer]):
            if state.numel() != y.numel() or state.shape[-1] != y.shape[-1]:
                continue
            x, y = state.to(y.device), y.reshape(state.shape)
            totals = [x + y]
            if parallel is not None:
                other = self.outputs[parallel].reshape(state.shape)
                totals = [(x + y) + other, (x + other) + y, x + (y + other)]
            for total in totals:
                if any(torch.equal(total, known.reshape(total.shape)) for known in sums):
                    return name
        return None

    def _record_call(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.calls.append((name, args[0]))
        self.earlier[name] = len(self.states)
        if output.shape[-1] == self.states[""].shape[-1]:
            # a copy, as the model may add to the output in place
            self.outputs[name] = output.clone()

    def _record_input(self, name: str, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            self.states[name] = args[0]

    def _count_attention(self) -> None:
        self.attentions += 1
        # with several, as self- and cross-attention, it is unknown which layers feed which of them
        self.before_attention = len(self.calls) if self.attentions == 1 else 0
