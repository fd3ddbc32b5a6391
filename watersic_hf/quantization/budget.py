"""What each layer may spend, so that the model as a whole spends what was asked for.

Units: bits per weight, stored bits of the quantized layers only.
"""

from collections.abc import Mapping

from torch import Tensor

from watersic_hf.calibration.sensitivity import Sensitivity
from watersic_hf.core import SHAPING_LOSS, rate_at_level

#: Bits per weight that an allocation gives a layer at least.
LEAST_BITS = 0.75
#: Share of the way from equal bits to those of the theory that an allocation goes.
ALLOCATION_SHARE = 0.5
#: Least importance of a row, relative to the layer's mean.
LEAST_IMPORTANCE = 1e-3
#: Bisections of the common level, over 200 octaves.
_BISECTIONS = 60


class Budget:
    """Spread what a layer left over, or overspent, evenly on the weights still to come.

    Source: WaterSIC's global rate control (method of arXiv 2603.04956, uniform variant), with a
    target of its own for every layer.

    Args:
        targets: for every layer, in any order, its number of weights and the bits asked for it.
    """

    def __init__(self, targets: Mapping[str, tuple[int, float]]) -> None:
        self._left = dict(targets)
        self._weights = sum(weights for weights, _ in targets.values())
        self._surplus = 0.0

    def ask(self, layer: str) -> float:
        """Bits per weight that the layer may spend: its target and its share of the surplus.

        The share is at most half the target, in both directions, so that one layer does not pay
        for all when it is the last.
        """
        target = self._left[layer][1]
        share = self._surplus / self._weights
        return target + min(max(share, -target / 2), target / 2)

    def spend(self, layer: str, bits: float) -> None:
        """Note that the layer is done, and what it really took, in bits per weight."""
        weights, target = self._left.pop(layer)
        self._weights -= weights
        self._surplus += weights * (target - bits)


def sensitive_targets(
    targets: Mapping[str, tuple[int, float]], sensitivities: Mapping[str, Sensitivity]
) -> dict[str, tuple[int, float]]:
    r"""Move bits to the layers where they lower the divergence of the model's output most.

    A layer with steps c adds :math:`c^2 E[h g^2] / 24` per weight to the divergence, and a bit
    divides that by four wherever it is spent.  So all layers should have the same
    :math:`c^2 E[h g^2]`: the waterfilling of columns, carried on over layers.  The level is the one
    at which all layers together cost what `targets` sum up to.

    Half of the way there (`ALLOCATION_SHARE`) has three quarters of what is to be gained, as the
    loss is flat around the best split, and risks a quarter where the sensitivities, which are those
    of the calibration's text, are wrong.

    Args:
        targets: for every layer, its number of weights and the bits asked for it.
        sensitivities: of layers; those that have none, or whose outputs do not matter at all, keep
            their target.
    """
    known = {
        name: sensitivities[name].variance_N * sensitivities[name].row_power_A.mean()
        for name in targets
        if name in sensitivities and bool(sensitivities[name].row_power_A.any())
    }
    if not known:
        return dict(targets)
    budget = sum(targets[name][0] * targets[name][1] for name in known)

    def bits_at(level: float, name: str) -> float:
        return max(LEAST_BITS, rate_at_level(known[name], level) + SHAPING_LOSS)

    low, high = -100.0, 100.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        spent = sum(targets[name][0] * bits_at(2.0**middle, name) for name in known)
        low, high = (middle, high) if spent > budget else (low, middle)
    shares = {}
    for name in known:
        weights, target = targets[name]
        shares[name] = weights, target + ALLOCATION_SHARE * (bits_at(2.0**high, name) - target)
    return dict(targets) | shares


def row_importance(sensitivity: Sensitivity) -> Tensor | None:
    """What the squared error of every row counts for; None if no row of the layer matters."""
    power_A = sensitivity.row_power_A
    mean = power_A.mean()
    return power_A.clamp(min=LEAST_IMPORTANCE * float(mean)) if mean > 0 else None
