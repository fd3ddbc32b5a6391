import collections

import pytest
import torch

from watersic_hf.streams import outputs
from watersic_hf.streams.outputs import FileStore, MemoryStore

OUTPUT = (torch.randn(3, 4).T, {"weights": [None, torch.ones(2, dtype=torch.bfloat16)]}, 5)


def test_files_return_what_was_kept(tmp_path):
    store = FileStore(tmp_path, streams=1)
    free = store.free
    kept = store.keep(OUTPUT)

    hidden, rest, number = kept.read()

    assert torch.equal(hidden, OUTPUT[0])
    assert hidden.stride() == OUTPUT[0].stride()
    assert rest["weights"][0] is None
    assert number == 5
    assert torch.equal(rest["weights"][1], OUTPUT[1]["weights"][1])
    assert store.free < free
    kept.drop()
    assert store.free == free
    assert not list(tmp_path.iterdir())


def test_what_is_written_into_an_answer_is_not_kept(tmp_path):
    kept = FileStore(tmp_path, streams=1).keep(OUTPUT)

    kept.read()[0].zero_()

    assert torch.equal(kept.read()[0], OUTPUT[0])


def test_classes_of_a_model_are_not_kept_in_files(tmp_path):
    pair = collections.namedtuple("pair", "hidden")(torch.ones(2))

    assert FileStore(tmp_path, streams=1).keep(pair) is None
    assert MemoryStore(100).keep(pair).read() is pair


@pytest.mark.parametrize("streams", [1, 2])
def test_files_share_the_disk(streams, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")(160)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda folder: usage)
    store = FileStore(tmp_path, streams=streams)

    assert (store.keep(torch.ones(8)) is None) == (streams == 2)
    assert store.keep(torch.ones(8)) is None


def test_a_full_disk_ends_the_keeping(tmp_path, monkeypatch, caplog):
    def fail(output, file):
        file.touch()
        raise RuntimeError("no space left")

    store = FileStore(tmp_path, streams=1)
    monkeypatch.setattr(outputs.torch, "save", fail)

    assert store.keep(torch.ones(8)) is None
    assert store.free == 0
    assert not list(tmp_path.iterdir())
    assert "no space left" in caplog.text
