"""Choice of the form that weights take in device memory, where the user left it to ``auto``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import get_max_memory

#: The forms that a weight can take in memory; see `PackedMatrix.set_residency`.
RESIDENCIES = ("auto", "dense", "packed", "entropy", "stored")

#: Bits per weight that a form takes beyond the stored ones, an upper bound for real layers.
PACKED_BITS, ENTROPY_BITS = 0.85, 0.12

#: Fraction of the free memory that weights may take; the rest is for activations and caches.
MEMORY_FRACTION = 0.7


@dataclass(frozen=True, kw_only=True)
class ResidencyInputs:
    """Inputs for resolving ``auto``: the facts about one layer."""

    device: torch.device
    """Device of the scales, where the weight is to be."""

    weights: int
    """Number of weights of the layer."""

    stored_bytes: int
    """Bytes of the payload."""

    dense_bytes_per_weight: int
    """Bytes of a weight in the dtype that it would be decoded to."""

    on_device: bool
    """Whether the payload is on the device now; another form would free its memory."""


def choose_residency(
    layers: Sequence[ResidencyInputs],
    *,
    free: int | None = None,
    fraction: float = MEMORY_FRACTION,
) -> tuple[str, str]:
    """Choose one residency for layers that share a device.

    Dense weights have the predictable speed of ordinary layers, so they are chosen if they leave
    enough memory; otherwise the faster compressed form that does.  On a CPU only ``packed`` has
    compiled products, and the payloads stay in memory.

    Args:
        layers: the layers on one device; at least one.
        free: free memory of the device in bytes; default: as the device reports it.
        fraction: fraction of it that the weights may take.

    Returns:
        The residency, and the reason for it, as a clause for the log.
    """
    device = layers[0].device
    if device.type not in ("cuda", "cpu"):
        return "dense", f"no compressed form has kernels on {device.type}"
    free = _free_memory_of(device) if free is None else free
    if device.type == "cuda":
        free += sum(layer.stored_bytes for layer in layers if layer.on_device)
    weights = sum(layer.weights for layer in layers)
    stored = sum(layer.stored_bytes for layer in layers)
    sizes = {
        "dense": sum(layer.weights * layer.dense_bytes_per_weight for layer in layers),
        "packed": stored + PACKED_BITS * weights / 8,
        "entropy": stored + ENTROPY_BITS * weights / 8,
    }
    if device.type == "cpu":
        del sizes["entropy"]
    fitting = (form for form, size in sizes.items() if size <= fraction * free)
    residency = next(fitting, [*sizes][-1])
    needed = ", ".join(f"{form} {size / 1e9:.2f}" for form, size in sizes.items())
    return residency, (
        f"the weights would take (GB) {needed}, and {fraction:.0%} of the free "
        f"{free / 1e9:.2f} GB is available to them"
    )


def free_memory() -> int:
    """Return the bytes of host memory that are free."""
    memory = get_max_memory()
    # where it is shared with an accelerator, it bears the name of that
    return memory.get("cpu", memory.get("mps", 0))


def _free_memory_of(device: torch.device) -> int:
    if device.type == "cpu":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # memory that torch has freed but keeps in its cache is available to us
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
