import json
import resource

import pytest
import torch
from safetensors.torch import save_file

from watersic_hf.checkpoint import (
    CheckpointError,
    checkpoint_files,
    read_headers,
    read_json,
    read_state,
    read_tensors,
    write_json,
    write_state,
    write_tensors,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(
        {"a.weight": torch.arange(64, dtype=torch.uint8), "b": torch.ones(3, 5)},
        path,
        metadata={"k": "v"},
    )
    return path


def test_headers_have_shape_dtype_and_size(file):
    headers = read_headers([file])

    assert headers["a.weight"][1:] == ((64,), "U8", 64)
    assert headers["b"][1:] == ((3, 5), "F32", 60)


def test_truncated_file_raises_with_the_incomplete_tensor(file):
    data = file.read_bytes()
    file.write_bytes(data[:-3])

    with pytest.raises(CheckpointError, match=r"a\.weight: .* cut short|b: .* cut short"):
        read_headers([file])


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 40, b"\x04" + b"\0" * 7 + b"{{{{"])
def test_file_of_another_kind_is_rejected(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_headers([path])


def test_missing_tensor_raises(file):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_tensors(file, ["c"])


def test_checkpoint_files_follow_the_index(tmp_path, file):
    save_file({"c": torch.ones(2)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"a.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    assert checkpoint_files(tmp_path) == [file]


def test_missing_shard_and_empty_folder_raise(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        checkpoint_files(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00001-of-00001"):
        checkpoint_files(tmp_path)


def test_write_state_replaces_and_read_state_returns_it(tmp_path):
    file = tmp_path / "made" / "state.safetensors"
    identity = {"settings": {"rate": 0.1}, "windows": "abc"}
    write_state(file, {"x": torch.zeros(3)}, {"identity": identity, "step": 1})
    values = torch.randn(4, 6).T

    write_state(file, {"x": values}, {"identity": identity, "step": 2, "kl": 0.1 + 0.2})
    tensors, facts = read_state(file, identity=identity)

    assert torch.equal(tensors["x"], values)
    assert facts == {"identity": identity, "step": 2, "kl": 0.1 + 0.2}
    assert [f.name for f in file.parent.iterdir()] == ["state.safetensors"]


def test_state_of_another_computation_raises_with_the_differences(tmp_path, file):
    write_state(tmp_path / "state", {}, {"identity": {"a": 1, "b": 2, "c": 3}})

    with pytest.raises(CheckpointError, match=r"other b \(2 instead of 0\) and c \(3 "):
        read_state(tmp_path / "state", identity={"a": 1, "b": 0, "c": 0})
    with pytest.raises(CheckpointError, match="written with other a"):
        read_state(file, identity={"a": 1})


def test_damaged_state_raises(tmp_path):
    (tmp_path / "state").write_bytes(b"not a state")

    with pytest.raises(CheckpointError, match="state: "):
        read_state(tmp_path / "state", identity={})


def test_damaged_tensor_of_a_state_raises(tmp_path):
    write_state(tmp_path / "state", {"x": torch.zeros(64)}, {"identity": {}})
    data = bytearray((tmp_path / "state").read_bytes())
    data[-1] ^= 1
    (tmp_path / "state").write_bytes(data)

    with pytest.raises(CheckpointError, match="this state is damaged"):
        read_state(tmp_path / "state", identity={})


def test_write_tensors_writes_the_bytes_of_safetensors(tmp_path):
    bits = torch.arange(48, dtype=torch.uint8)
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ]
    tensors = {f"layers.{i}.weight": bits.view(kind).clone() for i, kind in enumerate(kinds)}
    tensors |= {
        "b": torch.ones(2, 3),
        "a": torch.ones(2, 3).T.contiguous(),
        "scalar": torch.ones(()),
    }
    tensors |= {"empty": torch.empty(0, 4), "\u00fc": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})

    write_tensors(dict(tensors), tmp_path / "ours", {"format": "pt"})

    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_failed_write_keeps_the_existing_file(tmp_path):
    write_json(tmp_path / "facts.json", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"facts.json: cannot be written: File too large"):
            write_json(tmp_path / "facts.json", list(range(1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert read_json(tmp_path / "facts.json") == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]
