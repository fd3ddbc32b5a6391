"""What each layer may spend, so that the model as a whole spends what was asked for.

Units: bits per weight, stored bits of the quantized layers only.
"""

from collections.abc import Mapping


class Budget:
    """Spread what a layer left over, or overspent, evenly on the weights still to come.

    Source: WaterSIC's global rate control (method of arXiv 2603.04956, uniform variant), with a
    target of its own for every layer.

    Args:
        targets: for every layer, in any order, its number of weights and the bits asked for it.
    """

    def __init__(self, targets: Mapping[str, tuple[int, float]]) -> None:
        self._left = dict(targets)
        self._surplus = 0.0

    def ask(self, layer: str) -> float:
        """Bits per weight that the layer may spend: its target and its share of the surplus.

        The share is at most half the target, in both directions, so that one layer does not pay
        for all when it is the last.
        """
        weights = sum(n for n, _ in self._left.values())
        target = self._left[layer][1]
        share = self._surplus / weights
        return target + min(max(share, -target / 2), target / 2)

    def spend(self, layer: str, bits: float) -> None:
        """Note that the layer is done, and what it really took, in bits per weight."""
        weights, target = self._left.pop(layer)
        self._surplus += weights * (target - bits)
