"""Choice of the form that weights take in device memory, where the user left it to ``auto``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
    enough memory; otherwise the faster compressed form that does.

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
    free = _free_memory(device) if free is None else free
    if free is None:
        return "dense", f"the free memory of {device.type} is not known"
    # on a CPU, payloads that are mapped from files already count as free
    if device.type == "cuda":
        free += sum(layer.stored_bytes for layer in layers if layer.on_device)
    weights = sum(layer.weights for layer in layers)
    stored = sum(layer.stored_bytes for layer in layers)
    sizes = {
        "dense": sum(layer.weights * layer.dense_bytes_per_weight for layer in layers),
        "packed": stored + PACKED_BITS * weights / 8,
        "entropy": stored + ENTROPY_BITS * weights / 8,
    }
    fitting = (form for form, size in sizes.items() if size <= fraction * free)
    residency = next(fitting, "entropy")
    needed = ", ".join(f"{form} {size / 1e9:.2f}" for form, size in sizes.items())
    return residency, (
        f"the weights would take (GB) {needed}, and {fraction:.0%} of the free "
        f"{free / 1e9:.2f} GB is available to them"
    )


def _free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if the system does not tell."""
    if device.type == "cpu":
        return _free_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # memory that torch has freed but keeps in its cache is available to us
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_host_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        # no Linux
        return None
    found = (line.split() for line in lines)
    return next((1024 * int(kib) for name, kib, *_ in found if name == "MemAvailable:"), None)
