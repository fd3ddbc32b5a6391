"""The user's choices: how weights are quantized (saved) and how they are run (not saved)."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, TypeVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from watersic_hf.calibration import describe
from watersic_hf.checkpoint import FORMAT_VERSION
from watersic_hf.core import LayerSettings
from watersic_hf.integration.patterns import check_pattern_mapping, check_patterns, pattern_list
from watersic_hf.integration.settings import (
    positive_integer,
    setting,
    settings_of,
    with_arguments,
)
from watersic_hf.nn import BACKEND_VARIABLE, BACKENDS, RESIDENCIES, module_matches
from watersic_hf.quantization import CalibrationSettings

QUANT_METHOD = "watersic"

#: Lowest and highest number of stored bits per weight that can be requested.
BITS_RANGE = (0.75, 8.0)

#: Stored bits per weight of a vocabulary matrix that is quantized with ``True``.
VOCABULARY_BITS = 4.0

_RESIDENCY_VARIABLE = "WATERSIC_RESIDENCY"
_Settings = TypeVar("_Settings")


@dataclass(frozen=True, kw_only=True)
class WaterSICRuntime:
    """How this process runs quantized layers; never saved with the model."""

    residency: str = field(default_factory=lambda: os.environ.get(_RESIDENCY_VARIABLE, "auto"))
    """Form of the weights in memory: ``dense`` (decoded once at load, runs at the speed of the
    dense model), ``packed`` (fixed-width codes, with kernels for CUDA and CPUs), ``entropy`` (a
    prefix code of about the stored size, with kernels for CUDA), ``stored`` (only the stored bytes,
    decoded in every forward pass), or ``auto``, which chooses ``dense`` unless a CUDA device lacks
    the memory for it. The environment variable ``WATERSIC_RESIDENCY`` sets the default."""

    backend: str = field(default_factory=lambda: os.environ.get(BACKEND_VARIABLE, "auto"))
    """Implementation of products with ``packed`` and ``entropy`` weights on CUDA: ``triton``,
    ``reference``, or ``auto``, which uses Triton if it can be imported. The environment variable
    ``WATERSIC_BACKEND`` sets the default, and also chooses what quantizes on CUDA."""

    def __post_init__(self) -> None:
        if self.residency not in RESIDENCIES:
            raise ValueError(f"residency is {self.residency!r}, but must be one of {RESIDENCIES}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, but must be one of {BACKENDS}")


def _check_bits(name: str, value: Any) -> None:
    low, high = BITS_RANGE
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, but must be a number from {low} to {high:g}")


def _check_layer_bits(name: str, value: Mapping[str, float]) -> None:
    check_pattern_mapping(name, value)
    for pattern, bits in value.items():
        _check_bits(pattern, bits)


def _check_vocabulary_bits(name: str, value: bool | float) -> None:
    if not isinstance(value, bool):
        _check_bits(f"{name}, if it is neither True nor False,", value)


def _check_zero_rows(name: str, value: Mapping[str, list[int]] | str | None) -> None:
    if value is None or value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(f'{name} is {value!r}, but must be "auto" or a mapping')
    check_pattern_mapping(name, value)
    for pattern, rows in value.items():
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise ValueError(
                f"{name}: the rows of {pattern!r} are {rows!r}, but must be a list of numbers"
            )


def _check_format_version(name: str, value: int) -> None:
    if value > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has format version {value}; this version of watersic_hf reads up to "
            f"{FORMAT_VERSION}. Run `pip install -U watersic-hf`."
        )


@with_arguments
@dataclass(eq=False, repr=False)
class WaterSICConfig(QuantizationConfigMixin):
    r"""Configuration of WaterSIC quantization (arXiv 2603.04956) for `from_pretrained`.

    Args:
        {arguments}

    Raises:
        ValueError: a value is out of range, or the format is newer than this package reads.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)

    bits: float = setting(
        3.0,
        "average number of stored bits per quantized weight, from 0.75 to 8",
        "Counts everything that is stored for the linear layers of the blocks: codes, symbol "
        "tables, classes, offsets, scales and checksums.",
        check=_check_bits,
        option="--bits",
    )
    _: KW_ONLY
    dataset: Any = setting(
        None,
        "calibration set: self, pydoc, wikitext2, c4, a file, a name on the Hub, or none",
        "Also accepts a list of strings, token ids or a `datasets.Dataset`; see "
        "`watersic_hf.calibration.calibration_windows`. None quantizes without data, one tensor "
        "at a time while the model loads: fast and with little memory, but clearly less accurate. "
        "The command ``watersic quantize`` has another default, pydoc.",
        option="--dataset",
    )
    tokenizer: Any = setting(
        None,
        "tokenizer of the calibration text, or its folder or name on the Hub",
        default_text="the model's own",
        saved=False,
        option="--tokenizer",
    )
    samples: int = setting(
        128, "number of calibration windows", check=positive_integer, option="--samples"
    )
    sequence_length: int = setting(
        2048, "tokens per calibration window", check=positive_integer, option="--sequence-length"
    )
    batch_size: int = setting(
        2,
        "number of calibration windows that pass through a block at a time",
        "More takes more memory, and is faster only on a GPU; the result is the same.",
        check=positive_integer,
        saved=False,
        option="--batch-size",
    )
    layer_bits: Mapping[str, float] | None = setting(
        None,
        "bits per weight of the layers that match a pattern",
        r'A pattern is a regular expression for whole dotted components: ``{"down_proj": 3.5, '
        r'r"layers\.0": 4}``. The first pattern that matches counts. All other layers get '
        "`bits`; what the layers of a pattern do not use stays in the budget of all layers.",
        default_text="none",
        check=_check_layer_bits,
        option="--layer-bits",
        metavar="PATTERN=BITS",
    )
    quantize_head: bool | float = setting(
        False,
        "also quantize the output head, at 4 bits per weight or at the given number",
        "Its bits are not part of the budget `bits`.",
        check=_check_vocabulary_bits,
    )
    quantize_embeddings: bool | float = setting(
        False,
        "also quantize the input embedding, at 4 bits per weight or at the given number",
        "Its bits are not part of the budget `bits`. A head that is tied to the embedding is the "
        "same matrix: either of the two settings quantizes it for both uses.",
        check=_check_vocabulary_bits,
    )
    modules_to_not_convert: list[str] | None = setting(
        None,
        "patterns of layers that are not quantized",
        "The patterns are those of `layer_bits`; a string is one pattern. A pattern that matches "
        "no module of the model is an error.",
        check=check_patterns,
        option="--skip",
        metavar="PATTERN",
    )
    zero_rows: Mapping[str, list[int]] | str | None = setting(
        None,
        "rows of weights to set to zero before quantization: row numbers by pattern, or auto",
        "Meant for channels with massive activations (the paper's dead rows), in models that "
        'cannot be quantized well with them; it changes the model. ``"auto"`` finds such rows on '
        "the calibration windows. The patterns are those of `layer_bits`.",
        check=_check_zero_rows,
    )
    damping: float | None = setting(
        None,
        "constant that is added to the diagonal of the inputs' second moment, relative to the mean "
        "of the diagonal",
        default_text="4 times the median of the diagonal times columns over calibration tokens, "
        "at least 1e-4 of the mean",
    )
    allocation: str = setting(
        CalibrationSettings.allocation,
        "how bits are distributed among the layers: sensitivity or uniform",
        '``"sensitivity"`` gives more bits to the layers whose errors change the predictions of '
        "the model most, measured by the Fisher information on a few calibration windows; it goes "
        'half of the way to the theoretical optimum. ``"uniform"`` gives all layers the same.',
    )
    row_importance: bool = setting(
        CalibrationSettings.row_importance,
        "choose a quantization step per row of a weight, by the same sensitivities",
    )
    drift: float = setting(
        CalibrationSettings.drift,
        "strength of activation-drift and residual-error correction, from 0 (off) to 1",
        "Above 0 the original model runs alongside the quantized one (paper, drift correction).",
    )
    residual: bool = setting(
        CalibrationSettings.residual,
        "also compensate for the error of the residual stream, in the layers that write to it",
        "`drift` is the strength of both (paper, residual compensation).",
    )
    attention: float = setting(
        CalibrationSettings.attention,
        "fraction of the statistics of q, k and v, from 0 to 1, that weights tokens by the "
        "attention they receive",
        "The rest weights all tokens equally (paper, attention weighting).",
    )
    mixing: bool = setting(
        CalibrationSettings.mixing,
        "search for the best drift and attention for q, k and v of every block",
        "They replace the two settings there (paper, adaptive mixing).",
    )
    lattice: str = setting(
        "trellis",
        "what weights are rounded to: trellis or scalar",
        '``"trellis"`` searches a path through a trellis of eight states, down every column, for '
        "5 % fewer bytes at the same quality; on a CPU it needs numba, which is installed with "
        'this package where it has wheels.  ``"scalar"`` rounds each weight on its own; '
        "compressed products with its codes take fewer instructions.",
        option="--lattice",
    )
    rescale: bool = setting(
        LayerSettings.rescale, "fit a scale per row and per column after rounding"
    )
    seed: int = setting(
        0,
        "seed of the calibration windows and of the rate search",
        "The same seed produces the same file.",
        option="--seed",
    )
    left_dense: Mapping[str, str] | None = setting(
        None,
        "modules that are not quantized, with the reason for each; set by the quantizer",
        option=None,
    )
    tables: Sequence[str] = setting(
        (),
        "names of the vocabulary matrices that are quantized; set by the quantizer",
        option=None,
    )
    runtime: WaterSICRuntime | Mapping[str, Any] | None = setting(
        None,
        "how this process runs the layers: a `WaterSICRuntime`, or its fields as a dict",
        "Also respected when a quantized model is loaded, and never saved.",
        saved=False,
        option=None,
    )
    format_version: int = setting(
        FORMAT_VERSION,
        "version of the checkpoint format; set by the file, not by the user",
        check=_check_format_version,
        option=None,
    )

    def __post_init__(self) -> None:
        self.layer_bits = {} if self.layer_bits is None else self.layer_bits
        self.modules_to_not_convert = pattern_list(self.modules_to_not_convert)
        self.left_dense = dict(self.left_dense or {})
        self.tables = list(self.tables)
        if not isinstance(self.runtime, WaterSICRuntime):
            self.runtime = WaterSICRuntime(**(self.runtime or {}))
        self.quant_method = QUANT_METHOD
        self._unknown: dict[str, Any] = {}
        for name, declared in settings_of(self).items():
            if declared.check is not None:
                declared.check(name, getattr(self, name))
        self.layer_bits = dict(self.layer_bits)
        # these check their values themselves
        _ = self.settings, self.calibration

    @property
    def settings(self) -> LayerSettings:
        """Settings of the method for one layer."""
        return self._select(LayerSettings)

    @property
    def calibration(self) -> CalibrationSettings:
        """Settings of the method that concern several layers; without a dataset they do nothing."""
        return self._select(CalibrationSettings)

    def _select(self, kind: type[_Settings]) -> _Settings:
        """Return a `kind` that is filled with the settings of the same names."""
        names = settings_of(self).keys() & {f.name for f in fields(kind)}
        return kind(**{name: getattr(self, name) for name in names})

    def bits_of(self, layer: str) -> float:
        """Return the requested bits of a layer: those of the first matching pattern, or `bits`."""
        pattern = module_matches(layer, self.layer_bits)
        return self.bits if pattern is None else self.layer_bits[pattern]

    @property
    def head_bits(self) -> float | None:
        """Requested bits per weight of the output head; None leaves it dense."""
        return _vocabulary_bits(self.quantize_head)

    @property
    def embedding_bits(self) -> float | None:
        """Requested bits per weight of the input embedding; None leaves it dense."""
        return _vocabulary_bits(self.quantize_embeddings)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a user may choose anew when a quantized model is loaded."""
        return {"runtime": self.runtime}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Rebuild a configuration from `to_dict`; keys of newer versions are kept.

        Args:
            config_dict: what `to_dict` returned.
            return_unused_kwargs: also return the entries of `kwargs` that are not settings.
            kwargs: values that replace those of `config_dict`.
        """
        known = config_dict.keys() & settings_of(cls).keys()
        values = {name: config_dict[name] for name in known}
        if "format_version" in known:
            # a model that was saved before there was a choice
            values.setdefault("lattice", "scalar")
        found = super().from_dict(values, return_unused_kwargs, **kwargs)
        config = found[0] if return_unused_kwargs else found
        others = {name: value for name, value in config_dict.items() if name not in known}
        others.pop("quant_method", None)
        config._unknown = others
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the saved settings as JSON holds them, with the keys of newer versions."""
        saved = {"quant_method": QUANT_METHOD}
        # torch.compile traces this and `__deepcopy__` in encoder-decoders, but no dataclass fields
        for name, value in vars(self).items():
            if not name.startswith("_") and name not in _NOT_SAVED:
                saved[name] = value
        saved["dataset"] = describe(self.dataset)
        return copy.deepcopy(saved) | self._unknown

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WaterSICConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json_string())

    def __deepcopy__(self, memo: dict) -> "WaterSICConfig":
        clone = copy.copy(self)
        for name, value in vars(self).items():
            # the tokenizer and the data are shared: they may be large, or not copyable
            if name in ("dataset", "tokenizer"):
                continue
            # no copy.copy, which torch.compile cannot trace
            if isinstance(value, dict):
                setattr(clone, name, dict(value))
            elif isinstance(value, list):
                setattr(clone, name, list(value))
        memo[id(self)] = clone
        return clone


_NOT_SAVED = tuple(name for name, s in settings_of(WaterSICConfig).items() if not s.saved)


def _vocabulary_bits(value: bool | float) -> float | None:
    if isinstance(value, bool):
        return VOCABULARY_BITS if value else None
    return value
