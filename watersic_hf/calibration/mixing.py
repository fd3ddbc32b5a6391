"""Search for the statistics that q, k and v are quantized with, block by block.

The paper mixes statistics of the original and of the drifted inputs, and statistics that weigh
tokens by attention with plain ones, and searches both shares in every block for the least error of
the attention's output.  Here a candidate costs a rounding at a fixed rate and a pass of the
attention over a few windows: no rate search, no rescalers, no MLP.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from watersic_hf.core import SHAPING_LOSS, LayerSettings, Moments, quantize_weight
from watersic_hf.nn import block_step
from watersic_hf.streams.hooks import Side, group_inputs
from watersic_hf.streams.processes import gather
from watersic_hf.streams.topology import InputGroup

#: Tokens that candidates are judged on, at least one batch.
SEARCH_TOKENS = 4096
#: Golden-section steps for each of the two shares.
STEPS = 4
_GOLDEN = (math.sqrt(5) - 1) / 2

#: ``mixed(drift, attention)``: the moments of two shares.
Mixture = Callable[[float, float], Moments]


def search_mixture(
    mixture: Mixture,
    group: InputGroup,
    after: InputGroup,
    index: int,
    working: Side,
    original: Side,
    *,
    bits: float,
    settings: LayerSettings,
    weighted: bool,
) -> tuple[float, float]:
    """The two shares with which the attention's output is closest to that in the original model.

    Args:
        mixture: the moments of two shares.
        group: the layers that feed the attention, not quantized yet.
        after: the layers behind it, whose input is compared.
        index: of the block.
        working: the partly quantized model.
        original: the model before quantization.
        bits: about what the layers will cost.
        settings: of the rounding.
        weighted: whether there are attention weights; else the second share stays 0.

    Returns:
        Share of the drift correction and share of the attention weights.
    """
    batches = _few_batches(working)
    wanted = [group_inputs(original, index, after, batch) for batch in batches]
    power = sum(gather(sum(float(x.float().square().sum()) for inputs in wanted for x in inputs)))
    settings = LayerSettings(damping=settings.damping, rescale=False)
    layers = [working.block.get_submodule(name) for name in group.layers]
    dense = [layer.weight.data for layer in layers]

    def error(drift: float, attention: float) -> float:
        moments = mixture(drift, attention)
        try:
            for layer, weight_AN in zip(layers, dense, strict=True):
                rounded = quantize_weight(
                    weight_AN, moments, rate=bits - SHAPING_LOSS, settings=settings,
                    block_step=block_step(weight_AN.device),
                )  # fmt: skip
                layer.weight.data = rounded.dequantize().to(weight_AN.dtype)
            distance = sum(gather(_distance(working, index, after, batches, wanted)))
            return distance / max(power, 1e-30)
        finally:
            for layer, weight_AN in zip(layers, dense, strict=True):
                layer.weight.data = weight_AN

    drift, _ = golden_section(lambda share: error(share, 0.0))
    attention = golden_section(lambda share: error(drift, share))[0] if weighted else 0.0
    return drift, attention


def golden_section(
    function: Callable[[float], float], *, steps: int = STEPS
) -> tuple[float, float]:
    """The best point tried, and its value: 0, 1, and the golden section of [0, 1] between them.

    A function that is not unimodal costs nothing but a missed valley.
    """
    tried = {0.0: function(0.0), 1.0: function(1.0)}
    low, high = 0.0, 1.0
    for _ in range(steps):
        points = (high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        for point in points:
            # the golden section meets its own points again, up to rounding
            if not any(abs(point - known) < 1e-6 for known in tried):
                tried[point] = function(point)
        left, right = (min(tried.items(), key=lambda t: abs(t[0] - p))[1] for p in points)
        low, high = (low, points[1]) if left <= right else (points[0], high)
    return min(tried.items(), key=lambda item: item[1])


def _few_batches(side: Side) -> list[int]:
    """The first batches, up to `SEARCH_TOKENS`."""
    chosen, tokens = [], 0
    for batch in range(len(side.stream.hidden)):
        if chosen and tokens >= SEARCH_TOKENS:
            break
        chosen.append(batch)
        tokens += side.stream.hidden[batch][..., 0].numel()
    return chosen


def _distance(
    side: Side,
    index: int,
    group: InputGroup,
    batches: Sequence[int],
    wanted: Sequence[Sequence[Tensor]],
) -> float:
    total = 0.0
    for batch, expected in zip(batches, wanted, strict=True):
        for x, y in zip(group_inputs(side, index, group, batch), expected, strict=True):
            total += float((x.float() - y.to(x.device).float()).square().sum(dtype=torch.float64))
    return total
