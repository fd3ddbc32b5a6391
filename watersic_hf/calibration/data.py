"""Calibration data: token windows from a name, a file, strings, token ids or the model itself.

A window is a 1-D int64 tensor of at most `sequence_length` tokens.  Texts are joined by blank
lines, tokenized as one and cut into windows that do not overlap; each window begins with the BOS
token if the tokenizer begins texts with it.  A random choice of the windows, given by a seed, is
kept in the order of the text.  The global random state is left unchanged.

Shapes: T = tokens, W = windows, K = windows of an earlier draw.
"""

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from watersic_hf.calibration.rows import Rows, describe, is_stream
from watersic_hf.calibration.self_sampling import self_sampled

logger = logging.getLogger(__name__)

#: Names of the GPTQ benchmark sets that the loaders of optimum know.
BENCHMARK_SETS = ("wikitext2", "c4", "c4-new")

#: Characters that are read of a stream of texts: at least so many, and so many per token to draw.
#: A token has some four characters, so that windows are drawn from about 16 times as much text.
_STREAM_CHARACTERS = 1 << 24
_STREAM_CHARACTERS_PER_TOKEN = 64


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
            * the path of a .txt, .md, .jsonl, .json or .parquet file;
            * any other name: a dataset on the Hugging Face Hub (split ``train``);
            * a list of strings;
            * token ids: a list of lists or tensors, or a 2-D tensor;
            * columns ``input_ids`` (with ``attention_mask`` or without) or ``text``: a dict, what a
              tokenizer returns, a list or generator of these, a `datasets.Dataset` in memory or
              streaming, or a dict of datasets with a split ``train``.

            Tokens that an ``attention_mask`` leaves out, as padding, are removed.  Rows that are
            null, empty or a single token are skipped, and counted in a warning.  Of a streaming
            dataset or a generator only the beginning is read, about 16 times as much text as is
            needed.
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
        ValueError: the dataset has an unknown form or no usable row, or its tokenizer or model is
            missing.
        ImportError: the dataset needs a package that is not installed.
    """
    # these are sampled with the seed, so that another seed gives other windows
    sampled = isinstance(dataset, str) and dataset in ("self", *BENCHMARK_SETS)
    if sampled and seen is not None and seen.seed == seed:
        seed += 1
    if isinstance(dataset, str) and dataset == "self":
        return self_sampled(model, samples, sequence_length, seed)
    if isinstance(dataset, str) and dataset in BENCHMARK_SETS:
        _check_tokenizer(tokenizer, dataset)
        windows = _benchmark_set(dataset, tokenizer, samples, sequence_length, seed)
    else:
        draw = Draw(samples=samples, sequence_length=sequence_length, seed=seed)
        windows = _drawn(dataset, tokenizer, draw, seen)
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


def _drawn(dataset: Any, tokenizer: Any, draw: Draw, seen: Draw | None) -> list[Tensor]:
    """Draw windows from the rows of a set, texts or token ids."""
    source = Rows(dataset)
    rows = iter(source)
    first = next(rows, None)
    if first is None:
        raise source.nothing_usable()
    rows = itertools.chain([first], rows)
    if isinstance(first, str):
        _check_tokenizer(tokenizer, source.name)
        windows = _drawn_from_text(_text_for(rows, dataset, [draw, seen]), tokenizer, draw, seen)
        if len(windows[0]) < min(2, draw.sequence_length):
            source.skipped["of one token"] += 1
            raise source.nothing_usable()
    else:
        used = 0 if seen is None else seen.samples
        ids = list(itertools.islice(rows, draw.samples + used))
        order_W = torch.arange(len(ids))
        chosen = _choose(ids, draw.samples, order_W, order_W < used)
        windows = [window[: draw.sequence_length] for window in chosen]
    source.log_skipped()
    return windows


def _text_for(
    rows: Iterable[str], dataset: Any, draws: Sequence[Draw | None]
) -> Callable[[Draw], str]:
    """Read the texts of a set, and return a function that joins those that a draw is made from.

    Args:
        rows: the texts.
        dataset: the set that they are rows of; of a stream only the beginning is read.
        draws: the draws that are to be made; None stands for no draw.
    """
    streamed = is_stream(dataset)

    def limit(draw: Draw) -> float:
        tokens = draw.samples * draw.sequence_length
        enough = max(_STREAM_CHARACTERS, _STREAM_CHARACTERS_PER_TOKEN * tokens)
        return enough if streamed else math.inf

    texts = list(_beginning(rows, max(limit(draw) for draw in draws if draw is not None)))
    if streamed:
        logger.info("Read %d texts of the stream %s.", len(texts), describe(dataset))
    return lambda draw: "\n\n".join(_beginning(texts, limit(draw)))


def _beginning(texts: Iterable[str], characters: float) -> Iterator[str]:
    """Yield texts until they have a number of characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


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


def _drawn_from_text(
    text_for: Callable[[Draw], str], tokenizer: Any, draw: Draw, seen: Draw | None
) -> list[Tensor]:
    """Draw windows of a text, those that an earlier draw has not seen before the others."""
    windows = text_windows(text_for(draw), tokenizer, draw.sequence_length)
    order_W = _order(len(windows), draw.seed)
    seen_W = torch.zeros_like(order_W, dtype=torch.bool)
    if seen is not None:
        earlier = text_windows(text_for(seen), tokenizer, seen.sequence_length)
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
