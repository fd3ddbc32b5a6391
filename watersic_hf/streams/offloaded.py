"""The blocks of a model that stay on the disk, and are in memory one at a time."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from watersic_hf.checkpoint import CheckpointError, reading
from watersic_hf.streams.blocks import ResidentBlocks
from watersic_hf.streams.memory import return_large_tensors, trim_memory
from watersic_hf.streams.precision import fast_dtype

#: Bytes between two that are read to bring a file into the system's cache.
_PAGE = 4096
_PARTS = ("_modules", "_parameters", "_buffers")


class BlockLayers(Protocol):
    """What is done to the layers of a block when its weights arrive, and before it is stored."""

    def open(self, part: nn.Module, prefix: str) -> None:
        """Prepare the layers of a block for calibration; `prefix` begins their names."""
        ...

    def close(self, part: nn.Module, prefix: str) -> None:
        """Undo `open` for layers that are still dense."""
        ...


class OffloadedBlocks(ResidentBlocks):
    """The blocks of a model that accelerate loaded with them on the disk.

    While nobody holds a block its weights are on meta.  In one that is held, they have the dtype
    that the device computes in fast; the rest of the model is to have it, too (`computing_fast`).
    Meanwhile, the block that is likely to be next is read ahead into the system's file cache.

    Args:
        model: the model; the hooks of accelerate are removed from it.
        blocks: its blocks, by name, in order.
        device: device of a block while it is held.
        layers: opens the layers of a block that is held, and closes them before it is stored.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        device: torch.device | str,
        *,
        layers: BlockLayers,
    ) -> None:
        super().__init__(torch.device(device))
        return_large_tensors()
        self.blocks = dict(blocks)
        self.layers = layers
        self._last = ""
        # of the tensors of the block that is held, in the files
        self._dtypes: dict[str, torch.dtype] = {}
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
        """Have the weights of a block, called `name` in the model, on the device meanwhile."""
        before = [[dict(getattr(m, part)) for part in _PARTS] for m in block.modules()]
        modules = list(block.modules())
        # experts are of another class while they are separate
        kinds = [type(module) for module in modules]
        try:
            self._dtypes.clear()
            for tensor, (weights, key) in self._weights[name].items():
                value = self._read(f"{name}.{tensor}", weights, key)
                self._dtypes[tensor] = value.dtype
                _set_tensor(block, tensor, self._to_device(value))
            for module in modules:
                for buffer, value in module._buffers.items():
                    if value is not None:
                        module._buffers[buffer] = self._to_device(value)
            self.layers.open(block, f"{name}.")
            self._read_ahead(name)
            yield
        finally:
            for module, kind, parts in zip(modules, kinds, before, strict=True):
                module.__class__ = kind
                for part, entries in zip(_PARTS, parts, strict=True):
                    getattr(module, part).clear()
                    getattr(module, part).update(entries)
            trim_memory()

    @contextmanager
    def flow(self) -> Iterator[None]:
        """Have every block's weights while the block runs in its model, and at no other time.

        Blocks with a forward of their own on the module, as those whose output is known already,
        need no weights.
        """
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
        """Run the forward of a block that is held meanwhile, and again for its gradient."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.hold(name, block):
                return forward(*args, **kwargs)

        if torch.is_grad_enabled():
            # a graph would hold the weights
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    def spare_memory(self, block: nn.Module) -> int:
        """Return the bytes that outputs of a block may take; 0 on a CPU, whose memory is short."""
        return 0 if self.device.type == "cpu" else super().spare_memory(block)

    def mapped(self, name: str) -> dict[str, Tensor]:
        """Return the original tensors of a block, mapped into memory, by name in the model."""
        tensors = self._weights[name].items()
        return {f"{name}.{tensor}": weights[key] for tensor, (weights, key) in tensors}

    def stored(self, name: str, block: nn.Module) -> dict[str, Tensor]:
        """Return what to store of a finished block, while it is held, by name within it."""
        self.layers.close(block, f"{name}.")
        tensors = block.state_dict()
        for tensor, value in tensors.items():
            # what was cast to compute with it
            if value.dtype == torch.float32:
                tensors[tensor] = value.to(self._dtypes.get(tensor, value.dtype))
        return tensors

    def _read(self, tensor: str, weights: Mapping[str, Tensor], key: str) -> Tensor:
        """Return a tensor, mapped into memory."""
        advice = "Download or copy the model's file again; what is finished is kept."
        with reading(tensor, advice):
            return weights[key]

    def _to_device(self, value: Tensor) -> Tensor:
        """Return a copy of a tensor as the device of blocks computes with it."""
        return value.to(self.device, fast_dtype(value.dtype, self.device), copy=True)

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


def _offloaded(block: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """Return what accelerate reads every tensor of a block from, and under which name."""
    found = {}
    for prefix, module in block.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights = getattr(part, "weights_map", None)
            for tensor, value in (*module._parameters.items(), *module._buffers.items()):
                if weights is not None and value is not None and value.device.type == "meta":
                    found[f"{prefix}.{tensor}".lstrip(".")] = weights, tensor
    return found


def _set_tensor(block: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer of a block."""
    module_name, _, tensor = name.rpartition(".")
    module = block.get_submodule(module_name)
    if tensor in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
        # read by transformers: it is not to be initialised at random
        value._is_hf_initialized = True
    setattr(module, tensor, value)


def _touch(tensors: list[tuple[Mapping[str, Tensor], str]]) -> None:
    """Read tensors into the system's file cache; damage is reported when a tensor is used."""
    with suppress(CheckpointError), reading("the next block", ""):
        for weights, key in tensors:
            weights[key].reshape(-1).view(torch.uint8)[::_PAGE].sum()
