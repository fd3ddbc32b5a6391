"""Second moments of the inputs of linear layers, measured in one model or in two.

Shapes: B = windows in a batch, T = tokens, S = tokens of an expert, N = in_features,
        A = out_features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from watersic_hf.core import (
    CalibrationError,
    MomentAccumulator,
    Moments,
    ProjectedAccumulator,
    ProjectedMoments,
)
from watersic_hf.streams.hooks import BlockView, group_record
from watersic_hf.streams.processes import all_reduce_sum
from watersic_hf.streams.topology import InputGroup


def group_moments(
    working: BlockView,
    group: InputGroup,
    *,
    name: str,
    original: BlockView | None = None,
    residual: bool = False,
    importance: Sequence[Tensor] | None = None,
) -> tuple[Moments, Moments | None]:
    """Return the second moments of the input of a group of layers, over all calibration windows.

    The windows are those of all processes.  Blocks are run only up to the input of the group.

    Args:
        working: the block in the partly quantized model.
        group: the layers.
        name: full name of the block, for messages.
        original: the block in the original model; with it the moments are those of both streams.
        residual: whether to collect S_R as well, the product of the error of the residual stream
            that the group writes to (`InputGroup.residual`) and the group's input; needs
            `original`.
        importance: weight of every token, one B x T tensor per batch of this process.

    Returns:
        The plain moments, and the moments weighted by `importance`, None without it.

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
    with _errors_of(name, group):
        for call in _calls(working, original, group, residual=residual):
            streams = call.x_TN, call.drifted_TN
            plain.add(*streams, residual_TA=call.residual_TA)
            if weighted is not None:
                weight_T = importance[call.batch].to(call.x_TN.device)
                weighted.add(*streams, residual_TA=call.residual_TA, weight_T=weight_T)
    for sums in (plain, weighted):
        if sums is not None:
            sums.combine(all_reduce_sum)
    return plain.result(), None if weighted is None else weighted.result()


def projected_moments(
    working: BlockView,
    group: InputGroup,
    *,
    name: str,
    drift: float,
    original: BlockView | None = None,
    residual: bool = False,
) -> ProjectedMoments:
    """Return the moments of a layer that `is_wide`, the only one of its group.

    Args:
        working, group, name, original, residual: as for `group_moments`.
        drift: fraction of the drift of the input that the layer compensates for.

    Raises:
        CalibrationError: the inputs are not finite; the message names the layer.
    """
    residual = residual and group.residual is not None
    sums = ProjectedAccumulator(
        working.block.get_submodule(group.layers[0]).weight,
        drift=None if original is None else drift,
        residual=residual,
        device=next(working.block.parameters()).device,
    )
    with _errors_of(name, group):
        for call in _calls(working, original, group, residual=residual, outputs=True):
            sums.add(
                call.x_TN,
                call.drifted_TN,
                output_TA=call.output_TA,
                residual_TA=call.residual_TA,
            )
    sums.combine(all_reduce_sum)
    return sums.result()


@contextmanager
def _errors_of(name: str, group: InputGroup) -> Iterator[None]:
    """Have errors of the calibration name the layer."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{name}.{group.layers[0]}: {error}") from error


class _Call(NamedTuple):
    """What reaches a group of layers in one of its calls."""

    batch: int
    """Number of the batch."""
    x_TN: Tensor
    """Its input in the original model, or in the only one."""
    drifted_TN: Tensor | None
    """Its input in the partly quantized model; None if only one model runs."""
    output_TA: Tensor | None
    """W x for its first layer, if that is wanted and two models run."""
    residual_TA: Tensor | None
    """The error of the residual stream, if that is wanted."""


def _calls(
    working: BlockView,
    original: BlockView | None,
    group: InputGroup,
    *,
    residual: bool,
    outputs: bool = False,
) -> Iterator[_Call]:
    """Yield what reaches the group in every one of its calls; see `_Call`."""
    for batch in range(working.batches):
        x = group_record(working, group, batch)
        if original is None:
            for x_TN in x.inputs:
                yield _Call(batch, x_TN, None, None, None)
            continue
        x, drifted = group_record(original, group, batch, outputs=outputs), x
        residual_TA = None
        if residual:
            wide = torch.promote_types(x.residual.dtype, torch.float32)
            residual_TA = x.residual.to(wide) - drifted.residual.to(wide)
        bias_A = original.block.get_submodule(group.layers[0]).bias
        for call, x_TN in enumerate(x.inputs):
            output_TA = None
            if outputs:
                output_TA = x.outputs[call] if bias_A is None else x.outputs[call] - bias_A
            yield _Call(batch, x_TN, drifted.inputs[call], output_TA, residual_TA)


def moments_of(x_SN: Tensor, drifted_SN: Tensor | None = None) -> Moments:
    """Return the moments of the inputs of some tokens.

    Args:
        x_SN: their inputs in the original model, or in the only one.
        drifted_SN: their inputs in the partly quantized model.
    """
    sums = MomentAccumulator(x_SN.shape[1], drift=drifted_SN is not None, device=x_SN.device)
    sums.add(x_SN, drifted_SN)
    return sums.result()
