"""Finetune the scales of a model in a folder, and save the result to another folder."""

import os
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from watersic_hf.calibration import Draw, calibration_windows, describe
from watersic_hf.finetuning.settings import FinetuneReport, FinetuneSettings
from watersic_hf.finetuning.training import finetune_scales
from watersic_hf.integration import (
    ModelSource,
    WaterSICConfig,
    require_no_model,
    save_quantized,
)
from watersic_hf.integration.run import window_length
from watersic_hf.streams import position_limit
from watersic_hf.streams.precision import computing_fast
from watersic_hf.streams.torch_state import default_torch_state


@default_torch_state()
def finetune_to_folder(
    quantized: str,
    folder: str | os.PathLike,
    teacher: str,
    *,
    dataset: Any = "pydoc",
    tokenizer: str | None = None,
    samples: int = 64,
    sequence_length: int = 512,
    settings: FinetuneSettings | None = None,
    resume_folder: str | os.PathLike | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool = False,
) -> FinetuneReport:
    """Finetune the scales of a quantized model and save it with its tokenizer and a model card.

    Args:
        quantized: folder or hub name of the quantized model.
        folder: folder to save to; it is created if necessary.
        teacher: folder or hub name of the original model.
        dataset: text to train on, as in `watersic_hf.calibration.calibration_windows`; ``"self"``
            stands for text that the teacher samples (default: "pydoc").  If the model was
            calibrated on the same dataset, windows that calibration did not use are preferred: the
            model has already been fitted to the others, and they would tell little about new text.
        tokenizer: folder or hub name of the tokenizer (default: that of the quantized model).
        samples: number of windows, including those held out (default: 64).
        sequence_length: tokens per window; the model's maximum is a bound (default: 512).
        settings: how to train (default: `FinetuneSettings()`); its seed also chooses the windows.
        resume_folder: as in `finetune_scales`.
        dtype: dtype of both models, as in `from_pretrained`.
        device_map: placement of both models, as in `from_pretrained`.
        revision: branch, tag or commit of the quantized model on the hub (default: main branch).
        subfolder: folder within the repository that holds the quantized model.
        trust_remote_code: whether Python code that comes with either model may be run.

    Returns:
        The report of `finetune_scales`.

    Raises:
        FileExistsError: `folder` already contains a model.
        ValueError, CheckpointError: as in `finetune_scales`.
    """
    settings = settings or FinetuneSettings()
    require_no_model(folder)
    options = {"dtype": dtype, "device_map": device_map}
    student_source = ModelSource(
        name=quantized, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code
    )
    teacher_source = ModelSource(name=teacher, trust_remote_code=trust_remote_code)
    load = AutoModelForCausalLM.from_pretrained
    model = load(quantized, **student_source.options, **options)
    original = load(teacher, **teacher_source.options, **options).eval()
    longest = min(position_limit(m) or sequence_length for m in (model, original))
    windows = calibration_windows(
        dataset,
        tokenizer=_tokenizer(tokenizer, student_source),
        model=original,
        samples=samples,
        sequence_length=min(sequence_length, longest),
        seed=settings.seed,
        seen=_calibration_draw(model, dataset),
    )
    with computing_fast(model), computing_fast(original):
        report = finetune_scales(
            model, original, windows, settings=settings, resume_folder=resume_folder
        )
    finetuning = f"{describe(dataset)}, {report.tokens:,} tokens, epoch {report.kept_epoch}"
    save_quantized(
        model,
        folder,
        tokenizer=student_source,
        base=teacher_source,
        finetuning=finetuning if report.kept_epoch else None,
    )
    return report


def _tokenizer(name: str | None, source: ModelSource) -> Any:
    """Return the tokenizer of a name, or that of the model."""
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    return AutoTokenizer.from_pretrained(source.name, **source.options)


def _calibration_draw(model: nn.Module, dataset: Any) -> Draw | None:
    """Return the windows of a dataset that a model was calibrated on.

    Args:
        model: the quantized model.
        dataset: the dataset to train on.

    Returns:
        The draw; None if the model was calibrated on another dataset.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, WaterSICConfig):
        return None
    # a configuration holds only the name of a file.  Another file of that name is taken for the
    # same: that costs a choice of windows, while calibration text among the held-out windows would
    # make the result look better than it is
    if describe(config.dataset) != describe(dataset):
        return None
    return Draw(
        samples=config.samples, sequence_length=window_length(model, config), seed=config.seed
    )
