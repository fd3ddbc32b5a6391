"""Quantize a model: one that is in memory, or one whose blocks stay on the disk."""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from watersic_hf.calibration import (
    calibration_windows,
    layers_outside_experts,
    massive_rows,
    zero_rows,
)
from watersic_hf.checkpoint import (
    PACKED,
    LayerReport,
    RunReport,
    read_headers,
    read_tensors,
)
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.packed import install_finished
from watersic_hf.integration.selection import Selection, quantized_modules
from watersic_hf.integration.vocabulary import VocabularyMatrix
from watersic_hf.nn import WaterSICEmbedding, WaterSICLinear, module_matches
from watersic_hf.quantization import (
    Journal,
    LayerQuantizer,
    QuantizedLayer,
    VocabularyStatistics,
    quantize_blocks,
    quantize_vocabulary,
    quantize_without_data,
    vocabulary_statistics,
)
from watersic_hf.streams import ResidentBlocks, decoder_blocks, position_limit
from watersic_hf.streams.offloaded import OffloadedBlocks
from watersic_hf.streams.precision import computing_fast
from watersic_hf.streams.torch_state import default_torch_state, replace_inference_tensors

logger = logging.getLogger(__name__)

FindStatistics = Callable[[], VocabularyStatistics]


@dataclass(kw_only=True)
class Run:
    """One quantization of a model: what it may spend, and what is done so far."""

    config: WaterSICConfig
    """Its own: what is found out about the model is written into it."""
    layers: LayerQuantizer
    vocabulary_reports: dict[str, LayerReport] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    """Names of the layers that the checkpoint of the model lacks."""

    @classmethod
    def begin(
        cls, selection: Selection, config: WaterSICConfig, *, journal: Journal | None = None
    ) -> "Run":
        """Start to quantize what is selected of a model.

        Args:
            selection: of the model.
            config: how; it is changed.
            journal: where finished layers are kept, and taken from.

        Raises:
            ValueError: the selection cannot be quantized, or a setting needs a dataset.
        """
        selection.check(config)
        if config.zero_rows == "auto" and config.dataset is None:
            raise ValueError(
                '`zero_rows` is "auto", which finds rows on calibration windows, but there is no '
                "`dataset`. Name a dataset, or the rows."
            )
        for name, reason in selection.obstacles.items():
            logger.warning("%s was to be quantized, but stays dense: %s.", name, reason)
        targets = {
            name: (math.prod(shape), config.bits_of(name))
            for name, shape in selection.shapes.items()
        }
        pinned = [name for name in targets if module_matches(name, config.layer_bits) is not None]
        layers = LayerQuantizer(
            targets, settings=config.settings, seed=config.seed, pinned=pinned, journal=journal
        )
        return cls(config=config, layers=layers)

    @property
    def journal(self) -> Journal | None:
        """Where finished layers are kept; None keeps none."""
        return self.layers.journal

    def quantize_vocabulary(
        self,
        model: nn.Module,
        matrix: VocabularyMatrix,
        weight_AN: torch.Tensor,
        find_statistics: FindStatistics,
        *,
        keep_dense: bool = False,
    ) -> None:
        """Quantize an embedding or a head, and install the result in the model.

        Args:
            model: the model; changed in place.
            matrix: which of its vocabulary matrices.
            weight_AN: its weight.
            find_statistics: finds what its rows and columns count for, if they are needed.
            keep_dense: keep the decoded weight as well, so that nothing is decoded later.
        """
        config = self.config

        def prepare() -> Callable[[], QuantizedLayer]:
            return functools.partial(
                quantize_vocabulary,
                matrix.name,
                weight_AN,
                find_statistics(),
                bits=matrix.bits,
                settings=config.settings,
                seed=config.seed,
                embedding=matrix.embedding is not None,
            )

        codes_AN = None
        if self.journal is not None:
            packed, report = self.journal.layer_outside(matrix.name, prepare)
        else:
            packed, codes_AN, report = prepare()()
        self.vocabulary_reports[matrix.name] = report
        options = {
            "dtype": weight_AN.dtype,
            "device": weight_AN.device,
            "codes_AN": codes_AN if keep_dense else None,
        }
        if matrix.embedding is not None:
            module = WaterSICEmbedding.from_packed(packed, scale=matrix.scale, **options)
        else:
            bias = model.get_submodule(matrix.name).bias
            module = WaterSICLinear.from_packed(packed, bias=bias, **options)
        matrix.install(model, module)

    def finish(self, model: nn.Module, selection: Selection) -> tuple[list[LayerReport], RunReport]:
        """Write into the config what is quantized and what stays dense, and return the reports."""
        quantized = quantized_modules(model)
        config = self.config
        config.modules_to_not_convert = selection.dense_patterns(quantized)
        config.left_dense = selection.left_dense(quantized, self.new)
        config.tables = sorted(self.vocabulary_reports)
        dense = config.left_dense.items()
        logger.info("Dense: %s.", "; ".join(f"{name} ({reason})" for name, reason in dense))
        vocabulary = [self.vocabulary_reports[m.name] for m in selection.quantized_vocabulary]
        return self.layers.reports + vocabulary, self.layers.run_report()


@default_torch_state()
def quantize_in_memory(model: nn.Module, selection: Selection, run: Run) -> None:
    """Quantize a model that is in memory, in place, with calibration data.

    Args:
        model: the model.
        selection: what to quantize of it.
        run: the run that is begun.

    Raises:
        CalibrationError: a layer cannot be calibrated; the message names it.
    """
    replace_inference_tensors(model)
    device = torch.device("cuda") if torch.cuda.is_available() else None
    source = ResidentBlocks(device)
    run.new = selection.new_layers(model)
    selection = selection.without(run.new)
    with computing_fast(model, device):
        windows = model_windows(model, run.config)
        selection.open(model)
        if run.config.zero_rows == "auto":
            selection = _with_massive_rows(model, selection, run, windows, source)
            zero_rows(model, selection.zero_rows)
        _quantize_with_data(model, selection, run, windows, source)


@default_torch_state()
def quantize_on_disk(
    model: nn.Module,
    selection: Selection,
    run: Run,
    source: OffloadedBlocks,
    windows: list[torch.Tensor],
    *,
    dtype: torch.dtype,
) -> Callable[[], dict[str, torch.Tensor]]:
    """Quantize a model whose blocks are on the disk, as if it had been loaded with its quantizer.

    Afterwards its blocks hold empty quantized modules on meta.

    Args:
        model: the model.
        selection: what to quantize of it.
        run: the run that is begun; it has a journal.
        source: the blocks of the model.
        windows: calibration windows; none = quantize without data.
        dtype: dtype of the decoded weights.

    Returns:
        A function that maps the tensors of the blocks into memory, by name in the model.

    Raises:
        CalibrationError: a layer cannot be calibrated or quantized; the message names it.
    """
    selection.open(model, skip=tuple(f"{name}." for name in source.blocks))
    if not windows:
        _quantize_without_data(model, selection, run, source)
    else:
        if run.config.zero_rows == "auto":
            selection = _with_massive_rows(model, selection, run, windows, source)
            source.layers = selection
        _quantize_with_data(model, selection, run, windows, source)
    headers, files = {}, {}
    for name, file, _ in map(run.journal.block, range(run.journal.blocks)):
        for tensor, header in read_headers([file]).items():
            headers[f"{name}.{tensor}"] = header
            files[f"{name}.{tensor}"] = file, tensor
    install_finished(model, selection, headers, dtype)

    def block_tensors() -> dict[str, torch.Tensor]:
        found = {n: t for block in source.blocks for n, t in source.mapped(block).items()}
        for name, (file, tensor) in files.items():
            found |= {name: read_tensors(file, [tensor])[tensor]}
        return found

    return block_tensors


@default_torch_state()
def model_windows(
    model: nn.Module, config: WaterSICConfig, *, tokenizer_options: Mapping[str, Any] | None = None
) -> list[torch.Tensor]:
    """Return the calibration windows of a model; empty if it is quantized without data.

    Args:
        model: the model.
        config: its calibration set and tokenizer.
        tokenizer_options: arguments of `from_pretrained` for the tokenizer that is beside the
            model; default: what is known of how the model was loaded.
    """
    if config.dataset is None:
        return []
    length = window_length(model, config)
    if length < config.sequence_length:
        logger.info("Calibration windows are cut to the model's %d positions.", length)
    return calibration_windows(
        config.dataset,
        tokenizer=_tokenizer(config.tokenizer, model, tokenizer_options),
        model=model,
        samples=config.samples,
        sequence_length=length,
        seed=config.seed,
    )


def window_length(model: nn.Module, config: WaterSICConfig) -> int:
    """Return the tokens of a calibration window: those asked for, or as many as the model takes."""
    return min(config.sequence_length, position_limit(model) or config.sequence_length)


def _with_massive_rows(
    model: nn.Module,
    selection: Selection,
    run: Run,
    windows: list[torch.Tensor],
    source: ResidentBlocks,
) -> Selection:
    """Find the rows with massive activations, and return a selection that zeroes them."""
    find = functools.partial(
        massive_rows,
        model,
        decoder_blocks(model, selection.shapes),
        windows,
        layers_outside_experts(selection.shapes, selection.experts),
        batch_size=run.config.batch_size,
        source=source,
    )
    rows = find() if run.journal is None else run.journal.fact("zero_rows", find)
    run.config.zero_rows = {name.replace(".", r"\."): numbers for name, numbers in rows.items()}
    return replace(selection, zero_rows=rows)


def _quantize_with_data(
    model: nn.Module,
    selection: Selection,
    run: Run,
    windows: list[torch.Tensor],
    source: ResidentBlocks,
) -> None:
    """Quantize an opened model: its blocks in order, then its vocabulary matrices."""
    model.eval()
    config = run.config
    outputs = quantize_blocks(
        model,
        windows,
        layers=list(selection.shapes),
        quantizer=run.layers,
        settings=config.calibration,
        batch_size=config.batch_size,
        source=source,
        journal=run.journal,
    )
    # a head first: its input is to be computed with the embedding as it was
    for matrix in sorted(selection.quantized_vocabulary, key=lambda matrix: matrix.head is None):
        statistics = functools.partial(
            vocabulary_statistics,
            model,
            windows,
            outputs=outputs,
            head=matrix.head,
            embedding=matrix.embedding,
            drift=config.drift,
            source=source,
        )
        weight_AN = model.get_submodule(matrix.name).weight.data
        run.quantize_vocabulary(model, matrix, weight_AN, statistics, keep_dense=True)
    selection.close(model)


def _quantize_without_data(
    model: nn.Module, selection: Selection, run: Run, source: OffloadedBlocks
) -> None:
    quantize_without_data(
        model,
        sorted(selection.shapes, key=_loading_order),
        quantizer=run.layers,
        blocks=source.blocks,
        source=source,
        journal=run.journal,
    )
    for matrix in selection.quantized_vocabulary:
        weight_AN = model.get_submodule(matrix.name).weight.data
        run.quantize_vocabulary(
            model,
            matrix,
            weight_AN,
            functools.partial(VocabularyStatistics.without_data, weight_AN),
        )
    selection.close(model)


def _loading_order(layer: str) -> list:
    """Return a sort key that has layers as they are loaded if files use the model's names.

    Experts, which are loaded together, stay in their order.
    """
    return dot_natural_key(f"{layer.partition(f'.{PACKED}.')[0]}.weight")


def _tokenizer(tokenizer: Any, model: Any, options: Mapping[str, Any] | None) -> Any:
    """Return the user's tokenizer, or the one that is beside the model, or None."""
    # a slow import
    from transformers import AutoTokenizer

    if isinstance(tokenizer, str):
        return AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None:
        return tokenizer
    if options is None:
        options = {
            "revision": getattr(model.config, "_commit_hash", None),
            "trust_remote_code": model.is_remote_code(),
        }
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, **options)
    except (OSError, ValueError, ImportError) as error:
        logger.info("No tokenizer beside the model: %s", error)
        return None
