"""Settings of finetuning, and the report of what it achieved."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Settings of the training with Adam.

    The trained factors multiply the stored scales, so the learning rate is relative to each scale.
    """

    epochs: int = 4
    learning_rate: float = 2e-3
    """Learning rate of the first step, from which it decays along half a cosine.  The default suits
    small runs of tens of steps; the paper uses 5e-4 for hundreds."""
    final_learning_rate: float | None = None
    """Learning rate that the decay approaches; None = one hundredth of `learning_rate`."""
    batch_size: int = 8
    """Windows per optimizer step; they pass through the model one at a time."""
    clip: float = 1.0
    """Bound on the norm of the gradient of all factors together."""
    seed: int = 0
    """Seed of the order of the windows."""
    validation_share: float = 0.125
    """Fraction of the windows, taken from the end, that is held out (at least one window).  The
    held-out windows decide which epoch is kept."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be a positive integer")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, but must be a positive number")
        final = self.final_learning_rate
        if final is not None and not 0 <= final <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate is {final!r}, but must be between 0 and learning_rate, which "
                f"is {self.learning_rate:g}"
            )
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(
                f"validation_share is {self.validation_share!r}, but must be above 0 and at most "
                f"0.5"
            )

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of one step.

        Args:
            step: number of the step, from 0.
            steps: number of steps of the whole run.
        """
        high, low = self.learning_rate, self.final_learning_rate
        low = high / 100 if low is None else low
        return low + (high - low) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """Result of finetuning.  Divergences are KL(teacher || model) in bits per token."""

    layers: int
    """Number of layers whose scales were trained."""
    tokens: int
    """Tokens of the training windows, which every epoch uses once."""
    train_kl_bits: tuple[float, ...]
    """Divergence on the training windows, per epoch, averaged over the course of the epoch."""
    validation_kl_bits: tuple[float, ...]
    """Divergence on the held-out windows: before the first epoch, and after every epoch."""
    kept_epoch: int
    """Epoch with the lowest divergence on the held-out windows, whose scales the model has now;
    0 = no epoch was an improvement, and the original scales are kept."""
    seconds: float
    """Duration of the training, including the parts before an interruption."""

    @property
    def kl_bits_before(self) -> float:
        """Divergence on the held-out windows before finetuning."""
        return self.validation_kl_bits[0]

    @property
    def kl_bits_after(self) -> float:
        """Divergence on the held-out windows with the scales that were kept."""
        return self.validation_kl_bits[self.kept_epoch]
