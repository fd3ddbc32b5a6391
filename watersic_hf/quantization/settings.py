"""Settings of the calibration: which statistics are collected, and how they are used."""

from dataclasses import dataclass

#: Ways to allocate bits to layers.
ALLOCATIONS = ("sensitivity", "uniform")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Settings of the parts of the method that look beyond one layer; each can be switched off.

    Raises:
        ValueError: a value is out of range.
    """

    allocation: str = "sensitivity"
    """How bits are allocated to layers: ``sensitivity`` gives more bits to layers whose errors have
    a larger effect on the predictions of the model, ``uniform`` gives all layers the same bits."""

    row_importance: bool = True
    """Whether every row of a weight gets a quantization step by how much its errors affect the
    predictions of the model."""

    drift: float = 0.5
    """Strength of the activation-drift correction, from 0 (off) to 1: the fraction of the drift of
    its input, relative to the original model, that a layer compensates for (paper, section on drift
    correction).  The correction is a regression on the calibration tokens; with few tokens, full
    strength is worse than none."""

    residual: bool = True
    """Whether layers that write to the residual stream also compensate for the error of the stream,
    with the strength ``drift``."""

    attention: float = 0.0
    """Fraction of the statistics of q, k and v that weights tokens by the attention they receive,
    from 0 to 1."""

    mixing: bool = False
    """Whether to search both fractions for q, k and v in every block, by the error of the output of
    the attention, instead of using the values of ``drift`` and ``attention``."""

    sensitivity_tokens: int = 8192
    """Number of calibration tokens on which the sensitivities are measured."""

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation is {self.allocation!r}, but must be one of {ALLOCATIONS}")
        for name in ("drift", "attention"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}, but must be a number from 0 to 1")
        if self.sensitivity_tokens < 1:
            raise ValueError(
                f"sensitivity_tokens is {self.sensitivity_tokens}, but must be a positive integer"
            )

    @property
    def two_streams(self) -> bool:
        """Whether the original model has to run next to the one that is being quantized."""
        return self.drift != 0 or self.attention > 0 or self.mixing

    @property
    def sensitivity(self) -> bool:
        """Whether the sensitivities of layers have to be measured."""
        return self.allocation == "sensitivity" or self.row_importance
