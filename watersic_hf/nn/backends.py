"""Which implementation runs where: the only module that imports the kernels.

Kernels are imported inside the branch that needs them, so that ``import watersic_hf`` imports
neither Triton nor numba.
"""

import functools
import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.core import BlockStep, PathSearch, zsic_block
from watersic_hf.core.trellis import FIRST_LEVEL, PER_OCTAVE, Trellis, code_costs

logger = logging.getLogger(__name__)

#: Implementations of products: ``auto`` is Triton on CUDA and compiled code on CPUs where they can
#: be imported, and otherwise the reference, with a warning; ``triton`` demands Triton on CUDA;
#: ``reference`` has no kernels and is for comparison.
BACKENDS = ("auto", "triton", "reference")
#: Environment variable that sets the backend where no argument does.
BACKEND_VARIABLE = "WATERSIC_BACKEND"


@functools.cache
def triton_kernels(backend: str) -> ModuleType | None:
    """Import the Triton kernels; return None if that fails and `backend` is not ``triton``."""
    try:
        import watersic_kernels.packed
        import watersic_kernels.prefix
        import watersic_kernels.rans
        import watersic_kernels.trellis
        import watersic_kernels.zsic
    except ImportError as error:
        if backend == "triton":
            raise
        logger.warning(
            "The Triton kernels cannot be imported: %s. Quantization and products with compressed "
            "weights use slow reference code. Install triton, or use the residency `dense`, whose "
            "products need no kernel.",
            error,
        )
        return None
    return watersic_kernels


def kernels_on(device: torch.device, backend: str) -> ModuleType | None:
    """Return the Triton kernels; None stands for the reference, which other devices always use."""
    return triton_kernels(backend) if device.type == "cuda" and backend != "reference" else None


@functools.cache
def cpu_kernels() -> ModuleType | None:
    """Return the compiled products and packing for CPUs, or None if numba cannot be imported."""
    try:
        import watersic_kernels.cpu.pack
        import watersic_kernels.cpu.packed
        import watersic_kernels.cpu.prefix
    except ImportError as error:
        logger.warning(
            "numba cannot be imported: %s. Weights are packed for the residency `packed` some "
            "twenty times slower, and products with it and with `entropy` decode the whole weight "
            "with slow reference code at every call. Run `pip install numba`, or use the residency "
            "`dense`.",
            error,
        )
        return None
    return watersic_kernels.cpu


def product_kernels(x: Tensor, backend: str) -> ModuleType | None:
    """Return the kernels that multiply `x` with a compressed weight; None is the reference.

    Args:
        x: input of the layer.
        backend: one of `BACKENDS`.

    Raises:
        ImportError: `backend` is ``triton``, x is on CUDA, and Triton cannot be imported.
    """
    # the compiled products compute in float32
    if x.device.type == "cpu" and backend != "reference" and x.dtype != torch.float64:
        return cpu_kernels()
    return kernels_on(x.device, backend)


def block_step(device: torch.device) -> BlockStep:
    """Return the function with which `watersic_hf.core.zsic` quantizes a block of columns.

    Args:
        device: device of the weight.  CUDA devices use a kernel, unless the environment variable
            `BACKEND_VARIABLE` says ``reference``; CPUs use code that numba compiles, or torch
            where numba is missing.

    Raises:
        ImportError: the backend is ``triton`` and Triton cannot be imported.
    """
    kernels = kernels_on(device, os.environ.get(BACKEND_VARIABLE, "auto"))
    if kernels is not None:
        return functools.partial(_triton_step, kernels.zsic.quantize_block)
    compiled = _compiled_zsic() if device.type == "cpu" else None
    return zsic_block if compiled is None else functools.partial(_compiled_step, compiled)


def _triton_step(
    quantize_block: BlockStep, *arguments: Any, trellis: Trellis | None = None
) -> None:
    """Quantize a block with a kernel; the search through a trellis is a kernel per column."""
    if trellis is None:
        quantize_block(*arguments)
    else:
        zsic_block(*arguments, trellis=trellis)


def _compiled_step(
    kernels: ModuleType,
    target_BA: Tensor,
    chol_BB: Tensor,
    step: float,
    *out: Tensor,
    trellis: Trellis | None = None,
) -> None:
    """Quantize a block with compiled code; the contract is that of `zsic_block`."""
    chol = chol_BB.contiguous().numpy()
    arguments = (target_BA.numpy(), chol, step, *(tensor.numpy() for tensor in out))
    if trellis is None:
        kernels.quantize_block(*arguments)
        return
    costs = trellis.level_A.numpy(), code_costs().numpy(), trellis.path.rows
    kernels.quantize_block_by_path(*arguments, *costs, (float(PER_OCTAVE), FIRST_LEVEL))


@functools.cache
def _compiled_zsic() -> ModuleType | None:
    try:
        import watersic_kernels.cpu.zsic
    except ImportError as error:
        logger.warning(
            "numba cannot be imported: %s. The recursion over columns runs in torch, several times "
            "slower. Run `pip install numba`.",
            error,
        )
        return None
    return watersic_kernels.cpu.zsic


def path_search(device: torch.device) -> PathSearch:
    """Return the search through the trellis of `watersic_hf.core.trellis` for weights on a device.

    Args:
        device: device of the weight; CUDA devices use a kernel, unless the environment variable
            `BACKEND_VARIABLE` says ``reference``.  All others search on the CPU, with numba.

    Raises:
        ImportError: numba, or Triton if the backend is ``triton``, cannot be imported.
    """
    kernels = kernels_on(device, os.environ.get(BACKEND_VARIABLE, "auto"))
    if kernels is not None:
        return kernels.trellis.search_path
    try:
        from watersic_kernels.cpu.trellis import search_path
    except ImportError as error:
        raise ImportError(
            f"the lattice `trellis` needs numba, which cannot be imported: {error}. "
            "Run `pip install numba`, or use the lattice `scalar`, which takes about 5 % more "
            "bytes for the same quality."
        ) from error

    def search(target_A: Tensor, level_A: Tensor, cost_KQV: Tensor, path_rows: int) -> Tensor:
        arrays = (tensor.cpu().contiguous().numpy() for tensor in (target_A, level_A, cost_KQV))
        return torch.from_numpy(search_path(*arrays, path_rows)).to(target_A.device)

    return search


@functools.cache
def compiled_codec() -> ModuleType | None:
    """Return the compiled functions of the codec, or None if numba cannot be imported."""
    try:
        import watersic_kernels.cpu.codec
    except ImportError as error:
        logger.warning(
            "numba cannot be imported: %s. Quantized layers are encoded and decoded by numpy, some "
            "five times slower. Run `pip install numba`.",
            error,
        )
        return None
    return watersic_kernels.cpu.codec


codec.use_compiled(compiled_codec)
