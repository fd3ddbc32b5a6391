"""Calibration text: from a name, a file, strings, token ids or the model itself to token windows.

A window is a 1-D int64 tensor of at most `sequence_length` tokens.  Texts are joined by blank
lines, tokenized once and cut into windows that do not overlap, each begun as the tokenizer begins a
text; of those a seeded choice is kept, in the order of the text.  Nothing here touches the global
random state.
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

#: Names that optimum's loaders of the GPTQ benchmark sets understand.
BENCHMARK_SETS = ("wikitext2", "c4", "c4-new")

_TEXT_FILES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_SELF_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which windows were taken from a calibration set: the arguments of `calibration_windows`."""

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
    """Token windows to calibrate on.

    Args:
        dataset: one of

            * ``"self"``: sequences that `model` samples from its own distribution;
            * ``"pydoc"``: Python's own documentation, which every machine has;
            * ``"wikitext2"``, ``"c4"``, ``"c4-new"``: as GPTQ's benchmarks load them;
            * the path of a .txt, .md, .jsonl, .json or .parquet file (column ``text``);
            * any other name: a dataset of the hub (split ``train``, column ``text``);
            * a list of strings;
            * token ids: a list of lists or tensors or ``{"input_ids": ...}``, or a 2-D tensor;
            * a `datasets.Dataset` with a column ``input_ids`` or ``text``.
        tokenizer: needed unless the dataset is ``"self"`` or token ids.
        model: needed for ``"self"``.
        samples: number of windows.
        sequence_length: tokens in a window.
        seed: chooses the windows, or the sequences that the model samples.
        seen: an earlier draw from the same set.  Windows that share text with it are taken only
            where there are too few others, with a warning, and come first.

    Raises:
        ValueError: the dataset is of no known form, is empty, or lacks its tokenizer or model.
        ImportError: the dataset needs a package that is not installed.
    """
    drawn = isinstance(dataset, str) and dataset in ("self", *BENCHMARK_SETS)
    if drawn and seen is not None and seen.seed == seed:
        seed += 1
    if isinstance(dataset, str) and dataset == "self":
        return _sampled_by(model, samples, sequence_length, seed)
    if isinstance(dataset, str) and dataset in BENCHMARK_SETS:
        _need(tokenizer, dataset)
        windows = _benchmark_set(dataset, tokenizer, samples, sequence_length, seed)
    elif (ids := _token_ids(dataset)) is not None:
        order_W = torch.arange(len(ids))
        seen_W = order_W < (0 if seen is None else seen.samples)
        windows = [window[:sequence_length] for window in _choose(ids, samples, order_W, seen_W)]
    else:
        _need(tokenizer, describe(dataset))
        text = "\n\n".join(_texts(dataset))
        windows = text_windows(text, tokenizer, sequence_length)
        order_W = _order(len(windows), seed)
        seen_W = torch.zeros_like(order_W, dtype=torch.bool)
        if seen is not None:
            others = text_windows(text, tokenizer, seen.sequence_length)
            taken = _order(len(others), seen.seed)[: seen.samples]
            seen_W = _overlap(windows, others, taken, _begins_with_bos(tokenizer))
        windows = _choose(windows, samples, order_W, seen_W)
    windows = [window.to(torch.int64) for window in windows if window.numel() > 0]
    if not windows:
        raise ValueError(f"the calibration set {describe(dataset)} is empty")
    if len(windows) < samples:
        logger.warning(
            "The calibration set %s gives %d windows of %d tokens; %d were asked for.",
            describe(dataset), len(windows), sequence_length, samples,
        )  # fmt: skip
    return windows


def describe(dataset: Any) -> str | None:
    """A short name of a calibration set, for messages and for the saved configuration."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, Path):
        return dataset.name
    kind = type(dataset).__name__
    return f"{kind} of {len(dataset)}" if hasattr(dataset, "__len__") else kind


def pydoc_texts(*, held_out: bool = False) -> list[str]:
    """Topics of Python's own documentation, in the order of their names.

    About an eighth of the topics is held out: the calibration set ``"pydoc"`` has none of them, so
    that they can serve as evaluation text.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    return [
        text
        for name, text in sorted(topics.items())
        if (zlib.crc32(name.encode()) % 8 == 0) == held_out
    ]


def _need(tokenizer: Any, dataset: Any) -> None:
    if tokenizer is None:
        raise ValueError(
            f"the calibration set {dataset} is text, and no tokenizer was given or found beside "
            f"the model. Pass WaterSICConfig(tokenizer=...), a tokenizer or the name of one."
        )


def text_windows(text: str, tokenizer: Any, sequence_length: int) -> list[Tensor]:
    """Consecutive windows of a text, from its beginning; a rest shorter than a window is dropped.

    Every window begins with the BOS token if that is how the tokenizer begins a text: models like
    Gemma that never saw a sequence without it are far from themselves where it is missing.  A text
    shorter than a window is returned as it is.
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
    """Whether the tokenizer puts the BOS token in front of a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _order(count: int, seed: int) -> Tensor:
    """The order in which windows of a text are taken."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _choose(
    windows: Sequence[Tensor], samples: int, order_W: Tensor, seen_W: Tensor
) -> list[Tensor]:
    """The first `samples` windows of an order, those unseen before those seen.

    They are returned as they follow each other in the text, those seen in front.
    """
    order_W = order_W[seen_W[order_W].int().argsort(stable=True)]
    kept_W = order_W[:samples].sort().values
    again = int(seen_W[kept_W].sum())
    if again:
        logger.warning(
            "%d of %d windows were used before, as the text has too few others. Give more text.",
            again, len(kept_W),
        )  # fmt: skip
    kept_W = kept_W[(~seen_W[kept_W]).int().argsort(stable=True)]
    return [windows[index] for index in kept_W.tolist()]


def _overlap(
    windows: Sequence[Tensor], others: Sequence[Tensor], taken: Tensor, bos: bool
) -> Tensor:
    """Which windows of a text share tokens with those `taken` of others, of another length."""
    length, other = len(windows[0]) - bos, len(others[0]) - bos
    start_W, start_K = torch.arange(len(windows)) * length, taken * other
    meets_WK = start_W[:, None] < start_K + other
    return (meets_WK & (start_K < start_W[:, None] + length)).any(1)


def _texts(dataset: Any) -> Iterable[str]:
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
    if "text" not in rows.column_names:
        raise ValueError(
            f"the calibration set {name} has the columns {rows.column_names}, but needs `text`"
        )
    return rows["text"]


def _token_ids(dataset: Any) -> list[Tensor] | None:
    """The windows of a set that is tokenized already, or None."""
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
    try:
        from optimum.gptq.data import get_dataset
    except ImportError as error:
        raise ImportError(
            f"the calibration set {name!r} needs `pip install datasets optimum`"
        ) from error
    # the loaders seed the global generators
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            rows = get_dataset(name, tokenizer, nsamples=samples, seqlen=sequence_length, seed=seed)
    finally:
        random.setstate(python_state)
    windows = [torch.as_tensor(row["input_ids"]).flatten() for row in rows]
    if _begins_with_bos(tokenizer):
        for window in windows:
            window[:1] = tokenizer.bos_token_id
    return windows


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("this calibration set needs `pip install datasets`") from error


def _sampled_by(model: Any, samples: int, sequence_length: int, seed: int) -> list[Tensor]:
    """Sequences drawn from the model's own distribution: no temperature, no truncation."""
    if model is None or not model.can_generate():
        raise ValueError('the calibration set "self" needs a model that can generate')
    config = model.generation_config
    start = next(
        (i for i in (config.bos_token_id, config.eos_token_id, 0) if i is not None),
    )
    start = start[0] if isinstance(start, list) else start
    windows: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        while len(windows) < samples:
            batch = min(_SELF_BATCH, samples - len(windows))
            prompt = torch.full((batch, 1), start, device=model.device)
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, min_new_tokens=sequence_length - 1,
                max_new_tokens=sequence_length - 1, pad_token_id=start,
            )  # fmt: skip
            windows.extend(tokens.cpu())
    return windows
