"""Hooks: what flows into the blocks of a model, and into the layers of a block.

Shapes: B = windows in a batch, T = tokens, N = inputs of a layer.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError, MomentAccumulator, Moments
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.processes import add_up, shard
from watersic_hf.streams.topology import InputGroup, Stack, block_stacks

logger = logging.getLogger(__name__)


class _StopForwardError(Exception):
    """Raised by a hook once it has seen what it was there for."""


BlockArguments = list[tuple[tuple, dict]]
"""For every block, what it is called with besides its hidden states.  Blocks differ: layers with a
sliding window have a mask of their own."""


class States(Protocol):
    """Hidden states, one B x T x D tensor per batch: a list, or what is kept on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int) -> Tensor: ...

    def append(self, hidden: Tensor) -> object:
        """Add the hidden states of the next batch."""
        ...


@dataclass
class BlockStream:
    """The hidden states of this process's calibration windows at the input of the next block.

    One stream is one model's: the partly quantized one's, or the original's.
    """

    hidden: States

    arguments: list[BlockArguments] = field(repr=False)
    """One per batch, as they may depend on its tokens: a decoder's blocks are called with what the
    encoder put out."""

    def copy(self) -> "BlockStream":
        """A stream of its own from the same hidden states on."""
        return BlockStream(copy.copy(self.hidden), self.arguments)

    def run(
        self, index: int, block: nn.Module, batch: int, *, hidden: Tensor | None = None
    ) -> Tensor:
        """Output of `block`, the model's block number `index`, on one batch, where the block is.

        Args:
            index: of the block.
            block: the block.
            batch: number of the batch.
            hidden: what to put in; default: the hidden states of the batch.
        """
        hidden = self.hidden[batch] if hidden is None else hidden
        inputs = (hidden, *self.arguments[batch][index])
        hidden, args, kwargs = _moved(inputs, next(block.parameters()).device)
        return _split(block(hidden, *args, **kwargs))[0]

    def advance(self, index: int, block: nn.Module, *, into: States | None = None) -> None:
        """Push all batches through a block; what comes out takes their place, or goes `into`."""
        for batch in range(len(self.hidden)):
            hidden = self.hidden[batch]
            output = self.run(index, block, batch, hidden=hidden).to(hidden.device)
            if into is None:
                self.hidden[batch] = output
            else:
                into.append(output)
        self.hidden = self.hidden if into is None else into


@dataclass(frozen=True)
class RunnableStack:
    """A stack of blocks that can be run one by one."""

    blocks: Stack

    rest: tuple | None
    """What its last block puts out behind the hidden states; None if that is no tuple."""

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks without their names."""
        return [block for _, block in self.blocks]

    @contextlib.contextmanager
    def bypassed(self, hidden: Tensor) -> Iterator[None]:
        """Have a model go on behind these blocks with given hidden states."""

        def put_out(*args: Any, **kwargs: Any) -> Tensor | tuple:
            return hidden if self.rest is None else (hidden, *self.rest)

        for block in self.modules:
            block.forward = put_out
        try:
            yield
        finally:
            for block in self.modules:
                del block.forward


@dataclass(frozen=True)
class PassedStack:
    """A stack that need not run again, since what it puts out is known."""

    stack: RunnableStack

    hidden: States
    """What it puts out, for the batches of this process."""


@contextlib.contextmanager
def behind(passed: Sequence[PassedStack], batch: int, *, row: int | None = None) -> Iterator[None]:
    """Have a model go on behind the stacks that it has passed.

    Args:
        passed: the stacks.
        batch: the number of the batch that the model is called with.
        row: which of its windows, if it is one alone.
    """
    with contextlib.ExitStack() as bypassed:
        for part in passed:
            hidden = part.hidden[batch]
            if row is not None:
                hidden = hidden[row : row + 1]
            bypassed.enter_context(part.stack.bypassed(hidden))
        yield


@torch.no_grad()
def block_stream(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    windows: Sequence[Tensor],
    *,
    batch_size: int,
    source: ResidentBlocks = RESIDENT,
    hidden: States | None = None,
    passed: Sequence[PassedStack] = (),
) -> BlockStream:
    """Run the model up to its first block on the windows of this process.

    To learn each block's own arguments, the first two batches of every shape run through all
    blocks, and the others too unless the arguments of those two, and of the first block, are equal.

    Args:
        model: the model.
        blocks: its blocks.
        windows: 1-D token ids, of all processes.
        batch_size: windows in a batch.
        source: where blocks come from.
        hidden: what the hidden states are appended to; default: a new list.
        passed: the stacks before it that need not run.
    """
    seen: dict[tuple[int, ...], list[BlockArguments]] = {}
    stream = BlockStream([] if hidden is None else hidden, [])
    for batch, tokens_BT in enumerate(shard(to_batches(windows, batch_size))):
        known = seen.setdefault(tuple(tokens_BT.shape), [])
        by_shape = len(known) > 1 and known[0] is known[1]
        with behind(passed, batch):
            wanted = blocks[:1] if by_shape else blocks
            calls = block_calls(model, wanted, tokens_BT, source=source)
            arguments = _shared([c[1:] for c in calls], known[0][: len(calls)] if known else None)
            if by_shape and not _same(arguments[0], known[0][0]):
                calls = block_calls(model, blocks, tokens_BT, source=source)
                arguments = _shared([call[1:] for call in calls], known[0])
        stream.hidden.append(calls[0][0])
        # equal arguments are kept once: masks of long windows are large
        if known and all(map(_same, arguments, known[0])):
            arguments = known[0]
        known.append(arguments)
        stream.arguments.append(arguments)
    return stream


def _shared(value: Any, known: Any) -> Any:
    """`value`, in which every tensor that equals its counterpart in `known` is replaced by it."""
    if isinstance(value, Tensor):
        return known if isinstance(known, Tensor) and _equal(value, known) else value
    if type(value) in (tuple, list) and type(known) is type(value) and len(known) == len(value):
        return type(value)(map(_shared, value, known))
    if type(value) is dict and type(known) is dict:
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    return value


def _same(value: Any, known: Any) -> bool:
    """Whether two structures hold the very same tensors, and equal values."""
    if type(value) is not type(known):
        return False
    if type(value) in (tuple, list):
        return len(value) == len(known) and all(map(_same, value, known))
    if type(value) is dict:
        return value.keys() == known.keys() and all(_same(value[k], known[k]) for k in value)
    return value is known or (not isinstance(value, Tensor) and bool(value == known))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass(frozen=True)
class Side:
    """A model at one block: the hidden states that reach the block, and the block itself."""

    stream: BlockStream
    block: nn.Module


def group_moments(
    working: Side,
    index: int,
    group: InputGroup,
    *,
    name: str,
    original: Side | None = None,
    residual: bool = False,
    importance: Sequence[Tensor] | None = None,
) -> tuple[Moments, Moments | None]:
    """Second moments of the input of a group of layers, over all windows of all processes.

    Both blocks are run only as far as the group's input.

    Args:
        working: the partly quantized model.
        index: of the block in the model.
        group: the layers.
        name: of the block, for messages.
        original: the model before quantization; with it the moments are those of both streams.
        residual: also collect S_R, the error of the residual stream that the group writes to
            (`InputGroup.residual`) times its input; needs `original`.
        importance: weight of every token, by batch, B x T.

    Returns:
        The moments, and those weighted by `importance` if it is given.

    Raises:
        CalibrationError: the inputs are not finite; the message names the layer.
    """
    layer = working.block.get_submodule(group.layers[0])
    residual = residual and group.residual is not None

    def accumulator() -> MomentAccumulator:
        return MomentAccumulator(
            layer.in_features,
            drift=original is not None,
            rows_of_residual=layer.out_features if residual else None,
            device=next(working.block.parameters()).device,
        )

    plain, weighted = accumulator(), None if importance is None else accumulator()
    try:
        for batch in range(len(working.stream.hidden)):
            seen = _record(working, index, group, batch)
            first = None if original is None else _record(original, index, group, batch)
            x, drifted = (seen, None) if first is None else (first, seen)
            error = None
            if residual:
                error = first.residual.float() - seen.residual.float()
            for call, x_TN in enumerate(x.inputs):
                streams = (x_TN, None if drifted is None else drifted.inputs[call])
                plain.add(*streams, residual_TA=error)
                if weighted is not None:
                    weight_T = importance[batch].to(x_TN.device)
                    weighted.add(*streams, residual_TA=error, weight_T=weight_T)
    except CalibrationError as error:
        raise CalibrationError(f"{name}.{group.layers[0]}: {error}") from error
    for sums in (plain, weighted):
        if sums is not None:
            sums.combine(add_up)
    return plain.result(), None if weighted is None else weighted.result()


def group_inputs(side: Side, index: int, group: InputGroup, batch: int) -> list[Tensor]:
    """The inputs of a group in one batch, a tensor for every call."""
    return _record(side, index, group, batch).inputs


def module_arguments(side: Side, index: int, name: str) -> list[tuple]:
    """What a module of a block is called with, once in every batch of this process, on the CPU."""
    arguments: list[tuple] = []

    def record(module: nn.Module, args: tuple) -> None:
        arguments.append(_moved(args, torch.device("cpu")))
        raise _StopForwardError

    handle = side.block.get_submodule(name).register_forward_pre_hook(record)
    try:
        for batch in range(len(side.stream.hidden)):
            with contextlib.suppress(_StopForwardError):
                side.stream.run(index, side.block, batch)
    finally:
        handle.remove()
    return arguments


@dataclass
class _Record:
    """What reaches a group in one batch: its inputs, a tensor a call, and the residual stream."""

    inputs: list[Tensor]
    residual: Tensor | None


def _record(side: Side, index: int, group: InputGroup, batch: int) -> _Record:
    """Run a block on one batch until all inputs of the group have been seen."""
    record = _Record([], side.stream.hidden[batch] if group.residual == "" else None)
    beside: list[Tensor] = []

    def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.inputs.append(args[0])
        if len(record.inputs) == group.calls:
            raise _StopForwardError

    def see_residual(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.residual = args[0]

    def see_beside(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        beside.append(output)

    handles = []
    # first, as the layer itself may have the residual stream as its input
    if group.residual:
        base = side.block.get_submodule(group.residual)
        handles.append(base.register_forward_pre_hook(see_residual))
    if group.beside is not None:
        other = side.block.get_submodule(group.beside)
        handles.append(other.register_forward_hook(see_beside))
    layer = side.block.get_submodule(group.layers[0])
    handles.append(layer.register_forward_pre_hook(see_input))
    try:
        side.stream.run(index, side.block, batch)
    except _StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if beside:
        output = beside[0].view(record.residual.shape)
        record.residual = record.residual.to(output.device) + output
    return record


def _moved(value: Any, device: torch.device) -> Any:
    """The same structure with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def batch_numbers(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Windows of equal length together, in order, at most `batch_size` of them, by number."""
    batches: list[list[int]] = []
    for number, length in enumerate(lengths):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and lengths[last[0]] == length:
            last.append(number)
        else:
            batches.append([number])
    return batches


def to_batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """The windows of every batch, B x T."""
    numbers = batch_numbers([len(window) for window in windows], batch_size)
    return [torch.stack([windows[number] for number in batch]) for batch in numbers]


def model_inputs(model: nn.Module, tokens_BT: Tensor) -> dict[str, Any]:
    """What a model is called with to read some windows.

    An encoder-decoder reads a window with its encoder, and predicts the same window with its
    decoder.

    Raises:
        CalibrationError: the model does not read tokens.
    """
    wanted = getattr(model, "main_input_name", "input_ids")
    if wanted != "input_ids":
        raise CalibrationError(
            f"{type(model).__name__} reads `{wanted}`, and calibration text has only tokens to "
            f"give. Quantize it without `dataset`."
        )
    config = getattr(model, "config", None)
    tokens_BT = tokens_BT.to(next(model.parameters()).device)
    inputs = {"input_ids": tokens_BT, "use_cache": False}
    if getattr(config, "is_encoder_decoder", False):
        starts = (getattr(config, f"{kind}_token_id", None) for kind in ("decoder_start", "bos"))
        start = next((token for token in starts if token is not None), 0)
        first_B1 = torch.full_like(tokens_BT[:, :1], start)
        inputs["decoder_input_ids"] = torch.cat([first_B1, tokens_BT[:, :-1]], dim=1)
    return inputs


def block_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens_BT: Tensor,
    *,
    source: ResidentBlocks = RESIDENT,
) -> list[tuple[Tensor, tuple, dict]]:
    """Hidden states and other arguments that each of `blocks` is called with."""
    calls: list[tuple[Tensor, tuple, dict]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(_call(args, kwargs))
        if len(calls) == len(blocks):
            raise _StopForwardError

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        # no block is fetched that only its arguments are wanted of: these hooks come first
        with source.flow():
            getattr(model, "base_model", model)(**model_inputs(model, tokens_BT))
    except _StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def head_pass(
    model: nn.Module,
    head: str,
    tokens_BT: Tensor,
    *,
    whole: bool,
    source: ResidentBlocks = RESIDENT,
) -> tuple[Tensor, Tensor | None]:
    """What the output head of a model is called with on some windows.

    Args:
        model: the model.
        head: name of its head.
        tokens_BT: the windows.
        whole: whether to run the head and what follows it, too.
        source: where blocks come from.

    Returns:
        The head's input, and the model's logits if the whole model was run.

    Raises:
        CalibrationError: the windows do not reach the head.
    """
    seen: list[Tensor] = []
    logits = None

    def record(module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        if not whole:
            raise _StopForwardError

    handle = model.get_submodule(head).register_forward_pre_hook(record)
    try:
        with source.flow():
            logits = getattr(model(**model_inputs(model, tokens_BT)), "logits", None)
    except _StopForwardError:
        pass
    finally:
        handle.remove()
    if not seen:
        raise CalibrationError(
            f"{head}: calibration text does not reach it. Leave it dense, or quantize the model "
            f"without `dataset`."
        )
    return seen[0], logits


def _split(output: Any) -> tuple[Tensor, tuple | None]:
    """What a block put out: the hidden states, and the rest if it is a tuple."""
    is_tensor = isinstance(output, Tensor)
    return (output, None) if is_tensor else (output[0], tuple(output[1:]))


def _call(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states of a block's call, and the rest of it."""
    if args:
        return args[0], args[1:], dict(kwargs)
    if "hidden_states" not in kwargs:
        raise CalibrationError(
            f"a block is called with {sorted(kwargs)}, but to be calibrated it needs its hidden "
            f"states first, or as `hidden_states`. Quantize the model without `dataset`."
        )
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


@torch.no_grad()
def runnable_stacks(
    model: nn.Module,
    layers: Sequence[str],
    window: Tensor,
    *,
    source: ResidentBlocks = RESIDENT,
) -> list[RunnableStack]:
    """The stacks that can be run block by block, in the order in which the model runs them.

    Tried out on one window: each block of a stack is called once, and gets the hidden states that
    the one before it put out.  The other stacks are named in the log.

    Raises:
        CalibrationError: there is no such stack.
    """
    stacks = block_stacks(model, layers)
    calls = _chain(model, [block for stack in stacks for _, block in stack], window, source)
    obstacles = [_obstacle([block for _, block in stack], calls) for stack in stacks]
    named = [
        f"{stack[0][0].rpartition('.')[0]} ({obstacle})"
        for stack, obstacle in zip(stacks, obstacles, strict=True)
        if obstacle is not None
    ]
    if len(named) == len(stacks):
        raise CalibrationError(
            f"{type(model).__name__} cannot be calibrated block by block: {', '.join(named)}. "
            f"Quantize it without `dataset`."
        )
    if named:
        logger.warning("Cannot be calibrated, and stays dense: %s.", ", ".join(named))
    called = [call.block for call in calls]
    runnable = [
        RunnableStack(stack, calls[called.index(stack[-1][1])].rest)
        for stack, obstacle in zip(stacks, obstacles, strict=True)
        if obstacle is None
    ]
    return sorted(runnable, key=lambda stack: called.index(stack.modules[0]))


@dataclass
class _BlockCall:
    """A call of a block in a model that is run once."""

    block: nn.Module

    chained: bool
    """Whether it got the hidden states that the block before put out."""

    rest: tuple | None = None
    """What it put out behind its hidden states; None if that was no tuple."""


def _chain(
    model: nn.Module, blocks: Sequence[nn.Module], window: Tensor, source: ResidentBlocks
) -> list[_BlockCall]:
    """All calls of blocks when the model reads a window."""
    calls: list[_BlockCall] = []
    last: Tensor | None = None

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, *_ = _call(args, kwargs)
        # states that are not finite are for the block loop to find
        chained = last is not None and _equal(hidden.nan_to_num(), last.nan_to_num())
        calls.append(_BlockCall(module, chained))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal last
        last, calls[-1].rest = _split(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with source.flow():
            getattr(model, "base_model", model)(**model_inputs(model, window[None]))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _obstacle(blocks: Sequence[nn.Module], calls: Sequence[_BlockCall]) -> str | None:
    """Why a stack cannot be run block by block, or None if it can."""
    called = [call for call in calls if call.block in blocks]
    if not called:
        return "text does not reach it"
    if [call.block for call in called] != list(blocks):
        return "its blocks are not called one after the other, once each"
    if not all(call.chained for call in called[1:]):
        return "its blocks are not called on what the one before put out"
    return None
