"""How the statistics behind a quantized model are taken and used."""

from dataclasses import dataclass

#: Ways to split the bits among the layers.
ALLOCATIONS = ("sensitivity", "uniform")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """The parts of the method that look beyond one layer; each can be switched off.

    Raises:
        ValueError: a value is out of range.
    """

    allocation: str = "sensitivity"
    """``sensitivity`` gives layers bits by what their errors do to the model's predictions,
    ``uniform`` gives all layers the same."""

    row_importance: bool = True
    """Give every row of a weight a step by what its errors do to the model's predictions."""

    drift: float = 0.5
    """Share of the drift of a layer's input, against that in the original model, that the layer
    makes up for (paper, section on drift correction).  The correction is a regression on the
    calibration tokens, and the whole of it is worse than none when they are few."""

    residual: bool = True
    """Layers that write to the residual stream also make up for its error, by the same share."""

    attention: float = 0.0
    """Share of the statistics of q, k and v that weighs tokens by the attention they receive."""

    mixing: bool = False
    """Search both shares for q, k and v in every block, by the error of the attention's output."""

    sensitivity_tokens: int = 8192
    """Calibration tokens that the sensitivities are measured on."""

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
        """Whether the original model has to run beside the one that is being quantized."""
        return self.drift != 0 or self.attention > 0 or self.mixing

    @property
    def sensitivity(self) -> bool:
        """Whether sensitivities are needed."""
        return self.allocation == "sensitivity" or self.row_importance
