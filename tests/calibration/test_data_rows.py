"""Calibration sets in the forms that people have: padded rows, streams, what tokenizers give."""

import numpy as np
import pytest
import torch

from watersic_hf.calibration import Draw, calibration_windows, data, describe

IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
MASKS = [[1] * len(row) for row in IDS]
TEXT = " ".join(str(number) for number in range(400))


def windows(dataset, tokenizer=None, **changes):
    settings = {"samples": 3, "sequence_length": 32, "seed": 0} | changes
    return [w.tolist() for w in calibration_windows(dataset, tokenizer=tokenizer, **settings)]


def padded(side, width=6):
    rows, masks = [], []
    for row in IDS:
        zeros = [0] * (width - len(row))
        rows.append(zeros + row if side == "left" else row + zeros)
        ones = [1] * len(row)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return {"input_ids": rows, "attention_mask": masks}


def listed(columns):
    """Columns as one mapping per row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def dataset_forms():
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict(padded("right") | {"labels": [0, 1, 2]})
    yield "Dataset", rows
    yield "Dataset of tensors", rows.with_format("torch")
    yield "Dataset of arrays", rows.with_format("numpy")
    yield "Dataset of tables", rows.with_format("arrow")
    yield "Dataset without a mask", Dataset.from_dict({"input_ids": IDS}).with_format("numpy")
    yield "streaming", rows.to_iterable_dataset()
    yield "splits", DatasetDict(train=rows, test=rows.select([0]))
    yield "data frame", rows.to_pandas()
    yield "data loader", torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_without_padding(side):
    columns = padded(side)
    tensors = {name: torch.tensor(rows) for name, rows in columns.items()}
    arrays = {name: np.array(rows) for name, rows in columns.items()}

    for form in (columns, tensors, arrays, [tensors], listed(columns), listed(tensors)):
        assert windows(form) == IDS
    assert windows(tensors | {"attention_mask": tensors["attention_mask"].bool()}) == IDS


def test_mask_with_holes_keeps_what_it_marks():
    row = {"input_ids": [3, 4, 5, 6], "attention_mask": [1, 0, 0, 2], "token_type_ids": [0] * 4}

    assert windows([row]) == [[3, 6]]


def test_datasets_in_memory_streaming_and_in_batches():
    pytest.importorskip("datasets")

    for form, rows in dataset_forms():
        assert windows(rows) == IDS, form


@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt"}])
def test_what_a_tokenizer_returns(tokenizer, options):
    texts = ["one two", "a much longer text", "three"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(texts, padding=True, **options)

    assert windows(encoded) == rows
    assert windows(dict(encoded)) == rows
    assert windows([tokenizer(text, **options) for text in texts]) == rows
    assert windows(tokenizer(texts[1], **options)) == rows[1:2]


def text_forms():
    from datasets import Dataset, IterableDataset

    rows = [{"text": TEXT}, {"text": None}, {"text": TEXT}]
    yield "generator of texts", (row["text"] for row in rows)
    yield "generator of rows", iter(rows)
    yield "list of rows", rows
    yield "columns", {"text": [TEXT, None, TEXT]}
    yield "Dataset", Dataset.from_list(rows)
    yield "Dataset of arrays", Dataset.from_list(rows).with_format("numpy")
    yield "streaming", Dataset.from_list(rows).to_iterable_dataset()
    yield "streaming without known columns", IterableDataset.from_generator(lambda: iter(rows))


def test_texts_in_every_form_equal_a_list_of_strings(tokenizer):
    pytest.importorskip("datasets")
    expected = windows([TEXT, TEXT], tokenizer)

    for form, rows in text_forms():
        assert windows(rows, tokenizer) == expected, form


def test_only_the_beginning_of_an_endless_stream_is_read(tokenizer, monkeypatch, watersic_log):
    monkeypatch.setattr(data, "_STREAM_CHARACTERS", 4000)
    monkeypatch.setattr(data, "_STREAM_CHARACTERS_PER_TOKEN", 30)
    texts = ({"text": TEXT} for _ in iter(int, 1))
    ids = ([number, number] for number, _ in enumerate(iter(int, 1)))

    first = windows(texts, tokenizer, samples=2)
    seen = Draw(samples=2, sequence_length=32, seed=0)
    longer = windows(texts, tokenizer, samples=8, seed=1, seen=seen)

    # 4,000 and 8 * 32 * 30 characters, in texts of 1,489
    assert "Read 3 texts of the stream generator" in watersic_log.text
    assert "Read 6 texts of the stream generator" in watersic_log.text
    assert len(longer) == 8
    assert not any(window in longer for window in first)
    assert windows(ids, samples=2, seen=seen) == [[2, 2], [3, 3]]


def test_rows_without_tokens_are_skipped_and_counted(watersic_log):
    rows = [[], [4], None, [5, 6], [7], {"input_ids": None}, {"input_ids": [8, 9, 1]}]
    masked = {"input_ids": [3, 4], "attention_mask": [0, 0]}

    assert windows([*rows, masked]) == [[5, 6], [8, 9, 1]]
    assert "Skipped rows of the calibration set list of 8: 2 empty, 2 of one token, 2 null." in (
        watersic_log.text
    )


def test_empty_and_null_texts_are_skipped_and_counted(tokenizer, watersic_log):
    assert windows(["", TEXT, None, "", TEXT], tokenizer) == windows([TEXT, TEXT], tokenizer)
    assert "2 empty, 1 null." in watersic_log.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([None, [], [3]], r"has no usable row \(1 null, 1 empty, 1 of one token\)"),
        (["", None], r"has no usable row \(1 empty, 1 null\)"),
        ({"input_ids": [], "attention_mask": []}, r"no usable row \(1 empty\)"),
        (iter(()), "is empty; an iterator can be read only once"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "row 0 .* 2 `input_ids`, but 1 values"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]] * 2}, "1 rows .* but 2 of"),
        ([[1, 2], {"input_ids": [1, 2], "attention_mask": [0.0, -1e9]}], "row 1 .* negative"),
        ([[1.5, 2.5]], "token ids of torch.float32, but they must be integers"),
        ([[1, 2], "text"], "rows of text and rows of token ids"),
        ([{"tokens": [1, 2]}], r"has the columns \['tokens'\], but needs `text` or `input_ids`"),
        ({"test": [[1, 2]]}, r"with \['test'\], but needs .* a split `train`"),
        ([1, 2, 3], "row 0 .* is a int; a calibration set must be"),
        (torch.arange(4), "must be"),
    ],
)
def test_unusable_set_raises_and_says_what_it_has(dataset, message):
    with pytest.raises(ValueError, match=message):
        windows(dataset)


def test_text_of_one_token_is_not_usable(tokenizer):
    with pytest.raises(ValueError, match=r"has no usable row \(1 of one token\)"):
        windows(["a"], tokenizer)


def test_describe_counts_rows_where_a_set_has_a_length():
    assert describe({"input_ids": [[1]]}) == "dict"
    assert describe(iter([])) == "list_iterator"
    assert describe(torch.zeros(3, 2)) == "Tensor of 3"
