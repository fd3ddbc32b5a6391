"""Check a saved model against its original: load both again, and compare their predictions.

Shapes: T = predicted tokens, V = vocabulary.
"""

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from watersic_hf.checkpoint import (
    CheckReport,
    average_error,
    checkpoint_files,
    compare_checkpoints,
    kinds_of,
    read_report,
    saved_settings,
)
from watersic_hf.core import CalibrationError
from watersic_hf.evaluation.divergence import log_probabilities
from watersic_hf.evaluation.perplexity import SCRATCH_BYTES, evaluation_text, evaluation_windows
from watersic_hf.integration import ModelSource, WaterSICConfig
from watersic_hf.integration.streaming import load_from_disk
from watersic_hf.streams.batches import model_inputs
from watersic_hf.streams.precision import in_fast_dtype

logger = logging.getLogger(__name__)

#: KL in bits per token over the mean relative error of the layers' outputs.  Measured with
#: calibration: 12.6 on SmolLM2-135M and 15.9 on Gemma 3 270M at 3 bits.
BITS_PER_ERROR = 14
#: Models larger than this are read from the disk layer by layer.
IN_MEMORY_BYTES = 2 << 30
#: Tokens of a window, and tokens to generate.
_WINDOW, _NEW_TOKENS = 256, 16
#: A layer stands out that differs from its original so many times as much as the median of its
#: kind; so many of them are named.
_SUSPECT, _NAMED = 3, 5


@torch.no_grad()
def check_folder(
    folder: str | os.PathLike, original: ModelSource, *, windows: int = 2
) -> CheckReport | None:
    """Load a saved model and its original one after the other, and compare them on a little text.

    The text is that of `evaluation_text`, which no calibration set of this package contains.
    Models of more than `IN_MEMORY_BYTES` are read from the disk layer by layer, and generate
    nothing, since every token would read them again.

    Args:
        folder: folder of the saved model.
        original: the model that was quantized.
        windows: number of windows of 256 tokens.

    Returns:
        The comparison, or None if the model has no tokenizer, or predicts no text.

    Raises:
        CheckpointError: the saved model cannot be loaded.
    """
    saved = ModelSource(name=os.fspath(folder), trust_remote_code=original.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(saved.name, **saved.options)
        tokens = evaluation_windows(
            evaluation_text(), tokenizer, sequence_length=_WINDOW, limit=windows
        )
    except (OSError, ValueError) as error:
        logger.warning("The saved model is not checked, as there is no text for it: %s", error)
        return None
    config = WaterSICConfig.from_dict(saved_settings(folder))
    logits: list[list[Tensor]] = []
    text = ""
    for source in (original, saved):
        with tempfile.TemporaryDirectory(prefix="watersic_check_") as scratch:
            model = _load(source, config, Path(scratch))
            try:
                logits.append([_logits(model, window) for window in tokens])
            except (AttributeError, CalibrationError) as error:
                logger.warning("The saved model is not checked, as it predicts no text: %s", error)
                return None
            if source is saved and not hasattr(model, "hf_device_map"):
                text = _continuation(model, tokenizer, tokens[0])
            del model
    kl_T, agreed = _compare(*logits)
    reports = read_report(folder)
    check = CheckReport(
        tokens=len(kl_T),
        kl_mean=float(kl_T.mean()),
        kl_median=float(kl_T.median()),
        kl_p90=float(kl_T.quantile(0.9)),
        kl_expected=BITS_PER_ERROR * average_error(r for r in reports if not r.table),
        top1_agreement=agreed / len(kl_T),
        text=text,
    )
    if not check.broken:
        return check
    return CheckReport(**vars(check) | {"suspects": _suspects(original.folder(), folder)})


def _load(source: ModelSource, config: WaterSICConfig, scratch: Path) -> Any:
    size = sum(file.stat().st_size for file in checkpoint_files(source.folder()))
    if size > IN_MEMORY_BYTES:
        return load_from_disk(source, config, folder=scratch).eval()
    model_config = AutoConfig.from_pretrained(source.name, **source.options)
    return in_fast_dtype(source.load_model(model_config, dtype="auto").eval())


def _logits(model: Any, window_T: Tensor) -> Tensor:
    """Return the logits of a model that say something of a token in the window, T x V."""
    logits_TV = model(**model_inputs(model, window_T[None])).logits[0].cpu()
    # a decoder predicts the same window, another model the tokens that follow
    return logits_TV if model.config.is_encoder_decoder else logits_TV[:-1]


def _compare(original: Sequence[Tensor], saved: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return the KL of every token in bits, and for how many the most likely token is the same."""
    parts, agreed = [], 0
    for p_TV, q_TV in zip(original, saved, strict=True):
        for _, (log_p_TV, log_q_TV) in log_probabilities(p_TV, q_TV, scratch_bytes=SCRATCH_BYTES):
            parts.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1) / math.log(2))
            agreed += int((log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).sum())
    return torch.cat(parts), agreed


def _continuation(model: Any, tokenizer: Any, window_T: Tensor) -> str:
    """Return what a model writes after a window, or nothing if it cannot generate."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        return ""
    prompt = window_T[None, : _WINDOW // 4].to(model.device)
    settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)


def _suspects(original: Path, folder: str | os.PathLike) -> tuple[str, ...]:
    """Return the layers that differ most from their originals, compared with others of a kind."""
    try:
        rows = compare_checkpoints(original, folder)["layers"]
    except ValueError as error:
        logger.warning("The layers of the saved model cannot be compared: %s", error)
        return ()
    kinds: dict[str, list[float]] = {}
    names = kinds_of(row["name"] for row in rows)
    for kind, row in zip(names, rows, strict=True):
        kinds.setdefault(kind, []).append(row["difference"])
    usual = {kind: float(torch.tensor(values).median()) for kind, values in kinds.items()}
    ratio = {
        row["name"]: row["difference"] / max(usual[kind], 1e-9)
        for kind, row in zip(names, rows, strict=True)
    }
    found = sorted((name for name in ratio if ratio[name] > _SUSPECT), key=ratio.get)
    return tuple(found[::-1][:_NAMED])
