"""Why parts of a model stay dense: the reasons, and what each of them is about."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.quantizers import HfQuantizer

from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.experts import expert_counts, routing_layers
from watersic_hf.integration.linear_layers import is_too_small
from watersic_hf.nn import FusedExperts, module_matches

BIASES = "biases of experts"
HEAD = "output head, or tied to one"
NAMED = "named in modules_to_not_convert"
NOT_REACHED = "no calibration data reaches it"
NEW = "not in the checkpoint, newly initialized"
NO_TEXT = "beside the language model, where text does not run"
SMALL = "so small that it would cost about as much packed"
USED = "another module uses its weight"
WIDE = "the model keeps it in float32"


def skipped_patterns(
    model: nn.Module,
    config: WaterSICConfig,
    fused: Mapping[str, FusedExperts],
    towers: Collection[str],
) -> dict[str, str]:
    """Return why layers stay dense, by pattern; of two reasons for a pattern the last counts."""
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    user = config.modules_to_not_convert or ()
    return (
        dict.fromkeys(HfQuantizer.get_modules_to_not_convert(model), HEAD)
        | {name.replace(".", r"\."): NO_TEXT for name in towers}
        | dict.fromkeys(wide, WIDE)
        | dict.fromkeys(user, NAMED)
        | routing_layers(model, expert_counts(model, fused))
    )


def too_small(
    linear: Mapping[str, tuple[int, int]], experts: Mapping[str, FusedExperts]
) -> dict[str, str]:
    """Return the reason for linear layers, and modules of experts, that are too small."""
    shapes = {name: [shape] for name, shape in linear.items()}
    shapes |= {n: [layout.shape(m) for m in layout.matrices] for n, layout in experts.items()}
    return {
        name: SMALL
        for name, matrices in shapes.items()
        if any(is_too_small(*shape) for shape in matrices)
    }


@dataclass(frozen=True)
class Reasons:
    """Why modules that hold a matrix stay dense if they are not quantized."""

    model: nn.Module
    linear: Collection[str]
    fused: Collection[str]
    skipped: Mapping[str, str]
    excluded: Mapping[str, str]
    towers: Collection[str]
    obstacles: Mapping[str, str]

    def all(self) -> dict[str, str]:
        """Return the reasons by name of module, in the order of the model."""
        return {
            name: self._of(name, module)
            for name, module in self.model.named_modules()
            if any(p.ndim > 1 for p in module.parameters(recurse=False))
        }

    def _of(self, name: str, module: nn.Module) -> str:
        if name in self.obstacles:
            return self.obstacles[name]
        if f"{name}.".startswith(tuple(f"{tower}." for tower in self.towers)):
            return NO_TEXT
        if module is self.model.get_output_embeddings():
            return "output head"
        if name in self.excluded:
            return self.excluded[name]
        if name in self.linear or name in self.fused:
            pattern = module_matches(name, self.skipped)
            return NOT_REACHED if pattern is None else self.skipped[pattern]
        if isinstance(module, nn.Embedding):
            return "embedding"
        return f"{type(module).__name__} is no linear layer"
