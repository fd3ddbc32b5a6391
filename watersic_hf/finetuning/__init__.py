"""Finetune the scales of a quantized model by distillation (the paper's WaterSIC-FT).

The codes of all layers are frozen, and so is everything that is not quantized.  What is trained is
one factor per row and one per column, by which the stored scales are multiplied.  The loss is the
divergence KL(teacher || model) of the predicted distributions, averaged over tokens.  No stored
tensor changes its size, so the bits per weight stay the same.
"""

from watersic_hf.finetuning.folder import finetune_to_folder
from watersic_hf.finetuning.settings import FinetuneReport, FinetuneSettings
from watersic_hf.finetuning.training import SAVE_EVERY, STATE_FILE, finetune_scales

__all__ = [
    "SAVE_EVERY",
    "STATE_FILE",
    "FinetuneReport",
    "FinetuneSettings",
    "finetune_scales",
    "finetune_to_folder",
]
