"""Quantize one layer: the search for its step, the codes, the packed form, the report."""

import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from watersic_hf.calibration.sensitivity import Sensitivity
from watersic_hf.checkpoint import PackedLayer, layer_charge, pack_layer
from watersic_hf.checkpoint.report import LayerReport, RunReport, describe_run
from watersic_hf.codec import decode
from watersic_hf.core import (
    LayerSettings,
    Moments,
    column_deviations,
    column_profile,
    quantize_weight,
    to_smallest_dtype,
)
from watersic_hf.nn import block_step
from watersic_hf.quantization.budget import Budget, row_importance, sensitive_targets
from watersic_hf.quantization.journal import Journal
from watersic_hf.streams.processes import gather, rank_and_size, shard


class LayerQuantizer:
    """Quantizes the layers of one model, one after another, within one budget.

    Args:
        targets: number of weights and bits asked for, by layer.
        settings: of the method.
        seed: every layer draws from a generator of its own, seeded by this and by its name, so
            that the result does not depend on the order of the layers.
        pinned: layers whose bits are not to be moved to others.
        journal: where finished layers are kept, and taken from if they are there.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, float]],
        *,
        settings: LayerSettings,
        seed: int,
        pinned: Collection[str] = (),
        journal: Journal | None = None,
    ) -> None:
        self._targets = dict(targets)
        self._pinned = frozenset(pinned)
        self.budget = Budget(targets)
        self.settings = settings
        self.seed = seed
        self.journal = journal
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

    def weights(self, layers: Iterable[str]) -> int:
        """Number of weights in some layers."""
        return sum(self._targets[layer][0] for layer in layers)

    def finished(self, name: str) -> bool:
        """Whether the layer was quantized before, so that no moments are needed."""
        return self.journal is not None and self.journal.has_layer(name)

    def count(self, report: LayerReport) -> None:
        """Add the report of a layer that is quantized, and take what it cost from the budget."""
        self.budget.spend(report.name, report.bits)
        self.reports.append(report)

    def quantize(
        self,
        name: str,
        weight_AN: Tensor,
        moments: Moments | Callable[[str], Moments] | None,
    ) -> tuple[PackedLayer, Tensor]:
        """Quantize and pack a layer's weight, and add its report.

        Args:
            name: of the layer.
            weight_AN: its weight.
            moments: of its input, or what finds them; None for a layer that is finished.

        Returns:
            The packed layer, and the codes that it holds.

        Raises:
            CalibrationError: the weight or the moments cannot be used; the message names the layer.
        """
        packed, codes_AN, report = self._work(name, weight_AN, moments, self.budget.ask(name))
        self.count(report)
        return packed, codes_AN

    def quantize_group(
        self,
        weights: Mapping[str, Tensor],
        moments: Moments | Callable[[str], Moments] | None,
    ) -> Iterator[tuple[str, PackedLayer, Tensor]]:
        """Quantize layers with one input, where there are several processes each its share.

        Args:
            weights: by name of the layer.
            moments: of their input; None if all of them are finished.  Layers that have an input
                each, as experts do, have a function that finds the moments of one.

        Returns:
            What `quantize` returns for each, with its name.
        """
        if rank_and_size()[1] == 1:
            for name, weight_AN in weights.items():
                yield name, *self.quantize(name, weight_AN, moments)
            return
        # all at once: what one leaves over is for the groups to come
        asked = {name: self.budget.ask(name) for name in weights}
        done = {}
        for name in shard(list(weights)):
            packed, _, report = self._work(name, weights[name], moments, asked[name])
            done[name] = packed, report
        found = {name: result for part in gather(done) for name, result in part.items()}
        for name in weights:
            packed, report = found[name]
            self.count(report)
            yield name, packed, to_smallest_dtype(decode(packed.weight))

    @torch.no_grad()
    def _work(
        self,
        name: str,
        weight_AN: Tensor,
        moments: Moments | Callable[[str], Moments] | None,
        asked: float,
    ) -> tuple[PackedLayer, Tensor, LayerReport]:
        """Packed layer, codes and report of a layer, from the journal if it has them."""
        if self.finished(name):
            packed, report = self.journal.layer(name)
            packed.verify(name)
            return packed, to_smallest_dtype(decode(packed.weight)), report
        if callable(moments):
            moments = moments(name)
        start = time.perf_counter()
        rows, columns = weight_AN.shape
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        quantized = quantize_weight(
            weight_AN, moments, bits=asked, charge=layer_charge, settings=self.settings,
            row_importance_A=self._row_importance.get(name), generator=generator,
            block_step=block_step(weight_AN.device), name=name,
        )  # fmt: skip
        packed = pack_layer(
            quantized.codes_AN, quantized.row_scale_A, quantized.col_scale_N, name=name
        )
        deviation_N = column_deviations(weight_AN, quantized.row_scale_A, quantized.spacing_N)
        report = LayerReport(
            name=name,
            rows=rows,
            columns=columns,
            asked=asked,
            bits=packed.bits_per_weight,
            error=float(quantized.error),
            damping=quantized.damping,
            tokens=moments.tokens if moments.own_tokens is None else moments.own_tokens,
            pooled=moments.pool_fraction,
            seconds=time.perf_counter() - start,
            profile=column_profile(quantized.codes_AN, deviation_N),
        )
        if self.journal is not None:
            self.journal.put_layer(packed, report)
        return packed, quantized.codes_AN, report

    def run_report(self) -> RunReport:
        """The report of the run, which ends now."""
        return describe_run(time.perf_counter() - self._start)
