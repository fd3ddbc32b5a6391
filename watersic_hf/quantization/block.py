"""Quantize one block while it is loaded: calibrate, quantize and replace its layers.

Every group of layers is calibrated on the outputs of the quantized groups before it, so that it can
compensate for their errors.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from watersic_hf.calibration.experts import (
    LARGE_POOL_FRACTION,
    ExpertMoments,
    describe_least_used,
    experts_in,
    layers_outside_experts,
)
from watersic_hf.calibration.mixing import search_mixture
from watersic_hf.calibration.moments import group_moments, projected_moments
from watersic_hf.checkpoint import PACKED
from watersic_hf.checkpoint.report import LayerReport
from watersic_hf.core import CalibrationError, Moments, is_wide
from watersic_hf.nn import PackedMatrix, SeparateExperts, install_packed
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerMoments, LayerQuantizer
from watersic_hf.quantization.settings import CalibrationSettings
from watersic_hf.streams.attention import attention_importance
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.progress import Progress
from watersic_hf.streams.topology import InputGroup, input_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockQuantizer:
    """Quantizes the layers of one block on what reaches it in both models."""

    name: str
    """Name of the block in the model."""
    quantizer: LayerQuantizer
    """Quantizes its layers, and holds their budget and reports."""
    settings: CalibrationSettings
    """Which statistics are collected, and how they are used."""
    working: BlockView
    """The block in the partly quantized model, and its input there."""
    original: BlockView | None
    """The block in the original model, and its input there; None if only one model runs."""

    def quantize(self, layers: Sequence[str]) -> Iterator[str]:
        """Quantize the layers of the block, group by group, and replace them in it.

        Args:
            layers: names of the layers within the block.

        Yields:
            The full name of each layer once it is replaced.
        """
        block = self.working.block
        experts = experts_in(block, layers)
        # what the original model computes here need not be computed again
        view = self.original or self.working
        groups = input_groups(
            view.block,
            layers_outside_experts(layers, experts),
            lambda: view.run_on(0, watched=layers),
            view.stream.hidden[0],
        )
        if self.working.index == 0:
            self._log_what_does_not_apply(groups)
        # of the original block, so that it is the same before and after groups are replaced
        importance = self._importance() if any(g.feeds_attention for g in groups) else None
        for number, group in enumerate(groups):
            behind = next((g for g in groups[number:] if not g.feeds_attention), None)
            yield from self._quantize_group(group, behind, importance)
        for name, module in experts.items():
            yield from self._quantize_experts(name, module)

    def _quantize_group(
        self, group: InputGroup, behind: InputGroup | None, importance: list[Tensor] | None
    ) -> Iterator[str]:
        """Quantize linear layers that share an input; yield their full names.

        Args:
            group: the layers.
            behind: the first group from there on that does not feed the attention.
            importance: attention that every token receives, by batch.
        """
        block = self.working.block
        linears = {f"{self.name}.{layer}": block.get_submodule(layer) for layer in group.layers}
        weights = {name: linear.weight for name, linear in linears.items()}
        moments = None
        if not all(self.quantizer.is_finished(name) for name in linears):
            moments = self._moments(group, behind, importance if group.feeds_attention else None)
        for name, packed, codes_AN in self.quantizer.quantize_group(weights, moments):
            install_packed(
                block,
                name.removeprefix(f"{self.name}."),
                packed,
                like=weights[name],
                bias=linears[name].bias,
                codes_AN=codes_AN,
            )
            self._finish(name.removeprefix(f"{self.name}."))
            yield name

    def _finish(self, layer: str) -> None:
        """Have what a layer, which was replaced just now, returns count as final."""
        if self.working.replay is not None:
            self.working.replay.finish(layer)

    def _moments(
        self, group: InputGroup, behind: InputGroup | None, importance: list[Tensor] | None
    ) -> LayerMoments:
        """Return the moments that a group is quantized with; see `_quantize_group`."""
        settings = self.settings
        mixing = settings.mixing and group.feeds_attention and behind is not None
        streams = {
            "name": self.name,
            "original": self.original,
            "residual": settings.residual and self.original is not None,
        }
        layer = self.working.block.get_submodule(group.layers[0])
        alone = len(group.layers) == 1 and importance is None and not mixing
        if alone and is_wide(layer.out_features, layer.in_features):
            return projected_moments(self.working, group, drift=settings.drift, **streams)
        plain, weighted = group_moments(self.working, group, importance=importance, **streams)

        def mixture(drift: float, attention: float) -> Moments:
            mixed = plain if weighted is None else plain.mix(weighted, attention)
            return mixed.with_drift(drift)

        if not mixing:
            return mixture(settings.drift, settings.attention)
        drift, attention = search_mixture(
            mixture,
            group,
            behind,
            self.working,
            self.original,
            bits=self.quantizer.budget.bits_for(f"{self.name}.{group.layers[0]}"),
            settings=self.quantizer.settings,
            weighted=weighted is not None,
        )
        logger.info("%s: drift fraction %.3f, attention fraction %.3f", self.name, drift, attention)
        return mixture(drift, attention)

    def _importance(self) -> list[Tensor] | None:
        """Return the attention that every token receives, by batch; None if it is not used."""
        if self.original is None or not (self.settings.attention or self.settings.mixing):
            return None
        return attention_importance(self.original.run, self.original.batches)

    def _quantize_experts(self, name: str, experts: SeparateExperts) -> Iterator[str]:
        """Quantize a module of experts; yield the full names of their matrices.

        The first matrices of all experts are quantized before the last ones, whose inputs they
        compute.
        """
        within = {f"{self.name}.{name}.{n}": n for n in experts.layout.names()}
        known = None
        if not all(self.quantizer.is_finished(layer) for layer in within):
            self._log_residual_of_experts(name)
            known = ExpertMoments.collect(self.working, self.original, name)

        def moments(layer: str) -> Moments:
            try:
                found = known.of(*experts.layout.names()[within[layer]])
            except CalibrationError as error:
                raise CalibrationError(f"{layer}: {error}") from error
            return found.with_drift(self.settings.drift)

        before = len(self.quantizer.reports)
        for matrix in experts.layout.matrices:
            layers = [layer for layer in within if layer.endswith(f".{matrix}")]
            weights = {layer: experts.get_submodule(within[layer]).weight for layer in layers}
            for layer, packed, codes_AN in self.quantizer.quantize_group(weights, moments):
                install_packed(
                    experts,
                    within[layer],
                    packed,
                    like=weights[layer],
                    codes_AN=codes_AN,
                    module_class=PackedMatrix,
                )
                self._finish(layer.removeprefix(f"{self.name}."))
                yield layer
        self._warn_of_rare_experts(name, experts, self.quantizer.reports[before:])

    def _warn_of_rare_experts(
        self, name: str, experts: SeparateExperts, reports: Sequence[LayerReport]
    ) -> None:
        """Warn about experts whose statistics are largely those of the pool."""
        numbers = {f"{self.name}.{name}.{n}": e for n, (e, _) in experts.layout.names().items()}
        rare = {
            numbers[report.name]: report.tokens
            for report in reports
            if report.pooled >= LARGE_POOL_FRACTION
        }
        if rare:
            logger.warning(
                "%s.%s: %d of %d experts see so few calibration tokens that at least half of their "
                "statistics comes from the tokens of all experts: %s.",
                self.name,
                name,
                len(rare),
                experts.layout.experts,
                describe_least_used(rare),
            )

    def _log_residual_of_experts(self, name: str) -> None:
        """Log, for the first experts of a model, which error they do not compensate for."""
        first = not any(f".{PACKED}." in report.name for report in self.quantizer.reports)
        settings = self.settings
        if first and self.original is not None and settings.residual and settings.drift:
            logger.info(
                "%s.%s: the outputs of experts are weighted before they are added to the residual "
                "stream, so the error of the residual stream is not compensated for there; the "
                "drift of their inputs is.",
                self.name,
                name,
            )

    def _log_what_does_not_apply(self, groups: Sequence[InputGroup]) -> None:
        """Log the parts of the method that the architecture of the model does not support."""
        if self.original is None:
            return
        settings = self.settings
        if settings.residual and settings.drift and not any(g.residual is not None for g in groups):
            logger.info(
                "%s: no layer's output is simply added to the residual stream, so the error of the "
                "residual stream is not compensated for; the drift of the inputs is.",
                self.name,
            )
        wanted = settings.attention or settings.mixing
        if wanted and not any(g.feeds_attention for g in groups):
            logger.info(
                "%s: no single self-attention was recognised in the block, so `attention` and "
                "`mixing` have no effect here.",
                self.name,
            )


def reuse_finished_block(
    index: int, journal: Journal | None, *, quantizer: LayerQuantizer, progress: Progress
) -> bool:
    """Record the layers of a block that an earlier run finished.

    Args:
        index: number of the block, counted through all stacks.
        journal: the journal of the run, if it has one.
        quantizer: records the layers.
        progress: shows them.

    Returns:
        Whether the journal has the block, so that it is not to be quantized again.
    """
    if journal is None or index >= journal.blocks:
        return False
    for report in journal.block(index).reports:
        quantizer.record(report)
        progress.layer(report, earlier=True)
    return True
