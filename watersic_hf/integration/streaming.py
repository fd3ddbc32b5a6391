"""A model whose blocks stay on the disk, and are in memory one at a time.

transformers and accelerate load it with the blocks offloaded: the names, dtypes and conversions of
tensors, ties and buffers are theirs.  Tensors that are in the files as the model has them are read
from there when their block is held; others are converted once, into a folder.
"""

import ctypes
import functools
import hashlib
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import cached_file

from watersic_hf.checkpoint import CheckpointError, reading
from watersic_hf.integration.dense import linear_layers, towers_without_text
from watersic_hf.quantization import Journal
from watersic_hf.streams import ResidentBlocks, block_stacks

logger = logging.getLogger(__name__)

#: Bytes between those that are read to have a file in the system's cache.
_PAGE = 4096
#: Places of a file by which it is told from others, from its first byte to its last.
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
#: Bytes from which the memory of a tensor is given back at once.
_LARGE = 1 << 20
#: A parameter of glibc's `mallopt`.
_M_MMAP_THRESHOLD = -3
_PARTS = ("_modules", "_parameters", "_buffers")


def empty_model(model_class: Any, config: Any) -> nn.Module:
    """The model of a configuration on meta: its modules and shapes, and no memory."""
    # a class of an architecture, or one that finds it
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        return build(config)


def open_on_disk(
    model_class: Any, name: str, config: Any, *, dtype: Any, folder: Path
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Load a model with its blocks on the disk.

    Args:
        model_class: that has `from_pretrained`.
        name: folder or hub name.
        config: of the model.
        dtype: as in `from_pretrained`.
        folder: for tensors that are not in the files as the model has them.

    Returns:
        The model, and its blocks by name.

    Raises:
        ValueError: no list of modules holds linear layers.
    """
    empty = empty_model(model_class, config)
    towers = tuple(f"{name}." for name in towers_without_text(empty))
    layers = [name for name in linear_layers(empty) if not name.startswith(towers)]
    names = [name for stack in block_stacks(empty, layers) for name, _ in stack]
    stacks = {name.rpartition(".")[0] for name in names}
    model = model_class.from_pretrained(
        name, dtype=dtype, device_map=_blocks_on_disk(empty, stacks), offload_folder=str(folder)
    )
    return model, {name: model.get_submodule(name) for name in names}


def fingerprint(name: str) -> str:
    """By what a model's files are told from others: names, sizes, headers and samples of them.

    Args:
        name: folder or hub name.
    """
    folder = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
    digest = hashlib.sha256()
    files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json")]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for part in range(_SAMPLES):
                handle.seek(part * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _blocks_on_disk(model: nn.Module, stacks: Collection[str]) -> dict[str, str]:
    """A device map with the modules of `stacks` on the disk, and all else on the CPU."""
    found: dict[str, str] = {}

    def place(module: nn.Module, name: str) -> None:
        if name in stacks:
            found[name] = "disk"
        elif name and not any(stack.startswith(f"{name}.") for stack in stacks):
            found[name] = "cpu"
        else:
            prefix = f"{name}." if name else ""
            found.update((f"{prefix}{n}", "cpu") for n in (*module._parameters, *module._buffers))
            for child, part in module.named_children():
                place(part, f"{prefix}{child}")

    place(model, "")
    return found


class StreamedBlocks(ResidentBlocks):
    """The blocks of a model that was loaded with them on the disk.

    While nobody holds a block its weights are on meta.  When one is held, the one that is likely to
    be next is read ahead into the system's file cache.

    Args:
        model: the model; what accelerate hooked into it is taken out.
        blocks: its blocks, by name, in order.
        device: where a block is while it is held.
        prepare: what is done to a block when it has its weights, given its name.
        settle: what is done to a block before it is stored, given its name.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        device: torch.device | str,
        *,
        prepare: Callable[[str, nn.Module], None],
        settle: Callable[[str, nn.Module], None],
    ) -> None:
        super().__init__(torch.device(device))
        _return_large_tensors()
        self.blocks = dict(blocks)
        self._prepare = prepare
        self._settle = settle
        self._last = ""
        self._reader: threading.Thread | None = None
        self._weights = {name: _offloaded(block) for name, block in blocks.items()}
        remove_hook_from_module(model, recurse=True)
        for module in model.modules():
            # accelerate leaves the class's own forward on every module
            vars(module).pop("forward", None)
        # it is saved as a model that is in memory
        del model.hf_device_map

    @contextmanager
    def hold(self, name: str, block: nn.Module) -> Iterator[None]:
        """Have the weights of a block, called `name` in the model, where they are computed with."""
        before = [[dict(getattr(m, part)) for part in _PARTS] for m in block.modules()]
        modules = list(block.modules())
        # experts are of another class while they are separate
        kinds = [type(module) for module in modules]
        try:
            for tensor, (weights, key) in self._weights[name].items():
                _put(block, tensor, self._read(f"{name}.{tensor}", weights, key))
            for module in modules:
                for buffer, value in module._buffers.items():
                    if value is not None:
                        module._buffers[buffer] = value.to(self.device)
            self._prepare(name, block)
            self._read_ahead(name)
            yield
        finally:
            for module, kind, parts in zip(modules, kinds, before, strict=True):
                module.__class__ = kind
                for part, entries in zip(_PARTS, parts, strict=True):
                    getattr(module, part).clear()
                    getattr(module, part).update(entries)
            give_back_memory()

    @contextmanager
    def flow(self) -> Iterator[None]:
        """Have every block's weights while the block runs in its model, and at no other time.

        Blocks that something else runs for, as what is known of their output, need no weights.
        """
        # those that have no forward of their own yet
        flowing = {n: b for n, b in self.blocks.items() if "forward" not in vars(b)}
        for name, block in flowing.items():
            block.forward = functools.partial(self._run, name, block, block.forward)
        try:
            yield
        finally:
            for block in flowing.values():
                del block.forward

    def _run(
        self, name: str, block: nn.Module, forward: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """The forward of a block that is held meanwhile, and again for its gradient."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.hold(name, block):
                return forward(*args, **kwargs)

        if torch.is_grad_enabled():
            # a graph would hold the weights
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    def mapped(self, name: str) -> dict[str, Tensor]:
        """The original tensors of a block, mapped into memory, by name in the model."""
        tensors = self._weights[name].items()
        return {f"{name}.{tensor}": weights[key] for tensor, (weights, key) in tensors}

    def stored(self, name: str, block: nn.Module) -> dict[str, Tensor]:
        """What is stored of a block that is finished, while it is held, by name within it."""
        self._settle(name, block)
        return block.state_dict()

    def _read(self, tensor: str, weights: Mapping[str, Tensor], key: str) -> Tensor:
        """A tensor in memory of its own, where blocks are held."""
        advice = "Download or copy the model's file again; what is finished is kept."
        with reading(tensor, advice):
            value = weights[key]
        return value.clone() if value.device == self.device else value.to(self.device)

    def _read_ahead(self, name: str) -> None:
        """Read the block that is likely to follow into the system's file cache."""
        names = list(self.blocks)
        last, here = names.index(self._last or name), names.index(name)
        self._last = name
        following = here + (here - last if abs(here - last) == 1 else 1)
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        if 0 <= following < len(names):
            tensors = list(self._weights[names[following]].values())
            self._reader = threading.Thread(target=_touch, args=(tensors,), daemon=True)
            self._reader.start()


@dataclass(frozen=True, kw_only=True)
class StreamedRun:
    """What quantizes a model block by block from the disk."""

    source: StreamedBlocks
    journal: Journal
    windows: list[Tensor]


def _offloaded(block: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """For every tensor of a block, what accelerate reads it from, and under which name."""
    found = {}
    for prefix, module in block.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights = getattr(part, "weights_map", None)
            for tensor, value in (*module._parameters.items(), *module._buffers.items()):
                if weights is not None and value is not None and value.device.type == "meta":
                    found[f"{prefix}.{tensor}".lstrip(".")] = weights, tensor
    return found


def _put(block: nn.Module, name: str, value: Tensor) -> None:
    """Give a tensor of a block its value."""
    module_name, _, tensor = name.rpartition(".")
    module = block.get_submodule(module_name)
    if tensor in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
        # read by transformers: it is not to be initialised at random
        value._is_hf_initialized = True
    setattr(module, tensor, value)


def _touch(tensors: list[tuple[Mapping[str, Tensor], str]]) -> None:
    """Have tensors in the system's file cache; what cannot be read is found when it is needed."""
    with suppress(CheckpointError), reading("the next block", ""):
        for weights, key in tensors:
            weights[key].reshape(-1).view(torch.uint8)[::_PAGE].sum()


def give_back_memory() -> None:
    """Give freed memory back: glibc keeps gigabytes of it after many large temporary tensors."""
    _c_library(lambda library: library.malloc_trim(0))


def _return_large_tensors() -> None:
    """Have the memory of large tensors given back as soon as they are freed.

    glibc does so above a size that grows with what is freed, up to 32 MB.
    """
    _c_library(lambda library: library.mallopt(_M_MMAP_THRESHOLD, _LARGE))


def _c_library(use: Callable[[Any], object]) -> None:
    if sys.platform == "linux":
        try:
            use(ctypes.CDLL("libc.so.6"))
        except (OSError, AttributeError):
            logger.debug("this C library is not glibc, and its memory is left to it")
