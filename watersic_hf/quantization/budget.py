"""How many bits each layer may spend, so that the model as a whole meets its target.

Units: stored bits per weight, of the quantized layers only.
"""

from collections.abc import Mapping

from torch import Tensor

from watersic_hf.calibration.sensitivity import Sensitivity
from watersic_hf.core import SHAPING_LOSS, rate_at_level

#: Least bits per weight that an allocation gives a layer.
LEAST_BITS = 0.75
#: How far an allocation moves from the targets to the optimum of the theory, from 0 to 1.
ALLOCATION_FRACTION = 0.5
#: Least importance of a row, relative to the mean of the layer.
LEAST_IMPORTANCE = 1e-3
#: Bisections of the level that all layers share, over 200 octaves.
_BISECTIONS = 60


class Budget:
    """Bits of a model, which spreads what a layer saves or overspends evenly over the rest.

    Source: WaterSIC's global rate control (method of arXiv 2603.04956, uniform variant), with a
    separate target for every layer.

    Args:
        targets: number of weights and target in bits per weight, by layer, in any order.
    """

    def __init__(self, targets: Mapping[str, tuple[int, float]]) -> None:
        self._targets = dict(targets)
        self._weights = sum(weights for weights, _ in targets.values())
        self._surplus = 0.0

    def bits_for(self, layer: str) -> float:
        """Return the bits per weight that a layer may spend, before it is quantized.

        They are its target plus the surplus per remaining weight.  The correction is limited to
        half of the target, in both directions, so that the last layer does not pay for all others.
        """
        target = self._targets[layer][1]
        correction = self._surplus / self._weights
        return target + min(max(correction, -target / 2), target / 2)

    def spend(self, layer: str, bits: float) -> None:
        """Record that a layer is quantized.

        Args:
            layer: name of the layer.
            bits: bits per weight that it took.
        """
        weights, target = self._targets.pop(layer)
        self._weights -= weights
        self._surplus += weights * (target - bits)


def sensitive_targets(
    targets: Mapping[str, tuple[int, float]], sensitivities: Mapping[str, Sensitivity]
) -> dict[str, tuple[int, float]]:
    r"""Move bits to the layers where they lower the divergence of the model's output most.

    A layer with step c adds :math:`c^2 E[h g^2] / 24` per weight to the divergence, and each bit
    divides that by four, whichever layer gets it.  The optimum therefore gives all layers the same
    :math:`c^2 E[h g^2]`: reverse waterfilling over layers, as it is done over columns.  The common
    level is the one at which all layers together cost as much as their targets.

    The targets move only a part of the way there (`ALLOCATION_FRACTION`).  The loss is quadratic
    around the optimum, so half of the way achieves three quarters of the gain, and takes a quarter
    of the risk that the sensitivities, which are measured on the calibration text, are wrong.

    Args:
        targets: number of weights and target in bits per weight, by layer.
        sensitivities: sensitivities by layer.  A layer that has none, or whose output does not
            affect the predictions, keeps its target.

    Returns:
        The new targets, in the form of `targets`.
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
    moved = {}
    for name in known:
        weights, target = targets[name]
        optimum = bits_at(2.0**high, name)
        moved[name] = weights, target + ALLOCATION_FRACTION * (optimum - target)
    return dict(targets) | moved


def row_importance(sensitivity: Sensitivity) -> Tensor | None:
    """Return the weight of the squared error of every row; None if no row affects the predictions.

    Every row gets at least `LEAST_IMPORTANCE` times the mean, as `quantize_weight` needs positive
    numbers, and a row that the calibration text does not use is not given up.
    """
    power_A = sensitivity.row_power_A
    mean = power_A.mean()
    return power_A.clamp(min=LEAST_IMPORTANCE * float(mean)) if mean > 0 else None
