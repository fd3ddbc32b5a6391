"""Measure the peak memory of quantizing a model block by block from the disk.

    python benchmarks/streaming_memory.py [--blocks 8 16 32] [--hidden-size 1408] [--folder DIR]

Random Llama models in float32 (the largest has 2 GB) are written block by block.  Each is quantized
at 3 bits by a process of its own, on 4 windows of 128 random tokens.  "beyond MB" is the peak
memory of the process beyond that of an interpreter that has loaded torch.  Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

VOCABULARY = 8192

#: Script of the process that quantizes, given the folders of the model and of the output; prints
#: the bytes of memory before and at the peak, and the number of layers.
QUANTIZE = """
import sys
import torch
def held(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return 1024 * int(line.split()[1])
base = held("VmRSS")
from watersic_hf import WaterSICConfig
from watersic_hf.integration import quantize_to_folder
tokens = torch.randint(8192, (4, 128), generator=torch.Generator().manual_seed(0))
config = WaterSICConfig(bits=3.0, dataset=tokens, samples=4, sequence_length=128, batch_size=2)
layers = quantize_to_folder(sys.argv[1], sys.argv[2], config)
print(base, held("VmHWM"), len(layers))
"""


def write_model(folder: Path, blocks: int, hidden: int) -> int:
    """Write a random Llama with one shard per block, and return the bytes of its weights."""
    inner = 14 * hidden // 11
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, str] = {}

    def write(tensors: dict[str, Tensor]) -> int:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shards.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    def normal(*shape: int) -> Tensor:
        return 0.02 * torch.randn(shape, generator=generator)

    size = write(
        {
            "model.embed_tokens.weight": normal(VOCABULARY, hidden),
            "model.norm.weight": torch.ones(hidden),
        }
    )
    for number in range(blocks):
        layers = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        layers |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        layers["mlp.down_proj"] = (hidden, inner)
        block = {f"{name}.weight": normal(*shape) for name, shape in layers.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"{norm}.weight"] = torch.ones(hidden)
        size += write({f"model.layers.{number}.{name}": t for name, t in block.items()})
    index = {"metadata": {"total_size": size}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return size


def measure(folder: Path, blocks: int, hidden: int) -> dict:
    """Write and quantize one model, and return its row."""
    model = folder / f"model-{blocks}"
    size = write_model(model, blocks, hidden)
    command = [sys.executable, "-c", QUANTIZE, str(model), str(folder / f"quantized-{blocks}")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    base, peak, layers = map(int, done.stdout.split())
    return {
        "blocks": blocks,
        "layers": layers,
        "model MB": round(size / 1e6),
        "interpreter MB": round(base / 1e6),
        "peak MB": round(peak / 1e6),
        "beyond MB": round((peak - base) / 1e6),
    }


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden-size", type=int, default=1408, help="a multiple of 704")
    parser.add_argument("--folder", help="where models are written (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows.append(measure(Path(folder), blocks, arguments.hidden_size))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    return rows


if __name__ == "__main__":
    main()
