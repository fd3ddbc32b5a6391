"""Second moments of the inputs of layers, from what their block gets.

Shapes: B = windows in a batch, T = tokens, S = tokens of an expert, N = inputs of a layer.
"""

from collections.abc import Sequence

from torch import Tensor

from watersic_hf.core import CalibrationError, MomentAccumulator, Moments
from watersic_hf.streams.hooks import Side, group_record
from watersic_hf.streams.processes import add_up
from watersic_hf.streams.topology import InputGroup


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
            seen = group_record(working, index, group, batch)
            first = None if original is None else group_record(original, index, group, batch)
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


def moments_of(x_SN: Tensor, drifted_SN: Tensor | None = None) -> Moments:
    """The moments of some tokens, in both models or in one."""
    sums = MomentAccumulator(x_SN.shape[1], drift=drifted_SN is not None, device=x_SN.device)
    sums.add(x_SN, drifted_SN)
    return sums.result()
