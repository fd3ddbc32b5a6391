"""Where the layers of a model are: its blocks, and the layers of a block that share an input.

Read from the modules and from the data that flows through them; no table of architectures.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.calibration.attention import AttentionWatch

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
    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in trace.calls:
        if any(name in names for _, names in groups):
            continue
        for shared, names in groups:
            if shared is tensor:
                names.append(name)
                break
        else:
            groups.append((tensor, [name]))
    calls = [name for name, _ in trace.calls]
    return [
        InputGroup(
            layers=tuple(names),
            calls=calls.count(names[0]),
            residual=trace.residual(names[0]) if len(names) == calls.count(names[0]) == 1 else None,
            feeds_attention=names[0] in calls[: trace.before_attention],
        )
        for _, names in groups
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
        self.states: dict[str, Tensor] = {"": hidden}
        """Inputs of all other modules, which may be states of the residual stream."""

    def record(self, run: Callable[[], Tensor]) -> None:
        handles = []
        for name, module in self.block.named_modules():
            if name in self.layers:
                handles.append(module.register_forward_hook(functools.partial(self._layer, name)))
            elif name:
                before = functools.partial(self._module, name)
                handles.append(module.register_forward_pre_hook(before))
        try:
            with AttentionWatch(self._attention):
                self.result = run()
        finally:
            for handle in handles:
                handle.remove()

    def residual(self, layer: str) -> str | None:
        """The state that, with the layer's output added, is another state or the block's result.

        Judged by the numbers, which the same sum gives bit for bit.
        """
        output = self.outputs[layer]
        known = [s for s in (*self.states.values(), self.result) if s.numel() == output.numel()]
        for name, state in self.states.items():
            if state.numel() != output.numel() or state.shape[-1] != output.shape[-1]:
                continue
            total = state.to(output.device) + output.reshape(state.shape)
            if any(torch.equal(total, other.reshape(total.shape)) for other in known):
                return name
        return None

    def _layer(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.calls.append((name, args[0]))
        self.outputs[name] = output

    def _module(self, name: str, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            self.states[name] = args[0]

    def _attention(self) -> None:
        self.attentions += 1
        # which layers feed which of several cannot be told: self and cross attention, for one
        self.before_attention = len(self.calls) if self.attentions == 1 else 0
