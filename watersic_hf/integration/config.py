"""What the user chooses: how weights are quantized (saved), and how they are run (not saved)."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from watersic_hf.calibration import describe
from watersic_hf.checkpoint import FORMAT_VERSION
from watersic_hf.core import LayerSettings
from watersic_hf.nn import BACKEND_VARIABLE, BACKENDS, RESIDENCIES, module_matches
from watersic_hf.quantization import CalibrationSettings

QUANT_METHOD = "watersic"

#: Stored bits per weight that can be asked for.
BITS_RANGE = (0.75, 8.0)

#: Stored bits per weight of an output head or an embedding that is quantized by ``True``.
TABLE_BITS = 4.0

_RESIDENCY_VARIABLE = "WATERSIC_RESIDENCY"


@dataclass(frozen=True, kw_only=True)
class WaterSICRuntime:
    """How this process runs quantized layers; never saved with the model."""

    residency: str = field(default_factory=lambda: os.environ.get(_RESIDENCY_VARIABLE, "auto"))
    """Form of the weights in memory: ``dense`` (decoded once at load, the speed of the dense
    model), ``packed`` (codes of fixed width, for CUDA), ``entropy`` (a prefix code of about the
    stored size, for CUDA), ``stored`` (the stored bytes alone, decoded in every forward), or
    ``auto``, which is ``dense`` but on CUDA devices without the room for it.  The environment
    variable ``WATERSIC_RESIDENCY`` sets the default."""

    backend: str = field(default_factory=lambda: os.environ.get(BACKEND_VARIABLE, "auto"))
    """What multiplies with ``packed`` and ``entropy`` weights on CUDA: ``triton``, ``reference``,
    or ``auto``, that is Triton where it can be imported.  ``WATERSIC_BACKEND`` sets the default,
    and what quantizes on CUDA."""

    def __post_init__(self) -> None:
        if self.residency not in RESIDENCIES:
            raise ValueError(f"residency is {self.residency!r}, but must be one of {RESIDENCIES}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, but must be one of {BACKENDS}")


class WaterSICConfig(QuantizationConfigMixin):
    r"""Configuration of WaterSIC quantization (arXiv 2603.04956) for `from_pretrained`.

    Args:
        bits: average number of stored bits per quantized weight over the linear layers of the
            blocks, everything included: codes, tables, classes, offsets, scales, checksums.  Any
            float from 0.75 to 8.
        dataset: calibration set: ``"self"``, ``"pydoc"``, ``"wikitext2"``, ``"c4"``, a file, a name
            on the hub, strings, token ids or a `datasets.Dataset`
            (`watersic_hf.calibration.data.calibration_windows`).  None quantizes without data, one
            tensor at a time while the model loads: fast, small, and clearly worse.
        tokenizer: tokenizer of the calibration text, or its name; default: the model's own.
        samples: calibration windows.
        sequence_length: tokens per calibration window.
        batch_size: calibration windows that go through a block at a time; more is faster and
            takes more memory, and changes nothing else.
        layer_bits: bits for some layers, by pattern; the others keep `bits`, and what they leave
            over stays among all.  A pattern is a regular expression for whole dotted components:
            ``{"down_proj": 3.5, r"layers\.0": 4}``.  The first that matches counts.
        quantize_head: also quantize the output head; a number is its bits, True means 4.  Its bits
            are its own, and take nothing from `bits`.
        quantize_embeddings: also quantize the input embedding, in the same way.  A head that is
            tied to it is the same table: either setting quantizes it, for both uses.
        modules_to_not_convert: patterns of layers to leave dense.
        zero_rows: rows of layers to set to zero before anything else, by pattern as in
            `layer_bits`: channels with massive activations (paper, dead rows).  ``"auto"`` looks
            for them on the calibration windows.  It changes the model, and is for models that
            cannot be quantized well with them.
        damping: added to the diagonal of the second moment of the inputs, relative to its mean
            entry; None adds 4 times the median entry times inputs over calibration tokens, and at
            least 1e-4 of the mean.
        allocation: ``"sensitivity"`` moves bits to the layers whose errors change the model's
            predictions most, by the Fisher information of a few calibration windows, half of the
            way to where theory has them; ``"uniform"`` gives all layers the same.
        row_importance: give the rows of each layer steps by the same measure.
        drift: share, from 0 to 1, of the drift of a layer's input that the layer makes up for
            (paper, drift correction); above 0 the original model runs beside the quantized one.
        residual: layers that write to the residual stream make up for its error too, by the same
            share (paper, residual compensation).
        attention: share, from 0 to 1, of the statistics of q, k and v that weighs tokens by the
            attention they receive (paper, attention weighting).
        mixing: search both shares for q, k and v of every block (paper, adaptive mixing).
        rescale: fit a scale per row and per column after rounding (paper, section on rescalers).
        seed: of the calibration windows and of the search; the same seed gives the same file.
        left_dense: what stays dense and why, by name of module; set by the quantizer.
        tables: names of the embedding and the head that are quantized; set by the quantizer.
        runtime: how this process runs the layers, a `WaterSICRuntime` or a dict; never saved, and
            honoured when a saved model is loaded.
        format_version: of the checkpoint; set by the file, not by the user.

    Raises:
        ValueError: a value is out of range, or the format is newer than this package reads.
    """

    def __init__(
        self,
        bits: float = 3.0,
        *,
        dataset: Any = None,
        tokenizer: Any = None,
        samples: int = 128,
        sequence_length: int = 2048,
        batch_size: int = 8,
        layer_bits: Mapping[str, float] | None = None,
        quantize_head: bool | float = False,
        quantize_embeddings: bool | float = False,
        modules_to_not_convert: list[str] | None = None,
        zero_rows: Mapping[str, list[int]] | str | None = None,
        damping: float | None = None,
        allocation: str = CalibrationSettings.allocation,
        row_importance: bool = CalibrationSettings.row_importance,
        drift: float = CalibrationSettings.drift,
        residual: bool = CalibrationSettings.residual,
        attention: float = CalibrationSettings.attention,
        mixing: bool = CalibrationSettings.mixing,
        rescale: bool = True,
        seed: int = 0,
        left_dense: Mapping[str, str] | None = None,
        tables: Sequence[str] = (),
        runtime: WaterSICRuntime | Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.bits = bits
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.samples = samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.layer_bits = dict(layer_bits or {})
        self.quantize_head = quantize_head
        self.quantize_embeddings = quantize_embeddings
        self.modules_to_not_convert = modules_to_not_convert
        self.zero_rows = zero_rows
        self.damping = damping
        self.allocation = allocation
        self.row_importance = row_importance
        self.drift = drift
        self.residual = residual
        self.attention = attention
        self.mixing = mixing
        self.rescale = rescale
        self.seed = seed
        self.left_dense = dict(left_dense or {})
        self.tables = list(tables)
        if not isinstance(runtime, WaterSICRuntime):
            runtime = WaterSICRuntime(**(runtime or {}))
        self.runtime = runtime
        self.format_version = format_version
        self._unknown = unknown
        self._check()

    @property
    def settings(self) -> LayerSettings:
        """Settings of the method for one layer."""
        return LayerSettings(damping=self.damping, rescale=self.rescale)

    @property
    def calibration(self) -> CalibrationSettings:
        """Settings of the method that look beyond one layer; without a dataset they do nothing."""
        return CalibrationSettings(
            allocation=self.allocation,
            row_importance=self.row_importance,
            drift=self.drift,
            residual=self.residual,
            attention=self.attention,
            mixing=self.mixing,
        )

    def bits_of(self, layer: str) -> float:
        """Bits asked for a layer: those of the first pattern of `layer_bits` that matches."""
        pattern = module_matches(layer, self.layer_bits)
        return self.bits if pattern is None else self.layer_bits[pattern]

    @property
    def head_bits(self) -> float | None:
        """Bits asked for the output head; None leaves it dense."""
        return _table_bits(self.quantize_head)

    @property
    def embedding_bits(self) -> float | None:
        """Bits asked for the input embedding; None leaves it dense."""
        return _table_bits(self.quantize_embeddings)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user may choose anew when a quantized model is loaded."""
        return {"runtime": self.runtime}

    def to_dict(self) -> dict[str, Any]:
        """The saved fields, as JSON holds them; keys that a newer version wrote are kept."""
        fields = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        fields["dataset"] = describe(self.dataset)
        del fields["tokenizer"], fields["runtime"], fields["batch_size"]
        return copy.deepcopy(fields) | self._unknown

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WaterSICConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json_string())

    def __deepcopy__(self, memo: dict) -> "WaterSICConfig":
        # the tokenizer and the data are shared: they may be large, or not copyable
        clone = copy.copy(self)
        clone.layer_bits = dict(self.layer_bits)
        clone.left_dense = dict(self.left_dense)
        # no copy.copy: encoder-decoders copy their config while torch.compile traces them
        if self.modules_to_not_convert is not None:
            clone.modules_to_not_convert = list(self.modules_to_not_convert)
        memo[id(self)] = clone
        return clone

    def _check(self) -> None:
        low, high = BITS_RANGE
        tables = {
            f"{name}, if it is neither True nor False,": getattr(self, name)
            for name in ("quantize_head", "quantize_embeddings")
            if not isinstance(getattr(self, name), bool)
        }
        for name, bits in (("bits", self.bits), *self.layer_bits.items(), *tables.items()):
            if not isinstance(bits, int | float) or not low <= bits <= high:
                raise ValueError(f"{name} is {bits!r}, but must be a number from {low} to {high:g}")
        for name in ("samples", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be a positive integer")
        if isinstance(self.zero_rows, str) and self.zero_rows != "auto":
            raise ValueError(f'zero_rows is {self.zero_rows!r}, but must be "auto" or a mapping')
        rows = self.zero_rows if isinstance(self.zero_rows, Mapping) else {}
        for pattern in (*self.layer_bits, *(self.modules_to_not_convert or ()), *rows):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"the pattern {pattern!r} is no regular expression: {error}"
                ) from error
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format version {self.format_version}; this version of "
                f"watersic_hf reads up to {FORMAT_VERSION}. Run `pip install -U watersic-hf`."
            )
        # its own checks
        _ = self.settings, self.calibration


def _table_bits(value: bool | float) -> float | None:
    if isinstance(value, bool):
        return TABLE_BITS if value else None
    return value
