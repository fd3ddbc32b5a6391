import copy
import json
import random
import types

import pytest
import torch
from tokenizers import processors

from watersic_hf.calibration import Draw, calibration_windows, describe, pydoc_texts, text_windows

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def windows(tokenizer):
    def run(dataset, **changes):
        settings = {
            "tokenizer": tokenizer,
            "model": None,
            "samples": 3,
            "sequence_length": 32,
            "seed": 0,
        }
        return calibration_windows(dataset, **settings | changes)

    return run


def pieces(windows):
    """All sequences of seven consecutive tokens in windows."""
    tokens = [window.tolist() for window in windows]
    return {tuple(t[i : i + 7]) for t in tokens for i in range(len(t) - 6)}


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("form", ["strings", "txt", "jsonl", "parquet", "Dataset", "path object"])
def test_same_text_in_every_form_gives_same_windows(windows, tmp_path, form):
    datasets = pytest.importorskip("datasets")
    text, jsonl, parquet = (tmp_path / f"t.{kind}" for kind in ("txt", "jsonl", "parquet"))
    text.write_text(TEXT)
    write(jsonl, [{"text": TEXT}])
    rows = datasets.Dataset.from_dict({"text": [TEXT]})
    rows.to_parquet(parquet)
    forms = {
        "strings": [TEXT],
        "txt": str(text),
        "jsonl": str(jsonl),
        "parquet": str(parquet),
        "Dataset": rows,
        "path object": text,
    }

    found = windows(forms[form])

    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, windows([TEXT]), strict=True))


@pytest.mark.parametrize(
    "ids",
    [
        [[5, 6, 7], [8, 9]],
        [torch.tensor([5, 6, 7]), torch.tensor([8, 9])],
        [{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([[8, 9]])}],
    ],
)
def test_token_ids_are_used_unchanged(windows, ids):
    found = windows(ids, tokenizer=None)

    assert [w.tolist() for w in found] == [[5, 6, 7], [8, 9]]


def test_token_id_tensor_is_cut_to_sequence_length(windows):
    found = windows(torch.arange(200).view(4, 50), tokenizer=None)

    assert [len(w) for w in found] == [32, 32, 32]


def test_windows_do_not_overlap_and_depend_on_seed(windows, tokenizer):
    text = pydoc_texts()[:6]
    tokens = tokenizer("\n\n".join(text))["input_ids"]
    starts = {tuple(tokens[i : i + 32]) for i in range(0, len(tokens) - 31, 32)}

    first, again, other = windows(text), windows(text), windows(text, seed=1)

    assert all(tuple(w.tolist()) in starts for w in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_short_text_gives_fewer_windows_with_warning(windows, watersic_log):
    found = windows(["hello there"])

    assert len(found) == 1
    assert 0 < len(found[0]) < 32
    assert "has only 1 windows of 32 tokens; 3 were requested" in watersic_log.text


def test_self_samples_from_the_model_reproducibly(windows, make_llama):
    model = make_llama()
    state = torch.get_rng_state()

    first = windows("self", tokenizer=None, model=model)
    again = windows("self", tokenizer=None, model=model)
    other = windows("self", tokenizer=None, model=model, seed=7)

    assert [len(w) for w in first] == [32, 32, 32]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_benchmark_sets_load_with_optimum_and_keep_random_state(windows, monkeypatch):
    data = pytest.importorskip("optimum.gptq.data")
    rows = types.SimpleNamespace()
    rows.load = lambda *a, **k: {"text": [TEXT] * 10}
    monkeypatch.setattr(data, "load_dataset", rows.load)
    before = (random.getstate(), torch.get_rng_state())

    first, again = windows("wikitext2"), windows("wikitext2")

    assert [len(w) for w in first] == [32, 32, 32]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_other_names_load_from_the_hub(windows, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": [TEXT]})

    monkeypatch.setattr(datasets, "load_dataset", load)

    assert len(windows("someone/texts")) == 3
    assert asked == [("someone/texts", "train")]


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        (["text"], {"tokenizer": None}, "no tokenizer was given"),
        ("missing.txt", {}, "missing.txt does not exist"),
        ([], {}, "is empty"),
        (3, {}, "the calibration set is a int"),
        ([3.5], {}, "must be a name, the path of a file"),
        ("self", {"model": None}, "needs a model that can generate"),
    ],
)
def test_invalid_calibration_set_raises(windows, dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        windows(dataset, **changes)


def test_unknown_file_type_is_refused(windows, tmp_path):
    path = tmp_path / "text.docx"
    path.write_bytes(b"PK")

    with pytest.raises(ValueError, match=r"text\.docx must end in one of"):
        windows(str(path))


def test_file_without_text_column_is_refused(windows, tmp_path):
    pytest.importorskip("datasets")
    path = write(tmp_path / "t.jsonl", [{"body": "x"}])

    with pytest.raises(ValueError, match=r"has the columns \['body'\], but needs `text`"):
        windows(str(path))


def numbers(count):
    """A text without repetitions."""
    return " ".join(str(number) for number in range(count))


@pytest.mark.parametrize("length", [8, 32, 56])
def test_second_draw_shares_no_text_with_first(windows, length):
    dataset = [numbers(1500)]
    first = windows(dataset, samples=5)
    others = windows(
        dataset,
        samples=6,
        sequence_length=length,
        seed=1,
        seen=Draw(samples=5, sequence_length=32, seed=0),
    )

    assert len(others) == 6
    assert pieces(first).isdisjoint(pieces(others))


def test_seen_windows_are_reused_first_with_warning_if_needed(windows, caplog):
    dataset = [numbers(300)]
    every = windows(dataset, samples=999)
    first = windows(dataset, samples=len(every) - 2)
    caplog.clear()

    seen = Draw(samples=len(every) - 2, sequence_length=32, seed=0)
    found = windows(dataset, samples=4, seed=3, seen=seen)

    assert "2 of 4 windows were used before" in caplog.text
    assert pieces(found[:2]) <= pieces(first)
    assert pieces(found[2:]).isdisjoint(pieces(first))


def test_token_ids_of_an_earlier_draw_are_skipped(windows):
    ids = [[n, n] for n in range(10)]

    found = windows(ids, samples=3, seen=Draw(samples=4, sequence_length=32, seed=0))

    assert [window[0].item() for window in found] == [4, 5, 6]


def test_second_draw_from_the_model_differs(windows, make_llama):
    model = make_llama(num_hidden_layers=1)
    options = {"model": model, "sequence_length": 8}
    first = windows("self", **options)

    found = windows("self", **options, seen=Draw(samples=3, sequence_length=8, seed=0))

    assert all(not torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_held_out_topics_are_not_calibration_text():
    train, held_out = pydoc_texts(), pydoc_texts(held_out=True)

    assert set(train).isdisjoint(held_out)
    assert len(held_out) > len(train) / 20
    assert sum(map(len, held_out)) > 20_000


def test_describe_calibration_set():
    assert describe(None) is None
    assert describe("c4") == "c4"
    assert describe(["a", "b"]) == "list of 2"


def test_every_window_begins_with_bos_if_the_tokenizer_adds_it(windows, tokenizer):
    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    text = " ".join(str(number) for number in range(400))
    plain = text_windows(text, tokenizer, 31)

    found = text_windows(text, with_bos, 32)

    assert len(found) == len(plain) > 3
    assert all(window[0] == tokenizer.bos_token_id for window in found)
    assert all(torch.equal(a[1:], b) for a, b in zip(found, plain, strict=True))
    assert all(window[0] != tokenizer.bos_token_id for window in plain)


def test_text_shorter_than_a_window_gives_one_window(tokenizer):
    (window,) = text_windows("one two", tokenizer, 512)

    assert window.tolist() == tokenizer("one two")["input_ids"]
