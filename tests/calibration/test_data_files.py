"""Calibration text in files of any legal name, and what is published of it."""

import codecs
import json
from pathlib import Path

import pytest
import torch

from watersic_hf.calibration import calibration_windows, describe
from watersic_hf.evaluation import evaluation_text

TEXT = "Prüfung: " + " ".join(str(number) for number in range(200))


def windows(dataset, tokenizer):
    options = {"samples": 3, "sequence_length": 32, "seed": 0}
    return torch.cat(calibration_windows(dataset, tokenizer=tokenizer, **options))


def write(path, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True)
    is_json = ".json" in path.name.lower()
    path.write_bytes((json.dumps({"text": TEXT}) + "\n" if is_json else TEXT).encode(encoding))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "calib[1].jsonl",
        "[data]/calib.json",
        "wh*t?.jsonl",
        "ein Ordner/ä (1).jsonl",
        "CALIB.JSONL",
        "calib[1].txt",
        "CALIB.TXT",
        "Notes.Md",
        ".hidden/#1 100%.jsonl",
    ],
)
def test_any_legal_name_of_a_file_works(tokenizer, tmp_path, name):
    pytest.importorskip("datasets")
    path = write(tmp_path / name)
    # what a pattern would also find
    (tmp_path / "calib1.jsonl").write_text('{"text": "another"}')

    assert torch.equal(windows(str(path), tokenizer), windows([TEXT], tokenizer))


def test_brackets_in_the_name_of_a_parquet_file(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "[1].Parquet"
    datasets.Dataset.from_dict({"text": [TEXT]}).to_parquet(path)

    assert torch.equal(windows(path, tokenizer), windows([TEXT], tokenizer))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_byte_order_mark_is_no_text(tokenizer, tmp_path, encoding, name):
    pytest.importorskip("datasets")
    path = write(tmp_path / name, encoding)

    assert torch.equal(windows(path, tokenizer), windows([TEXT], tokenizer))
    if name == "t.txt":
        assert evaluation_text(path) == TEXT


def test_windows_line_ends_are_read_as_others(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"a\r\nb\r\n")

    assert evaluation_text(path) == "a\nb\n"


def test_file_that_is_no_text_is_named(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("Prüfung".encode("latin-1"))

    with pytest.raises(ValueError, match=r"t\.txt is not UTF-8: .* Save it as UTF-8"):
        windows(path, tokenizer)


def test_file_of_token_ids_with_a_mask(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "t.jsonl"
    rows = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "text": "x"}] * 2
    path.write_text("\n".join(map(json.dumps, rows)))

    assert windows(path, None).tolist() == [5, 6, 5, 6]


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("/home/someone/secret/t.TXT", "t.TXT"),
        ("secret/t.jsonl", "t.jsonl"),
        ("~/t.md", "t.md"),
        ("../secret/set/", "set"),
        ("/data/someone/c4", "c4"),
        ("C:\\Users\\someone\\t.parquet", "t.parquet"),
        (Path("/home/someone/t.json"), "t.json"),
        ("allenai/c4", "allenai/c4"),
        ("wikitext2", "wikitext2"),
        ("pydoc", "pydoc"),
    ],
)
def test_file_is_named_by_its_own_name_alone(dataset, name):
    assert describe(dataset) == name


@pytest.mark.parametrize("dataset", ["/home/someone/t.txt", "allenai/c4", ["a"]])
def test_torch_compile_traces_the_name(dataset):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: (x, describe(dataset)), fullgraph=True, backend="eager")

    # encoder-decoders copy their configuration in every forward pass
    assert compiled(torch.ones(1))[1] == describe(dataset)
