"""Where the bytes of a model are, in any format of safetensors or GGUF files."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, hf_hub_download
from transformers import AutoConfig

from watersic_hf.checkpoint import checkpoint_files, layer_shape, read_headers, stored_layers
from watersic_hf.integration.examination import kind_of
from watersic_hf.integration.names import names_in_model
from watersic_hf.integration.source import ModelSource

logger = logging.getLogger(__name__)

#: Groups of modules by what their names contain, in this order; the rest are layers.
_GROUPS = (
    ("embeddings", r"embe?d|\bw[tp]e\b"),
    ("output head", r"lm_head|^output\b|embed_out"),
    ("norms", r"norm|\bln_|layernorm"),
)


@dataclass(frozen=True, kw_only=True)
class AuditedTensor:
    """One tensor of a file."""

    name: str
    dtype: str
    """Name of the dtype or of the block format, as the file calls it."""
    elements: int
    """Number of elements as stored; of a GGUF tensor, that of the original one."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """The modules of one kind, in all blocks."""

    name: str
    """Name of the modules, with ``*`` for numbers."""
    group: str
    """``layers``, ``embeddings``, ``output head`` or ``norms``."""
    modules: int
    parameters: int
    """Number of original parameters, whatever the format stores."""
    nbytes: int
    dtypes: str
    """The dtypes of the tensors, joined by ``+``."""

    @property
    def bits(self) -> float:
        """Stored bits per parameter, everything included that belongs to the modules."""
        return 8 * self.nbytes / max(1, self.parameters)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The bytes of a model."""

    rows: tuple[AuditRow, ...]
    other_bytes: int | None
    """Bytes of the files that are no tensor: headers, metadata, padding; None if not known."""
    exact: bool
    """Whether the numbers of parameters are those of the architecture, or of a format that tells
    them; otherwise what the files hold is counted, and packed integers are fewer than weights."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(row.nbytes for row in self.rows) + (self.other_bytes or 0)

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """Parameters and bytes of every group."""
        names = dict.fromkeys(row.group for row in self.rows)
        return {
            name: (
                sum(row.parameters for row in self.rows if row.group == name),
                sum(row.nbytes for row in self.rows if row.group == name),
            )
            for name in names
        }


def audit(name: str) -> Audit:
    """Return where the bytes of a model are.

    Only headers are read.

    Args:
        name: folder, safetensors or GGUF file, or name on the Hub; a GGUF file on the Hub as
            ``owner/name/file.gguf``, which is downloaded.

    Raises:
        CheckpointError: a file is damaged, or a folder has none.
        ImportError: a GGUF file is to be read, and the package gguf is not installed.
    """
    path = Path(name)
    if name.endswith(".gguf") and not path.exists():
        repository, _, file = name.rpartition("/")
        path = Path(hf_hub_download(repository, file))
    if path.is_dir() and not any(path.glob("*.safetensors")) and any(path.glob("*.gguf")):
        return _audit_gguf(sorted(path.glob("*.gguf")))
    if path.suffix == ".gguf":
        return _audit_gguf([path])
    if path.is_file():
        return _audit_safetensors([path], None)
    if path.is_dir():
        return _audit_safetensors(checkpoint_files(path), name)
    tensors = [
        AuditedTensor(
            name=tensor,
            dtype=entry.dtype,
            elements=entry.parameter_count,
            nbytes=entry.data_offsets[1] - entry.data_offsets[0],
        )
        for file in get_safetensors_metadata(name).files_metadata.values()
        for tensor, entry in file.tensors.items()
    ]
    return _audit(tensors, _parameters_of(name), str, None)


def _audit_gguf(files: Sequence[Path]) -> Audit:
    """Audit GGUF files; each of their tensors tells its original size."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("to audit a GGUF file, install gguf: `pip install gguf`") from error
    tensors = [
        AuditedTensor(
            name=tensor.name,
            dtype=tensor.tensor_type.name,
            elements=int(tensor.n_elements),
            nbytes=int(tensor.n_bytes),
        )
        for file in files
        for tensor in gguf.GGUFReader(file).tensors
    ]
    found = _audit(tensors, None, str, sum(file.stat().st_size for file in files))
    return replace(found, exact=True)


def _audit_safetensors(files: Sequence[Path], folder: str | None) -> Audit:
    headers = read_headers(files)
    tensors = [
        AuditedTensor(name=name, dtype=h.dtype, elements=math.prod(h.shape), nbytes=h.nbytes)
        for name, h in headers.items()
    ]
    parameters = None if folder is None else _parameters_of(folder)
    if parameters is None:
        # without the architecture, the scales of our own layers tell their size
        stored = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
        sizes = {layer: layer_shape(shapes) for layer, shapes in stored.items()}
        tensors = [
            AuditedTensor(name=t.name, dtype=t.dtype, elements=_own(t, sizes), nbytes=t.nbytes)
            for t in tensors
        ]
    renamed = names_in_model(folder) if folder is not None else str
    return _audit(tensors, parameters, renamed, sum(file.stat().st_size for file in files))


def _own(tensor: AuditedTensor, sizes: Mapping[str, Sequence[int]]) -> int:
    """Return the number of original parameters that a tensor stands for."""
    layer, _, field = tensor.name.rpartition(".")
    if layer not in sizes or field == "bias":
        return tensor.elements
    return math.prod(sizes[layer]) if field == "weight" else 0


def _audit(
    tensors: Iterable[AuditedTensor],
    parameters: Mapping[str, int] | None,
    renamed: Callable[[str], str],
    file_bytes: int | None,
) -> Audit:
    """Gather tensors by module, and modules by kind.

    Args:
        tensors: tensors of the files.
        parameters: parameters of every module that has some, by name; None: as in the files.
        renamed: from names of modules in the files to those in the model.
        file_bytes: bytes of the files.
    """
    modules: dict[str, list[AuditedTensor]] = {}
    for tensor in tensors:
        module = tensor.name.rpartition(".")[0] or tensor.name
        if parameters is not None:
            module = _module_of(renamed(module), parameters) or module
        modules.setdefault(module, []).append(tensor)
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module), []).append(module)
    rows = []
    for kind, names in kinds.items():
        held = [tensor for name in names for tensor in modules[name]]
        if parameters is None:
            count = sum(tensor.elements for tensor in held)
        else:
            count = sum(parameters.get(name, 0) for name in names)
        rows.append(
            AuditRow(
                name=kind,
                group=_group_of(kind),
                modules=len(names),
                parameters=count,
                nbytes=sum(tensor.nbytes for tensor in held),
                dtypes="+".join(sorted({tensor.dtype for tensor in held})),
            )
        )
    rows.sort(key=lambda row: -row.nbytes)
    stored = sum(row.nbytes for row in rows)
    other = None if file_bytes is None else file_bytes - stored
    return Audit(rows=tuple(rows), other_bytes=other, exact=parameters is not None)


def _group_of(kind: str) -> str:
    return next((group for group, pattern in _GROUPS if re.search(pattern, kind)), "layers")


def _module_of(name: str, parameters: Mapping[str, int]) -> str | None:
    """Return the module that a module of the files is, or is a part of; None if there is none."""
    parts = name.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in parameters), None)


def _parameters_of(name: str) -> dict[str, int] | None:
    """Return the parameters of every module of a model, from its configuration alone."""
    source = ModelSource(name=name)
    try:
        config: Any = AutoConfig.from_pretrained(name)
        for part in (config, getattr(config, "text_config", None)):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        model = source.empty_model(config)
    except Exception as error:
        # no config.json, or an architecture that transformers does not know
        logger.info("%s: its architecture is not known: %s", name, error)
        return None
    found: dict[str, int] = {}
    for parameter, value in model.named_parameters():
        module = parameter.rpartition(".")[0]
        found[module] = found.get(module, 0) + value.numel()
    return found
