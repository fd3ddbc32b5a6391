"""Evaluation of a quantized model: perplexity, divergence from its original, tasks, speed."""

from watersic_hf.evaluation.check import check_folder
from watersic_hf.evaluation.perplexity import (
    Evaluation,
    Speed,
    evaluate,
    evaluation_text,
    evaluation_windows,
    generation_speed,
)
from watersic_hf.evaluation.tasks import evaluate_tasks

__all__ = [
    "Evaluation",
    "Speed",
    "check_folder",
    "evaluate",
    "evaluate_tasks",
    "evaluation_text",
    "evaluation_windows",
    "generation_speed",
]
