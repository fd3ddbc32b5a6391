"""Calibration data: token windows from a name, a file, strings, token ids or the model itself.

A window is a 1-D int64 tensor of at most `sequence_length` tokens.  Texts are joined by blank
lines, tokenized as one and cut into windows that do not overlap; each window begins with the BOS
token if the tokenizer begins texts with it.  A random choice of the windows, given by a seed, is
kept in the order of the text.  The global random state is left unchanged.

Shapes: T = tokens, W = windows, K = windows of an earlier draw.
"""

import importlib
import logging
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Names of the GPTQ benchmark sets that the loaders of optimum know.
BENCHMARK_SETS = ("wikitext2", "c4", "c4-new")

#: Kinds of files, by suffix: plain text, or a loader of `datasets`.
_TEXT_FILES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
#: Sequences that a model samples at a time.
_SELF_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Arguments of `calibration_windows` that determine which windows of a set it returns."""

    samples: int
    sequence_length: int
    seed: int


def calibration_windows(
    dataset: Any,
    *,
    tokenizer: Any,
    model: Any = None,
    samples: int,
    sequence_length: int,
    seed: int,
    seen: Draw | None = None,
) -> list[Tensor]:
    """Return token windows to calibrate on.

    Args:
        dataset: one of

            * ``"self"``: sequences that `model` samples from its own distribution;
            * ``"pydoc"``: the documentation of Python, which comes with every installation;
            * ``"wikitext2"``, ``"c4"``, ``"c4-new"``: loaded as in the benchmarks of GPTQ;
            * the path of a .txt, .md, .jsonl, .json or .parquet file (column ``text``);
            * any other name: a dataset on the Hugging Face Hub (split ``train``, column ``text``);
            * a list of strings;
            * token ids: a list of lists, of tensors or of ``{"input_ids": ...}``, or a 2-D tensor;
            * a `datasets.Dataset` with a column ``input_ids`` or ``text``.
        tokenizer: tokenizer of the model; not needed for ``"self"`` and for token ids.
        model: the model; needed only for ``"self"``.
        samples: number of windows.
        sequence_length: tokens in a window.
        seed: seed of the choice of windows, or of the sequences that the model samples.
        seen: an earlier draw from the same set.  Windows that share text with it are used only if
            there are too few others; they then come first, and a warning is logged.

    Returns:
        The windows; fewer than `samples`, with a warning, if the set is too small.

    Raises:
        ValueError: the dataset has an unknown form or is empty, or its tokenizer or model is
            missing.
        ImportError: the dataset needs a package that is not installed.
    """
    # these are sampled with the seed, so that another seed gives other windows
    sampled = isinstance(dataset, str) and dataset in ("self", *BENCHMARK_SETS)
    if sampled and seen is not None and seen.seed == seed:
        seed += 1
    if isinstance(dataset, str) and dataset == "self":
        return _sampled_by(model, samples, sequence_length, seed)
    if isinstance(dataset, str) and dataset in BENCHMARK_SETS:
        _check_tokenizer(tokenizer, dataset)
        windows = _benchmark_set(dataset, tokenizer, samples, sequence_length, seed)
    elif (ids := _token_ids(dataset)) is not None:
        order_W = torch.arange(len(ids))
        seen_W = order_W < (0 if seen is None else seen.samples)
        windows = [window[:sequence_length] for window in _choose(ids, samples, order_W, seen_W)]
    else:
        _check_tokenizer(tokenizer, describe(dataset))
        text = "\n\n".join(_texts(dataset))
        draw = Draw(samples=samples, sequence_length=sequence_length, seed=seed)
        windows = _drawn_from_text(text, tokenizer, draw, seen)
    windows = [window.to(torch.int64) for window in windows if window.numel() > 0]
    if not windows:
        raise ValueError(f"the calibration set {describe(dataset)} is empty")
    if len(windows) < samples:
        logger.warning(
            "The calibration set %s has only %d windows of %d tokens; %d were requested.",
            describe(dataset),
            len(windows),
            sequence_length,
            samples,
        )
    return windows


def describe(dataset: Any) -> str | None:
    """Return a short name of a calibration set, for messages and for the saved configuration."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, Path):
        return dataset.name
    kind = type(dataset).__name__
    return f"{kind} of {len(dataset)}" if hasattr(dataset, "__len__") else kind


def pydoc_texts(*, held_out: bool = False) -> list[str]:
    """Return the topics of the documentation of Python, ordered by name.

    About one eighth of the topics is held out from the calibration set ``"pydoc"``, so that they
    can be used for evaluation.

    Args:
        held_out: return the held-out topics instead of the others.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    return [
        text
        for name, text in sorted(topics.items())
        if (zlib.crc32(name.encode()) % 8 == 0) == held_out
    ]


def _check_tokenizer(tokenizer: Any, dataset: Any) -> None:
    """Raise ValueError if a set of texts has no tokenizer."""
    if tokenizer is None:
        raise ValueError(
            f"the calibration set {dataset} is text, but no tokenizer was given or found beside "
            f"the model. Pass a tokenizer or its name, WaterSICConfig(tokenizer=...)."
        )


def text_windows(text: str, tokenizer: Any, sequence_length: int) -> list[Tensor]:
    """Divide a text into consecutive windows; an incomplete last window is dropped.

    Every window begins with the BOS token if the tokenizer begins texts with it: models such as
    Gemma, trained only on sequences that begin with it, behave very differently without it.  A text
    shorter than one window is returned as one shorter window.

    Args:
        text: the text.
        tokenizer: tokenizer of the model.
        sequence_length: tokens in a window, including the BOS token.
    """
    tokens_T = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    head = tokens_T[:1] if _begins_with_bos(tokenizer) else tokens_T[:0]
    body_T, length = tokens_T[len(head) :], sequence_length - len(head)
    count = len(body_T) // length if length > 0 else 0
    if count == 0:
        return [tokens_T[:sequence_length]]
    body = body_T[: count * length].view(count, length)
    return list(torch.cat([head.expand(count, len(head)), body], 1))


def _begins_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins a text with the BOS token."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _drawn_from_text(text: str, tokenizer: Any, draw: Draw, seen: Draw | None) -> list[Tensor]:
    """Draw windows of a text, those that an earlier draw has not seen before the others."""
    windows = text_windows(text, tokenizer, draw.sequence_length)
    order_W = _order(len(windows), draw.seed)
    seen_W = torch.zeros_like(order_W, dtype=torch.bool)
    if seen is not None:
        earlier = text_windows(text, tokenizer, seen.sequence_length)
        taken_K = _order(len(earlier), seen.seed)[: seen.samples]
        seen_W = _overlap(windows, earlier, taken_K, _begins_with_bos(tokenizer))
    return _choose(windows, draw.samples, order_W, seen_W)


def _order(count: int, seed: int) -> Tensor:
    """Return the random order in which the windows of a text are taken."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _choose(
    windows: Sequence[Tensor], samples: int, order_W: Tensor, seen_W: Tensor
) -> list[Tensor]:
    """Choose `samples` windows in a given order, preferring those not seen before.

    Args:
        windows: windows to choose from.
        samples: number of windows.
        order_W: numbers of the windows, in the order in which they are taken.
        seen_W: whether each window was used before.

    Returns:
        The windows in the order of the text, but those seen before come first.
    """
    order_W = order_W[seen_W[order_W].int().argsort(stable=True)]
    kept_W = order_W[:samples].sort().values
    reused = int(seen_W[kept_W].sum())
    if reused:
        logger.warning(
            "%d of %d windows were used before, as the text has too few others. Use more text.",
            reused,
            len(kept_W),
        )
    kept_W = kept_W[(~seen_W[kept_W]).int().argsort(stable=True)]
    return [windows[index] for index in kept_W.tolist()]


def _overlap(
    windows: Sequence[Tensor], earlier: Sequence[Tensor], taken_K: Tensor, bos: bool
) -> Tensor:
    """Find the windows of a text that share tokens with windows of an earlier draw from it.

    Args:
        windows: windows of the text.
        earlier: windows of the same text, of the length of the earlier draw.
        taken_K: numbers of the windows of the earlier draw.
        bos: whether every window begins with a BOS token, which is not part of the text.

    Returns:
        One bool per window.
    """
    length, earlier_length = len(windows[0]) - bos, len(earlier[0]) - bos
    start_W, start_K = torch.arange(len(windows)) * length, taken_K * earlier_length
    begins_before_end_WK = start_W[:, None] < start_K + earlier_length
    return (begins_before_end_WK & (start_K < start_W[:, None] + length)).any(1)


def _texts(dataset: Any) -> Iterable[str]:
    """Return the texts of a set that is not tokenized."""
    if isinstance(dataset, str | Path):
        if dataset == "pydoc":
            return pydoc_texts()
        path = Path(dataset)
        if path.is_file():
            return _file_texts(path)
        if path.suffix in _TEXT_FILES:
            raise ValueError(f"the calibration file {path} does not exist")
        return _column(_datasets().load_dataset(str(dataset), split="train"), str(dataset))
    if hasattr(dataset, "column_names"):
        return _column(dataset, describe(dataset))
    if isinstance(dataset, Sequence) and all(isinstance(text, str) for text in dataset):
        return dataset
    raise ValueError(
        f"the calibration set is a {describe(dataset)}; it must be a name, the path of a file, a "
        f"list of strings, token ids, or a datasets.Dataset with a column `text` or `input_ids`"
    )


def _file_texts(path: Path) -> Iterable[str]:
    """Return the texts of a file."""
    kind = _TEXT_FILES.get(path.suffix)
    if kind is None:
        raise ValueError(
            f"the calibration file {path.name} must end in one of {sorted(_TEXT_FILES)}"
        )
    if kind == "text":
        return [path.read_text(encoding="utf-8")]
    rows = _datasets().load_dataset(kind, data_files=str(path), split="train")
    return _column(rows, path.name)


def _column(rows: Any, name: str | None) -> Iterable[str]:
    """Return the column ``text`` of a `datasets.Dataset`; `name` is for messages."""
    if "text" not in rows.column_names:
        raise ValueError(
            f"the calibration set {name} has the columns {rows.column_names}, but needs `text`"
        )
    return rows["text"]


def _token_ids(dataset: Any) -> list[Tensor] | None:
    """Return the windows of a set of token ids, or None if the dataset is not one."""
    if isinstance(dataset, Tensor) and dataset.dim() == 2:
        return list(dataset)
    if "input_ids" in getattr(dataset, "column_names", ()):
        dataset = dataset["input_ids"]
    is_list = not isinstance(dataset, str | Path | Tensor) and hasattr(dataset, "__getitem__")
    if not is_list or len(dataset) == 0 or isinstance(dataset[0], str | int | float):
        return None
    if hasattr(dataset[0], "keys"):
        if any("input_ids" not in row for row in dataset):
            return None
        dataset = [row["input_ids"] for row in dataset]
    return [torch.as_tensor(ids).flatten() for ids in dataset]


def _benchmark_set(
    name: str, tokenizer: Any, samples: int, sequence_length: int, seed: int
) -> list[Tensor]:
    """Return windows of a GPTQ benchmark set, loaded by optimum."""
    try:
        from optimum.gptq.data import get_dataset
    except ImportError as error:
        raise ImportError(
            f"the calibration set {name!r} needs `pip install datasets optimum`"
        ) from error
    # the loaders seed the global generators of Python and torch
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            rows = get_dataset(name, tokenizer, nsamples=samples, seqlen=sequence_length, seed=seed)
    finally:
        random.setstate(python_state)
    windows = [torch.as_tensor(row["input_ids"]).flatten() for row in rows]
    if _begins_with_bos(tokenizer):
        for window in windows:
            # the loaders cut windows from anywhere in the text
            window[:1] = tokenizer.bos_token_id
    return windows


def _datasets() -> Any:
    """Import the package `datasets`."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("this calibration set needs `pip install datasets`") from error


def _sampled_by(model: Any, samples: int, sequence_length: int, seed: int) -> list[Tensor]:
    """Sample sequences from the model's own distribution, at temperature 1 without truncation."""
    if model is None or not model.can_generate():
        raise ValueError('the calibration set "self" needs a model that can generate')
    config = model.generation_config
    start = next(i for i in (config.bos_token_id, config.eos_token_id, 0) if i is not None)
    start = start[0] if isinstance(start, list) else start
    windows: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        while len(windows) < samples:
            batch = min(_SELF_BATCH, samples - len(windows))
            prompt = torch.full((batch, 1), start, device=model.device)
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=sequence_length - 1,
                max_new_tokens=sequence_length - 1,
                pad_token_id=start,
            )
            windows.extend(tokens.cpu())
    return windows
