"""Quantize one layer: the search for its step, the codes, the packed form, the report."""

import time
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from watersic_hf.calibration.budget import Budget
from watersic_hf.calibration.report import LayerReport
from watersic_hf.checkpoint import PackedLayer, layer_charge, pack_layer
from watersic_hf.core import LayerSettings, Moments, quantize_weight


class LayerQuantizer:
    """Quantizes the layers of one model, one after another, within one budget.

    Args:
        targets: number of weights and bits asked for, by layer.
        settings: of the method.
        seed: every layer draws from a generator of its own, seeded by this and by its name, so
            that the result does not depend on the order of the layers.
    """

    def __init__(
        self, targets: Mapping[str, tuple[int, float]], *, settings: LayerSettings, seed: int
    ) -> None:
        self.budget = Budget(targets)
        self.settings = settings
        self.seed = seed
        self.reports: list[LayerReport] = []

    @torch.no_grad()
    def quantize(self, name: str, weight_AN: Tensor, moments: Moments) -> PackedLayer:
        """Quantize and pack a layer's weight, and add its report.

        Raises:
            CalibrationError: the weight or the moments cannot be used; the message names the layer.
        """
        start = time.perf_counter()
        rows, columns = weight_AN.shape
        asked = self.budget.ask(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        quantized = quantize_weight(
            weight_AN, moments, bits=asked, charge=layer_charge, settings=self.settings,
            generator=generator, name=name,
        )  # fmt: skip
        packed = pack_layer(
            quantized.codes_AN, quantized.row_scale_A, quantized.col_scale_N, name=name
        )
        self.budget.spend(name, packed.bits_per_weight)
        self.reports.append(
            LayerReport(
                name=name,
                rows=rows,
                columns=columns,
                asked=asked,
                bits=packed.bits_per_weight,
                error=float(quantized.error),
                damping=quantized.damping,
                tokens=moments.tokens,
                seconds=time.perf_counter() - start,
            )
        )
        return packed
