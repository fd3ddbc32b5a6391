"""Quantize one layer: the search for its step, the codes, the packed form, the report."""

import functools
import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from watersic_hf.calibration.sensitivity import Sensitivity
from watersic_hf.checkpoint import PackedLayer, layer_charge, pack_layer
from watersic_hf.checkpoint.report import LayerReport, RunReport, describe_run, location_of
from watersic_hf.codec import decode
from watersic_hf.core import (
    LayerSettings,
    Moments,
    ProjectedMoments,
    column_deviations,
    column_profile,
    quantize_tall,
    quantize_weight,
    quantize_wide,
    to_smallest_dtype,
)
from watersic_hf.nn import block_step, path_search
from watersic_hf.quantization.budget import Budget, row_importance, sensitive_targets
from watersic_hf.quantization.journal import Journal
from watersic_hf.streams.processes import gather, rank_and_size, shard_by_cost

logger = logging.getLogger(__name__)

LayerMoments = Moments | ProjectedMoments | Callable[[str], Moments] | None
"""Moments of the input of layers, or those of a single layer; or a function that returns those of
one layer by its name; or None if the layers are finished, so that none are needed."""


@dataclass(frozen=True, kw_only=True)
class LayerTask:
    """A layer to quantize, and what its bits are spent by."""

    name: str
    """Full name of the layer."""
    weight_AN: Tensor
    """Dense weight."""
    moments: Moments | ProjectedMoments
    """Second moments of its input."""
    bits: float
    """Bits per weight to spend."""
    row_importance_A: Tensor | None = None
    """Weight of the squared error of every row; None if all rows count the same."""
    is_vocabulary: bool = False
    """Whether this is a vocabulary matrix, whose float64 copies would not fit in memory."""
    octaves: float | None = None
    """Where the search for the step begins; see `LayerReport.octaves`."""


class QuantizedLayer(NamedTuple):
    """A quantized layer."""

    packed: PackedLayer
    """Its stored tensors."""
    codes_AN: Tensor
    """The codes that the payload decodes to."""
    report: LayerReport
    """Its report."""


@torch.no_grad()
def quantize_and_pack(
    task: LayerTask,
    *,
    settings: LayerSettings,
    seed: int,
    pack: Callable[..., PackedLayer] = pack_layer,
) -> QuantizedLayer:
    """Quantize the weight of a layer, pack it, and report on it.

    Args:
        task: the layer.
        settings: settings of the method.
        seed: seed of the run.  Together with the name of the layer it seeds the generator that
            draws the rows of the search, so that the result does not depend on the other layers.
        pack: packs codes and scales: `pack_layer`, or `pack_vocabulary_matrix` for an embedding.

    Raises:
        CalibrationError: the weight or the moments cannot be used; the message names the layer.
    """
    start = time.perf_counter()
    name, weight_AN, moments = task.name, task.weight_AN, task.moments
    rows, columns = weight_AN.shape
    quantize = quantize_tall
    if isinstance(moments, ProjectedMoments):
        quantize = functools.partial(quantize_wide, octaves=task.octaves)
    elif not task.is_vocabulary:
        quantize = functools.partial(quantize_weight, octaves=task.octaves)
    quantized = quantize(
        weight_AN,
        moments,
        bits=task.bits,
        charge=layer_charge,
        row_importance_A=task.row_importance_A,
        settings=settings,
        generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed),
        block_step=block_step(weight_AN.device),
        search=path_search(weight_AN.device) if settings.lattice == "trellis" else None,
        name=name,
    )
    tokens = moments.tokens if moments.own_tokens is None else moments.own_tokens
    if quantized.zero_input:
        logger.warning(
            "%s: its input is zero for all calibration tokens, so it is quantized as without data. "
            "Something before it was pruned or rounded to zero; in the second case more bits there "
            "can help.",
            name,
        )
        tokens = 0
    scales = quantized.row_scale_A, quantized.col_scale_N
    packed = pack(quantized.codes_AN, *scales, path=quantized.path, name=name)
    profile = None
    if not task.is_vocabulary:
        deviation_N = column_deviations(weight_AN, quantized.row_scale_A, quantized.spacing_N)
        trellis = quantized.path is not None
        profile = column_profile(quantized.codes_AN, deviation_N, trellis=trellis)
    report = LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        asked=task.bits,
        bits=packed.bits_per_weight,
        error=float(quantized.error),
        damping=quantized.damping,
        tokens=tokens,
        pooled=moments.pool_fraction,
        seconds=time.perf_counter() - start,
        profile=profile,
        table=task.is_vocabulary,
        octaves=quantized.octaves,
    )
    return QuantizedLayer(packed, quantized.codes_AN, report)


def identity_moments(weight_AN: Tensor) -> Moments:
    """Return the moments that a weight is quantized with without data: the identity covariance."""
    return Moments.identity(weight_AN.shape[1], device=weight_AN.device)


def _kind_of(name: str) -> tuple[str, str]:
    """Return what layers of one kind have in common: their stack, and their name in a block."""
    location = location_of(name)
    return location.stack, location.kind


def _work(shape: tuple[int, int]) -> int:
    """Return the products that it takes to quantize a layer, up to a factor."""
    rows, columns = shape
    return (rows + columns) * columns**2


class LayerQuantizer:
    """Quantizes the layers of one model, one after another, within one budget.

    Args:
        targets: number of weights and target in bits per weight, by layer.
        settings: settings of the method.
        seed: seed of the run; see `quantize_and_pack`.
        pinned: layers whose bits are not moved to other layers.
        journal: stores finished layers, and returns those that it has (default: none).

    Raises:
        ImportError: the lattice is a trellis, and nothing is installed that can search it.
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
        if settings.lattice == "trellis" and not torch.cuda.is_available():
            # an error before the first layer rather than at it
            path_search(torch.device("cpu"))
        self._targets = dict(targets)
        self._pinned = frozenset(pinned)
        self.budget = Budget(targets)
        self.settings = settings
        self.seed = seed
        self.journal = journal
        self.reports: list[LayerReport] = []
        self._row_importance: dict[str, Tensor] = {}
        self._octaves: dict[tuple[str, str], float] = {}
        self._start = time.perf_counter()

    def use_sensitivities(
        self, sensitivities: Mapping[str, Sensitivity], *, allocate: bool, rows: bool
    ) -> None:
        """Spend bits where errors matter; to be called before the first layer.

        Args:
            sensitivities: sensitivities by layer.
            allocate: whether to split the bits among the layers by them.
            rows: whether to give every row of a layer a step by them.
        """
        free = {name: s for name, s in sensitivities.items() if name not in self._pinned}
        if allocate:
            self.budget = Budget(sensitive_targets(self._targets, free))
        if rows:
            self._row_importance = {
                name: row_importance(sensitivity) for name, sensitivity in sensitivities.items()
            }

    def count_weights(self, layers: Iterable[str]) -> int:
        """Return the number of weights in some layers."""
        return sum(self._targets[layer][0] for layer in layers)

    def is_finished(self, name: str) -> bool:
        """Whether the journal has the layer, so that no moments are needed."""
        return self.journal is not None and self.journal.has_layer(name)

    def record(self, report: LayerReport) -> None:
        """Add the report of a quantized layer, and charge its bits to the budget."""
        self.budget.spend(report.name, report.bits)
        self.reports.append(report)
        if report.octaves is not None:
            self._octaves[_kind_of(report.name)] = report.octaves

    def quantize(
        self, name: str, weight_AN: Tensor, moments: LayerMoments
    ) -> tuple[PackedLayer, Tensor]:
        """Quantize and pack the weight of a layer, and record its report.

        Args:
            name: full name of the layer.
            weight_AN: dense weight.
            moments: moments of its input.

        Returns:
            The packed layer, and the codes that its payload decodes to.

        Raises:
            CalibrationError: the weight or the moments cannot be used; the message names the layer.
        """
        layer = self._quantize_or_load(name, weight_AN, moments, self.budget.bits_for(name))
        self.record(layer.report)
        return layer.packed, layer.codes_AN

    def quantize_group(
        self, weights: Mapping[str, Tensor], moments: LayerMoments
    ) -> Iterator[tuple[str, PackedLayer, Tensor]]:
        """Quantize the layers of a group; with several processes, each quantizes some of them.

        Args:
            weights: dense weights by full name of the layer.
            moments: moments of the input that they share; for layers with separate inputs, as
                experts are, the function that returns those of one layer.

        Yields:
            The name of each layer, and what `quantize` returns for it.
        """
        if rank_and_size()[1] == 1:
            for name, weight_AN in weights.items():
                yield name, *self.quantize(name, weight_AN, moments)
            return
        # processes work at the same time, so what one layer saves goes to later groups only
        bits = {name: self.budget.bits_for(name) for name in weights}
        done = {}
        for name in shard_by_cost(list(weights), lambda name: _work(weights[name].shape)):
            layer = self._quantize_or_load(name, weights[name], moments, bits[name])
            done[name] = layer.packed, layer.report
        gathered = {name: result for part in gather(done) for name, result in part.items()}
        for name in weights:
            packed, report = gathered[name]
            self.record(report)
            yield name, packed, to_smallest_dtype(decode(packed.weight))

    @torch.no_grad()
    def _quantize_or_load(
        self, name: str, weight_AN: Tensor, moments: LayerMoments, bits: float
    ) -> QuantizedLayer:
        """Return a layer from the journal if that has it; otherwise quantize and store it."""
        if self.is_finished(name):
            packed, report = self.journal.layer(name)
            packed.verify(name)
            return QuantizedLayer(packed, to_smallest_dtype(decode(packed.weight)), report)
        task = LayerTask(
            name=name,
            weight_AN=weight_AN,
            moments=moments(name) if callable(moments) else moments,
            bits=bits,
            row_importance_A=self._row_importance.get(name),
            octaves=self._octaves.get(_kind_of(name)),
        )
        layer = quantize_and_pack(task, settings=self.settings, seed=self.seed)
        if self.journal is not None:
            self.journal.put_layer(layer.packed, layer.report)
        return layer

    def run_report(self) -> RunReport:
        """Return the report of the run, which ends now."""
        return describe_run(time.perf_counter() - self._start)
