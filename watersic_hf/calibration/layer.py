"""Quantize one layer: the search for its step, the codes, the packed form, the report."""

import time
import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from watersic_hf.calibration.budget import Budget, row_importance, sensitive_targets
from watersic_hf.calibration.report import LayerReport, RunReport, describe_run
from watersic_hf.calibration.sensitivity import Sensitivity
from watersic_hf.checkpoint import PackedLayer, layer_charge, pack_layer
from watersic_hf.core import (
    LayerSettings,
    Moments,
    column_deviations,
    column_profile,
    quantize_weight,
)


class LayerQuantizer:
    """Quantizes the layers of one model, one after another, within one budget.

    Args:
        targets: number of weights and bits asked for, by layer.
        settings: of the method.
        seed: every layer draws from a generator of its own, seeded by this and by its name, so
            that the result does not depend on the order of the layers.
        pinned: layers whose bits are not to be moved to others.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, float]],
        *,
        settings: LayerSettings,
        seed: int,
        pinned: Collection[str] = (),
    ) -> None:
        self._targets = dict(targets)
        self._pinned = frozenset(pinned)
        self.budget = Budget(targets)
        self.settings = settings
        self.seed = seed
        self.reports: list[LayerReport] = []
        self._row_importance: dict[str, Tensor] = {}
        self._start = time.perf_counter()

    def weigh(
        self, sensitivities: Mapping[str, Sensitivity], *, allocate: bool, rows: bool
    ) -> None:
        """Spend bits where errors matter, from what is known before the first layer.

        Args:
            sensitivities: by layer.
            allocate: split the bits among the layers by it.
            rows: give the rows of each layer steps by it.
        """
        free = {n: s for n, s in sensitivities.items() if n not in self._pinned}
        if allocate:
            self.budget = Budget(sensitive_targets(self._targets, free))
        if rows:
            self._row_importance = {
                name: row_importance(sensitivity) for name, sensitivity in sensitivities.items()
            }

    @torch.no_grad()
    def quantize(
        self, name: str, weight_AN: Tensor, moments: Moments
    ) -> tuple[PackedLayer, Tensor]:
        """Quantize and pack a layer's weight, and add its report.

        Returns:
            The packed layer, and the codes that it holds.

        Raises:
            CalibrationError: the weight or the moments cannot be used; the message names the layer.
        """
        start = time.perf_counter()
        rows, columns = weight_AN.shape
        asked = self.budget.ask(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        quantized = quantize_weight(
            weight_AN, moments, bits=asked, charge=layer_charge, settings=self.settings,
            row_importance_A=self._row_importance.get(name), generator=generator, name=name,
        )  # fmt: skip
        packed = pack_layer(
            quantized.codes_AN, quantized.row_scale_A, quantized.col_scale_N, name=name
        )
        self.budget.spend(name, packed.bits_per_weight)
        deviation_N = column_deviations(weight_AN, quantized.row_scale_A, quantized.spacing_N)
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
                profile=column_profile(quantized.codes_AN, deviation_N),
            )
        )
        return packed, quantized.codes_AN

    def run_report(self) -> RunReport:
        """The report of the run, which ends now."""
        return describe_run(time.perf_counter() - self._start)
