"""Rows of a calibration set, in the forms that people have them: texts, or token ids.

A *row* is a text, the token ids of a text, or None where a set has nothing.  An *entry* is what
iterating over a set gives: a row, or a mapping of columns with one row or many, as tokenizers,
datasets, data loaders and data frames have them.

Shapes: T = tokens.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from watersic_hf.calibration.text_files import is_path, named_set

logger = logging.getLogger(__name__)

#: Columns that are read.  Token ids are preferred to text.
_IDS, _MASK, _TEXT = "input_ids", "attention_mask", "text"
#: Rows of a `datasets.Dataset` that are read at a time.
_BATCH = 100
_FORMS = (
    "must be a name, the path of a file, a list of strings, token ids, or a dataset, iterable or "
    "mapping with a column `text` or `input_ids`"
)


def describe(dataset: Any) -> str | None:
    """Return a short name of a calibration set, for messages and for the saved configuration.

    A file is named by its own name alone, so that a published model does not show the folders of
    the machine.
    """
    if dataset is None:
        return None
    if isinstance(dataset, str):
        # torch.compile traces this, but not pathlib
        path = dataset.replace("\\", "/").rstrip("/")
        return path.split("/")[-1] if is_path(dataset) else dataset
    if isinstance(dataset, Path):
        return dataset.name
    kind = type(dataset).__name__
    # the length of a mapping is the number of its columns
    count = None if isinstance(dataset, Mapping) else _length(dataset)
    return kind if count is None else f"{kind} of {count}"


def is_stream(dataset: Any) -> bool:
    """Return whether a set does not tell how many rows it has; it may have no end."""
    return not isinstance(dataset, Path) and _length(_train_split(dataset)) is None


class Rows:
    """The usable rows of a calibration set; iteration counts the others.

    Not usable are rows that are null, empty or a single token id, which predicts nothing.

    Args:
        dataset: as in `watersic_hf.calibration.calibration_windows`.
    """

    def __init__(self, dataset: Any) -> None:
        self.name = describe(dataset)
        self.skipped: Counter[str] = Counter()
        self._entries = _entries(dataset)

    def __iter__(self) -> Iterator[str | Tensor]:
        kinds = set()
        for row in self._all():
            if row is None:
                self.skipped["null"] += 1
            elif len(row) == 0:
                self.skipped["empty"] += 1
            elif len(row) == 1 and isinstance(row, Tensor):
                self.skipped["of one token"] += 1
            else:
                kinds.add(isinstance(row, str))
                if len(kinds) > 1:
                    raise ValueError(
                        f"the calibration set {self.name} has rows of text and rows of token ids; "
                        f"all must be of one kind"
                    )
                yield row

    def _all(self) -> Iterator[str | Tensor | None]:
        number = 0
        for entry in self._entries:
            try:
                for row in _rows_of(entry):
                    yield row
                    number += 1
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"row {number} of the calibration set {self.name} {error}"
                ) from error

    def log_skipped(self) -> None:
        """Log how many rows were skipped, if any were."""
        if self.skipped:
            logger.warning("Skipped rows of the calibration set %s: %s.", self.name, self._counts())

    def nothing_usable(self) -> ValueError:
        """Return the error of a set without a usable row."""
        if not self.skipped:
            return ValueError(
                f"the calibration set {self.name} is empty; an iterator can be read only once"
            )
        return ValueError(
            f"the calibration set {self.name} has no usable row ({self._counts()}). A row needs "
            f"text, or at least two token ids that its `{_MASK}` keeps."
        )

    def _counts(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.items())


def _length(dataset: Any) -> int | None:
    """Return the length of a set; None if it has none."""
    try:
        return len(dataset)
    except TypeError:
        return None


def _train_split(dataset: Any) -> Any:
    """Return the split ``train`` of a set that is divided into splits, or the set itself."""
    if not isinstance(dataset, Mapping) or _IDS in dataset or _TEXT in dataset:
        return dataset
    if "train" not in dataset:
        raise ValueError(
            f"the calibration set is a {describe(dataset)} with {sorted(map(str, dataset))}, but "
            f"needs `{_TEXT}`, `{_IDS}` or a split `train`; pass one of its splits"
        )
    return dataset["train"]


def _entries(dataset: Any) -> Iterable[Any]:
    """Return the entries of a calibration set."""
    dataset = _train_split(dataset)
    if isinstance(dataset, str | Path):
        dataset = named_set(dataset)
    if isinstance(dataset, Mapping) or _is_table(dataset):
        return [dataset]
    if hasattr(dataset, "column_names"):
        # None if it is a stream; the other columns may be large, as images are
        names = dataset.column_names or ()
        if columns := [name for name in (_IDS, _MASK, _TEXT) if name in names]:
            dataset = dataset.select_columns(columns)
        return dataset.iter(batch_size=_BATCH)
    if not isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__"):
        raise ValueError(f"the calibration set is a {describe(dataset)}; it {_FORMS}")
    # data sets of torch have no `__iter__`
    return iter(dataset)


def _is_table(entry: Any) -> bool:
    """Return whether something is a table of pyarrow or pandas."""
    return hasattr(entry, "columns") and (hasattr(entry, "to_pydict") or hasattr(entry, "to_dict"))


def _rows_of(entry: Any) -> Iterator[str | Tensor | None]:
    """Yield the rows of an entry."""
    if _is_table(entry):
        entry = entry.to_pydict() if hasattr(entry, "to_pydict") else entry.to_dict("list")
    if not isinstance(entry, Mapping):
        yield from _token_rows(entry) if _is_array(entry) else _texts(entry)
    elif _IDS in entry:
        yield from _token_rows(entry[_IDS], entry.get(_MASK))
    elif _TEXT in entry:
        yield from _texts(entry[_TEXT])
    else:
        raise ValueError(f"has the columns {list(entry)}, but needs `{_TEXT}` or `{_IDS}`")


def _is_array(ids: Any) -> bool:
    """Return whether something is a list or an array, and so can be token ids."""
    return isinstance(ids, list | tuple) or getattr(ids, "ndim", 0) > 0


def _texts(texts: Any) -> Iterator[str | None]:
    """Yield a text, or the texts of a list."""
    for text in texts if _is_array(texts) else [texts]:
        if not isinstance(text, str | None):
            raise TypeError(f"is a {type(text).__name__}; a calibration set {_FORMS}")
        yield text


def _token_rows(ids: Any, mask: Any = None) -> Iterator[Tensor | None]:
    """Yield the rows of token ids, without the tokens that their mask leaves out."""
    if ids is None:
        yield None
    elif not _holds_rows(ids):
        yield _kept(ids, mask)
    else:
        masks = [None] * len(ids) if mask is None else mask
        if len(masks) != len(ids):
            raise ValueError(f"has {len(ids)} rows of `{_IDS}`, but {len(masks)} of `{_MASK}`")
        for row, row_mask in zip(ids, masks, strict=True):
            yield from _token_rows(row, row_mask)


def _holds_rows(ids: Any) -> bool:
    """Return whether token ids are several rows, and not one."""
    # rows of several lengths are an array of objects in numpy
    if hasattr(ids, "ndim") and str(ids.dtype) != "object":
        return ids.ndim > 1
    return any(row is None or _is_array(row) for row in ids)


def _kept(ids: Any, mask: Any) -> Tensor:
    """Return the token ids of one row that its mask keeps."""
    ids_T = _tensor(ids)
    if ids_T.is_floating_point() and ids_T.numel() > 0:
        raise ValueError(f"has token ids of {ids_T.dtype}, but they must be integers")
    ids_T = ids_T.to("cpu", torch.int64)
    if mask is None:
        return ids_T
    mask_T = _tensor(mask).flatten().cpu()
    if mask_T.shape != ids_T.shape:
        raise ValueError(f"has {len(ids_T)} `{_IDS}`, but {len(mask_T)} values of `{_MASK}`")
    if (mask_T < 0).any():
        # an additive mask is 0 where a token is kept
        raise ValueError(f"has a negative `{_MASK}`; it must be 1 for tokens to keep, 0 for others")
    return ids_T[mask_T != 0]


def _tensor(values: Any) -> Tensor:
    # a copy, as arrays of numpy may be read-only, of which torch warns
    return values if isinstance(values, Tensor) else torch.tensor(values)
