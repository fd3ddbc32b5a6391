import contextlib
import gc
import mmap
import os
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from watersic_hf import WaterSICConfig, WaterSICLinear, WaterSICRuntime
from watersic_hf.nn.paging import _PAGEOUT, release

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this")


def resident_bytes(file):
    """Bytes of a file's mappings that are in memory."""
    found, mine = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            key, *values = line.split()
            if not key.endswith(":"):
                mine = line.rstrip().endswith(str(file))
            elif mine and key == "Rss:":
                found += 1024 * int(values[0])
    return found


def write_back(file):
    """Have a new file written to the disk: until then, its pages cannot leave memory."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


@pytest.fixture
def folder(tmp_path):
    """A folder on a disk; the test is skipped where files are in memory, or the kernel is old."""
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(1 << 20))
    write_back(probe)
    with open(probe, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == bytes(1 << 20)
        with contextlib.suppress(OSError):
            mapped.madvise(_PAGEOUT)
        if resident_bytes(probe) > 1 << 19:
            pytest.skip("pages of files do not leave memory here")
    return tmp_path


def test_a_tensor_of_a_file_leaves_memory_and_comes_back(folder):
    file = folder / "values"
    np.arange(1 << 20, dtype=np.int32).tofile(file)
    write_back(file)
    tensor = torch.from_numpy(np.memmap(file, np.int32, mode="c"))
    expected = tensor.clone()
    before = resident_bytes(file)
    assert before >= tensor.nbytes

    release(tensor[1000:])

    assert resident_bytes(file) < before / 2
    assert torch.equal(tensor, expected)


def test_other_memory_is_left_alone():
    tensor = torch.arange(1 << 20)

    release(tensor)

    assert torch.equal(tensor, torch.arange(1 << 20))


def test_a_loaded_model_does_not_keep_its_payload(folder):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, num_attention_heads=4))
    dense.save_pretrained(folder / "dense")
    config = WaterSICConfig(bits=4.0)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "first")
    del model
    file = folder / "first" / "model.safetensors"
    write_back(file)

    found = {}
    for residency in ("stored", "packed"):
        config = WaterSICConfig(runtime=WaterSICRuntime(residency=residency))
        model = AutoModelForCausalLM.from_pretrained(folder / "first", quantization_config=config)
        model(torch.tensor([[1, 2]]))
        found[residency] = resident_bytes(file)
        if residency == "stored":
            del model
            gc.collect()
    layers = [module for module in model.modules() if isinstance(module, WaterSICLinear)]
    payload = sum(layer.weight.nbytes for layer in layers)
    assert found["packed"] < found["stored"] - payload / 2

    model.save_pretrained(folder / "second")
    again = folder / "second" / "model.safetensors"
    assert again.read_bytes() == file.read_bytes()
