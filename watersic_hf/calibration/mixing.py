"""Search, block by block, for the statistics that q, k and v are quantized with.

The paper mixes statistics of the original inputs with those of the drifted ones, and statistics in
which tokens are weighted by attention with plain ones.  It searches both fractions in every block
for the smallest error of the attention's output.  Here a candidate costs one rounding at a fixed
rate and one pass of the attention over a few windows, without rate search, rescalers and MLP.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from watersic_hf.core import SHAPING_LOSS, LayerSettings, Moments, quantize_weight
from watersic_hf.nn import block_step
from watersic_hf.streams.hooks import BlockView, group_inputs
from watersic_hf.streams.processes import gather
from watersic_hf.streams.topology import InputGroup

#: Tokens that candidates are compared on; at least one batch is used.
SEARCH_TOKENS = 4096
#: Golden-section steps for each of the two fractions.
STEPS = 4
_GOLDEN = (math.sqrt(5) - 1) / 2

Mixture = Callable[[float, float], Moments]
"""``mixture(drift, attention)``: the moments for a fraction of the drift correction and a fraction
of the attention weights."""


def search_mixture(
    mixture: Mixture,
    group: InputGroup,
    after: InputGroup,
    working: BlockView,
    original: BlockView,
    *,
    bits: float,
    settings: LayerSettings,
    weighted: bool,
) -> tuple[float, float]:
    """Search the fractions with which the attention's output is closest to the original one.

    Args:
        mixture: moments of the group for given fractions.
        group: the layers that feed the attention, not quantized yet.
        after: the layers that follow the attention, whose input is compared.
        working: the block in the partly quantized model; its weights are restored.
        original: the block in the original model.
        bits: approximate bits per weight that the layers will cost.
        settings: settings of the layers, of which the damping is used.
        weighted: whether there are attention weights; otherwise their fraction stays 0.

    Returns:
        The fraction of the drift correction and the fraction of the attention weights.
    """
    batches = _search_batches(working)
    expected = [group_inputs(original, after, batch) for batch in batches]
    power = sum(gather(sum(float(x.float().square().sum()) for inputs in expected for x in inputs)))
    settings = LayerSettings(damping=settings.damping, rescale=False)
    layers = [working.block.get_submodule(name) for name in group.layers]
    dense = [layer.weight.data for layer in layers]

    def error(drift: float, attention: float) -> float:
        moments = mixture(drift, attention)
        try:
            for layer, weight_AN in zip(layers, dense, strict=True):
                rounded = quantize_weight(
                    weight_AN,
                    moments,
                    rate=bits - SHAPING_LOSS,
                    settings=settings,
                    block_step=block_step(weight_AN.device),
                )
                layer.weight.data = rounded.dequantize().to(weight_AN.dtype)
            distance = sum(gather(_squared_distance(working, after, batches, expected)))
            # a block without any output has a power of 0
            return distance / max(power, 1e-30)
        finally:
            for layer, weight_AN in zip(layers, dense, strict=True):
                layer.weight.data = weight_AN

    # one after the other, not jointly: the passes add up instead of multiplying
    drift, _ = golden_section(lambda fraction: error(fraction, 0.0))
    attention = golden_section(lambda fraction: error(drift, fraction))[0] if weighted else 0.0
    return drift, attention


def golden_section(
    function: Callable[[float], float], *, steps: int = STEPS
) -> tuple[float, float]:
    """Minimize a function on [0, 1] by golden-section search, which also tries both ends.

    If the function has several minima, the search can miss the lowest, but never returns a point
    that is worse than one it has tried.

    Args:
        function: the function.
        steps: number of steps.

    Returns:
        The best point tried, and the value there.
    """
    tried = {0.0: function(0.0), 1.0: function(1.0)}
    low, high = 0.0, 1.0
    for _ in range(steps):
        points = (high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        for point in points:
            # a golden section contains points of the one before, up to rounding
            if not any(abs(point - known) < 1e-6 for known in tried):
                tried[point] = function(point)
        left, right = (min(tried.items(), key=lambda t: abs(t[0] - p))[1] for p in points)
        low, high = (low, points[1]) if left <= right else (points[0], high)
    return min(tried.items(), key=lambda item: item[1])


def _search_batches(view: BlockView) -> list[int]:
    """Return the numbers of the first batches, with at least `SEARCH_TOKENS` tokens if possible."""
    chosen, tokens = [], 0
    for batch in range(view.batches):
        if chosen and tokens >= SEARCH_TOKENS:
            break
        chosen.append(batch)
        tokens += view.stream.hidden[batch][..., 0].numel()
    return chosen


def _squared_distance(
    view: BlockView,
    group: InputGroup,
    batches: Sequence[int],
    expected: Sequence[Sequence[Tensor]],
) -> float:
    """Return the squared distance between the inputs of a group and the expected ones."""
    total = 0.0
    for batch, inputs in zip(batches, expected, strict=True):
        for x, y in zip(group_inputs(view, group, batch), inputs, strict=True):
            total += float((x.float() - y.to(x.device).float()).square().sum(dtype=torch.float64))
    return total
