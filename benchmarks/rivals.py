"""Rival quantizers, really run: one rival at one setting, on the same layers and windows as ours.

    python benchmarks/rivals.py windows --model FOLDER --text calib.txt --out calib.safetensors
    python benchmarks/rivals.py hqq --model FOLDER --bits 3 --out DIR
    python benchmarks/rivals.py gptq --model FOLDER --bits 3 --windows calib.safetensors --out DIR

Every rival quantizes the linear layers of the decoder blocks and nothing else.  DIR becomes an
ordinary dense bfloat16 folder with the dequantized weights, so that one evaluator judges all
rivals, and `rival.json`, which says what ran and what it stores (`RECORD` lists the fields).  Its
`seconds` are processor time, of all threads, since these machines are shared.  `reproduced` is the
share of weights that came out better than `Job.reproduced` allows: above 0, a model that was once
quantized has met its own grid again, and the run says nothing of the rival.

Only `windows` needs watersic_hf: the others run where the rival is installed.  One environment for
each line (Python 3.11, CPU), after `pip install torch==2.13.0` and with a constraints file that
keeps it; these versions ran:

    hqq, bnb, quanto, torchao, llamacpp:
        transformers==5.23.0 accelerate==1.15.0 hqq==0.2.8.post1 bitsandbytes==0.50.2
        optimum-quanto==0.2.7 torchao==0.18.0 gguf==0.19.0
    sinq:       as for hqq, datasets==5.2.0, then sinq==0.2.0 with --no-deps (gemlite needs CUDA);
        apart from the others, since it loads torch and itself at every start of Python
    gptq:       transformers==5.23.0 gptqmodel==7.6.0 (7.7.0 needs a newer torch), wheel, setuptools
    autoround:  transformers==5.23.0 auto-round==0.16.1

llama-quantize is built from llama.cpp's source, here the one in llama-cpp-python-0.3.36.tar.gz:

    cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_CURL=OFF && cmake --build build --target llama-quantize
    python benchmarks/rivals.py llamacpp --tools build/bin --release "llama-cpp-python 0.3.36" ...
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: What `rival.json` holds, in this order.
RECORD = (
    "rival", "version", "settings", "model", "weights", "bytes", "counted", "bits", "reproduced",
    "seconds", "calibration",
)  # fmt: skip


@dataclass
class Job:
    """One run: what is quantized, with which settings, and what it turned out to store."""

    options: argparse.Namespace
    weights: dict[str, Tensor]
    """By tensor name: the weights to quantize, and after the run the dequantized ones."""
    windows: Tensor | None = None
    settings: str = ""
    version: str = ""
    counted: str = "tensors in memory, as the layer's state_dict holds them"
    stored: dict[str, int] = field(default_factory=dict)
    """By tensor name: bytes."""
    seconds: float = 0.0
    original: dict[str, Tensor] = field(init=False)
    shapes: dict[str, torch.Size] = field(init=False)

    def __post_init__(self):
        self.original = dict(self.weights)
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}

    @property
    def model(self) -> Path:
        return Path(self.options.model)

    @property
    def bytes(self) -> int:
        return sum(self.stored.values())

    @property
    def count(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def reproduced(self) -> float:
        """The share of weights in layers with an error below the bound of Gaussian weights.

        That is 4^-bits of the weights' mean square.  Scalar quantizers stay above it by 0.25 bit
        and more, unless the weights already lie on a grid that they find.
        """
        found = 0
        for name, dense in self.weights.items():
            weight = self.original[name].double()
            error = (dense.double() - weight).square().sum() / weight.square().sum()
            if error < 4.0 ** (-8 * self.stored[name] / weight.numel()):
                found += weight.numel()
        return found / self.count

    @contextmanager
    def timed(self):
        """Count the processor time spent inside, of subprocesses too, as the rival's."""
        start = sum(os.times()[:4])
        yield
        self.seconds += sum(os.times()[:4]) - start

    def each_layer(self, quantize: Callable, dequantize: Callable) -> None:
        """Quantize layer by layer; `quantize` takes a weight, `dequantize` what that returned.

        `dequantize` returns the dense weight and the tensors that are stored for it.
        """
        for name, weight in self.weights.items():
            with self.timed():
                quantized = quantize(weight)
            dense, stored = dequantize(quantized)
            self.weights[name] = dense
            self.stored[name] = nbytes(stored)


def hqq(job: Job) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    bits, group, axis = job.options.bits, job.options.group, job.options.axis
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    job.version = version("hqq")
    job.settings = f"{bits} bits, group {group}, axis {axis}, bfloat16 scale and zero"
    job.each_layer(
        lambda weight: HQQLinear(
            linear(weight), dict(config), compute_dtype=torch.bfloat16, device="cpu"
        ),
        lambda layer: (layer.dequantize(), layer.state_dict().values()),
    )


def sinq(job: Job) -> None:
    from sinq.sinqlinear import SINQLinear, sinq_base_quant_config

    bits, group = job.options.bits, job.options.group
    config = sinq_base_quant_config(bits, group, method="sinq")
    job.version = version("sinq")
    job.settings = f"sinq, {bits} bits, group {group}, 1D tiles, scales and zeros of 8 bits"
    job.each_layer(
        lambda weight: SINQLinear(
            linear(weight), config, compute_dtype=torch.bfloat16, device="cpu"
        ),
        lambda layer: (layer.dequantize(), flat(layer.state_dict())),
    )


def bnb(job: Job) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    job.version = version("bitsandbytes")
    job.settings = f"{job.options.type}, block 64" + ", double" * job.options.double
    job.each_layer(
        lambda weight: quantize_4bit(
            weight,
            blocksize=64,
            quant_type=job.options.type,
            compress_statistics=job.options.double,
        ),
        lambda packed: (
            dequantize_4bit(*packed),
            [packed[0], *packed[1].as_dict(packed=True).values()],
        ),
    )


def quanto(job: Job) -> None:
    from optimum.quanto import QLinear, qtypes

    def quantize(weight: Tensor) -> nn.Module:
        layer = QLinear.from_module(linear(weight), weights=qtypes[f"qint{job.options.bits}"])
        layer.freeze()
        return layer

    job.version = version("optimum-quanto")
    job.settings = f"qint{job.options.bits}, its default groups (at most 128) and optimizer"
    job.each_layer(quantize, lambda layer: (layer.weight.dequantize(), layer.state_dict().values()))


def torchao(job: Job) -> None:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(
        group_size=job.options.group, int4_choose_qparams_algorithm=job.options.algorithm
    )

    def quantize(weight: Tensor) -> nn.Module:
        layer = nn.Sequential(linear(weight))
        quantize_(layer, config)
        return layer[0]

    def dequantize(layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
        # the packing is the kernel's own: a product with the identity reads it back exactly
        dense = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T
        return dense, [layer.weight.qdata, layer.weight.scale_and_zero]

    job.version = version("torchao")
    job.settings = f"int4 for CPU (opaque), group {job.options.group}, {job.options.algorithm}"
    job.each_layer(quantize, dequantize)


def llamacpp(job: Job) -> None:
    """llama-quantize with an importance matrix: the mean squares of each layer's inputs."""
    import gguf

    tool = shutil.which("llama-quantize", path=job.options.tools)
    if tool is None:
        raise SystemExit("llamacpp: no `llama-quantize` on the PATH or in the folder of --tools")
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3_text": gguf.MODEL_ARCH.GEMMA3}[
        config["model_type"]
    ]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    names = {names.get_name(n, try_suffixes=(".weight",)): n for n in job.weights}
    fold = {n: folding(w.shape[1]) if job.options.fold else 1 for n, w in job.weights.items()}
    pure = ["--pure"] * job.options.pure
    types = Counter()
    with tempfile.TemporaryDirectory() as scratch, job.timed():
        source, matrix, target = (f"{scratch}/{name}.gguf" for name in ("source", "matrix", "out"))
        write_source(job, source, gguf.MODEL_ARCH_NAMES[arch], config, names, fold)
        write_matrix(job, matrix, names, fold)
        command = [tool, "--imatrix", matrix, *pure, source, target, job.options.type, "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llamacpp: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        for tensor in gguf.GGUFReader(target).tensors:
            name = names[tensor.name]
            dense = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            job.weights[name] = dense.reshape(job.shapes[name])
            job.stored[name] = int(tensor.n_bytes)
            types[tensor.tensor_type.name] += job.shapes[name].numel()
    weights = sum(types.values())
    parts = ", ".join(f"{n} {w / weights:.1%}" for n, w in types.most_common())
    job.version = job.options.release
    job.counted = "tensors of the GGUF file"
    job.settings = f"{job.options.type}{' pure' * job.options.pure}, importance matrix"
    job.settings += ", rows folded to multiples of 256 columns" * job.options.fold + f" ({parts})"


def write_source(job: Job, file: str, arch: str, config: dict, names: dict, fold: dict) -> None:
    """A GGUF of the linear layers alone, with what llama-quantize wants to know of the model.

    Every row is quantized by itself, so that q and k need not be permuted as in llama.cpp's models.
    """
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config.get("sliding_window") or 0)
    writer.add_vocab_size(config["vocab_size"])
    for short, name in names.items():
        columns = fold[name] * job.shapes[name][1]
        writer.add_tensor(short, job.weights[name].float().reshape(-1, columns).numpy())
    close(writer)


def write_matrix(job: Job, file: str, names: dict, fold: dict) -> None:
    """An importance matrix in llama-imatrix's format, from the windows."""
    import gguf

    squares = kept(job.options.squares, partial(mean_squares, job))
    tokens = float(job.windows.numel())
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["windows"])
    writer.add_uint32("imatrix.chunk_count", len(job.windows))
    writer.add_uint32("imatrix.chunk_size", job.windows.shape[1])
    for short, name in names.items():
        total = (squares[name] * tokens).tile(fold[name])
        writer.add_tensor(f"{short}.in_sum2", total[None].numpy())
        writer.add_tensor(f"{short}.counts", torch.full((1, 1), tokens).numpy())
    close(writer)


def gptq(job: Job) -> None:
    # on machines of one or two cores its thread pool asks for more workers than it has
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=job.options.bits,
        group_size=job.options.group,
        sym=not job.options.asymmetric,
        mse=job.options.mse,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as scratch:
        with job.timed():
            model = GPTQModel.load(str(job.model), config)
            model.quantize(
                [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]}
                 for w in job.windows],
                batch_size=1,
            )  # fmt: skip
            model.save(scratch)
        read_gptq(job, Path(scratch), first_zero=1)
    job.version = version("gptqmodel")
    job.settings = (
        f"GPTQ, {config.bits} bits, group {config.group_size}, "
        f"{'symmetric' if config.sym else 'asymmetric'}, act_group_aware {config.act_group_aware}, "
        f"desc_act {config.desc_act}, damping {config.damp_percent}, mse {config.mse}"
    )


def autoround(job: Job) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count, length = job.windows.shape
    chosen = {"iters": job.options.iters}
    if job.options.lr:
        chosen["lr"] = job.options.lr
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        with job.timed():
            rounding = AutoRound(
                model,
                AutoTokenizer.from_pretrained(job.model),
                bits=job.options.bits,
                group_size=job.options.group,
                sym=not job.options.asymmetric,
                dataset=list(job.windows.split(job.options.batch)),
                nsamples=count,
                seqlen=length,
                batch_size=job.options.batch,
                enable_alg_ext=job.options.alg_ext,
                device_map="cpu",
                enable_torch_compile=False,
                **chosen,
            )
            rounding.quantize_and_save(scratch, format="auto_gptq")
        found = Path(scratch)
        if not list(found.glob("*.safetensors")):
            (found,) = (file.parent for file in found.rglob("model*.safetensors"))
        read_gptq(job, found, first_zero=1)
    job.version = version("auto-round")
    job.settings = (
        f"{job.options.bits} bits, group {job.options.group}, "
        f"{'asymmetric' if job.options.asymmetric else 'symmetric'}, {job.options.iters} "
        f"iterations, learning rate {job.options.lr or 'default'}, batch {job.options.batch}"
        + ", alg_ext"
        * job.options.alg_ext
    )


def read_gptq(job: Job, folder: Path, *, first_zero: int) -> None:
    """Take bytes and dense weights from a folder in GPTQ's format.

    A layer has `qweight` (codes, packed along the inputs), `qzeros` (packed along the outputs, less
    `first_zero`), `scales` (groups x outputs) and `g_idx` (the group of every input).
    """
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, shape in job.shapes.items():
        stem = name.removesuffix("weight")
        stored = {key: tensor for key, tensor in tensors.items() if key.startswith(stem)}
        job.stored[name] = nbytes(stored.values())
        codes_NA = unpack(stored[stem + "qweight"], bits=job.options.bits)
        zeros_GA = unpack(stored[stem + "qzeros"].T, bits=job.options.bits).T + first_zero
        group_N = torch.arange(shape[1]) // job.options.group
        group_N = stored.get(stem + "g_idx", group_N).long()
        scales_GA = stored[stem + "scales"].float()
        job.weights[name] = ((codes_NA - zeros_GA[group_N]) * scales_GA[group_N]).T
    job.counted = "tensors of the saved GPTQ file: codes, scales, zeros, group indices"


def unpack(words: Tensor, *, bits: int) -> Tensor:
    """Unsigned integers of `bits` bits from int32 words, lowest first, along dimension 0."""
    columns = words.shape[1]
    places = torch.arange(32, dtype=torch.int32)[None, :, None]
    stream = ((words[:, None] >> places) & 1).reshape(-1, columns)
    weights = (1 << torch.arange(bits))[None, :, None]
    return (stream.reshape(-1, bits, columns) * weights).sum(1)


def folding(columns: int) -> int:
    """How many rows side by side have a multiple of 256 columns, as k-quants and i-quants need."""
    return 256 // math.gcd(columns, 256)


def kept(file: str | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a file, which is written first where there is none."""
    if file and Path(file).is_file():
        return load_file(file)
    made = make()
    if file:
        save_file(made, file)
    return made


def close(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def mean_squares(job: Job) -> dict[str, Tensor]:
    """The mean square of every input of every layer over the windows, by tensor name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).eval()
    sums = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

    for name in job.weights:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(partial(add, name))
    for window in job.windows:
        model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    return {name: (total / job.windows.numel()).float() for name, total in sums.items()}


def windows(options: argparse.Namespace) -> None:
    """Write the calibration windows that all rivals share, chosen by our own loader."""
    from transformers import AutoTokenizer

    from watersic_hf.calibration.data import calibration_windows

    chosen = calibration_windows(
        options.text,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    save_file({"windows": torch.stack(chosen)}, options.out)
    print(f"{options.out}: {len(chosen)} windows of {options.sequence_length} tokens")


def read_windows(file: str) -> Tensor:
    """The windows of a file, int64, count x length."""
    found = load_file(file).get("windows")
    if found is None or found.ndim != 2 or found.dtype != torch.int64:
        raise SystemExit(f"{file}: needs one int64 tensor `windows` of shape (count, length)")
    return found


def linear_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the linear layers of the decoder blocks, by name, in the file's dtype."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, a safe_open is no mapping
                if in_block(name) and len(tensors.get_slice(name).get_shape()) == 2:
                    found[name] = tensors.get_tensor(name)
    if not found:
        raise SystemExit(f"{folder}: no linear layers of decoder blocks in its *.safetensors")
    return dict(sorted(found.items()))


def in_block(name: str) -> bool:
    """Whether a tensor is a weight of a decoder block; norms are told apart by their shape."""
    return re.search(r"(^|\.)layers\.\d+\..*\.weight$", name) is not None


def write_dense(job: Job, out: Path) -> None:
    """The model's folder with the dequantized weights in the place of the original ones."""
    for name, weight in job.weights.items():
        if weight.shape != job.shapes[name] or not weight.isfinite().all():
            raise ValueError(
                f"{name}: the rival gave shape {tuple(weight.shape)} for {tuple(job.shapes[name])}"
                " or values that are not finite"
            )
    out.mkdir(parents=True, exist_ok=True)
    for file in job.model.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            dense = {name: job.weights.get(name, tensor) for name, tensor in tensors.items()}
            dense = {name: t.to(torch.bfloat16).contiguous() for name, t in dense.items()}
            save_file(dense, out / file.name, metadata={"format": "pt"})
        elif file.is_file():
            shutil.copyfile(file, out / file.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def record(job: Job) -> dict:
    """The contents of `rival.json`."""
    calibration = None
    if job.windows is not None:
        calibration = "{} windows of {} tokens".format(*job.windows.shape)
    values = (job.options.rival, job.version, job.settings, job.model.name, job.count, job.bytes,
              job.counted, 8 * job.bytes / job.count, round(job.reproduced(), 4),
              round(job.seconds, 1), calibration)  # fmt: skip
    return dict(zip(RECORD, values, strict=True))


def nbytes(tensors: Iterable) -> int:
    """Bytes of those of the values that are tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def flat(nested) -> list:
    """The leaves of nested dicts, lists and tuples."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        return [leaf for branch in nested for leaf in flat(branch)]
    return [nested]


def linear(weight: Tensor) -> nn.Linear:
    """The layer of one weight, without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def version(package: str) -> str:
    return importlib.metadata.version(package)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="rival", required=True)

    def command(run: Callable, *, bits: Sequence[int] = (), calibrated: bool = False):
        added = commands.add_parser(run.__name__)
        added.set_defaults(run=run)
        added.add_argument("--model", required=True, help="dense folder")
        added.add_argument("--out", required=True)
        if bits:
            added.add_argument("--bits", type=int, choices=bits, required=True)
            added.add_argument("--group", type=int, default=64)
        if calibrated:
            added.add_argument("--windows", required=True, help="file that `windows` wrote")
        return added

    made = command(windows)
    made.add_argument("--text", required=True, help="as WaterSICConfig(dataset=...)")
    made.add_argument("--samples", type=int, default=64)
    made.add_argument("--sequence-length", type=int, default=512)
    made.add_argument("--seed", type=int, default=0)
    command(hqq, bits=(1, 2, 3, 4, 8)).add_argument("--axis", type=int, choices=(0, 1), default=1)
    command(sinq, bits=(2, 3, 4, 8))
    made = command(bnb)
    made.add_argument("--type", choices=("nf4", "fp4"), default="nf4")
    made.add_argument("--double", action="store_true", help="quantize the scales too")
    command(quanto, bits=(2, 4))
    command(torchao, bits=(4,)).add_argument("--algorithm", default="tinygemm")
    made = command(llamacpp, calibrated=True)
    made.add_argument("--type", required=True, help="as llama-quantize names it: Q3_K_M, IQ2_XXS")
    made.add_argument("--pure", action="store_true", help="one type instead of the type's recipe")
    made.add_argument("--fold", action="store_true", help="join rows so that k- and i-quants fit")
    made.add_argument("--squares", help="file that keeps the importances of these windows")
    made.add_argument("--tools", help="folder of llama-quantize (the PATH)")
    made.add_argument("--release", default="unknown", help="of llama.cpp, for the record")
    made = command(gptq, bits=(2, 3, 4), calibrated=True)
    made.add_argument("--asymmetric", action="store_true")
    made.add_argument(
        "--mse", type=float, default=0.0, help="its search of the scales; 2.4 is usual"
    )
    made = command(autoround, bits=(2, 3, 4), calibrated=True)
    made.add_argument("--asymmetric", action="store_true")
    made.add_argument("--iters", type=int, default=200)
    made.add_argument("--lr", type=float, help="5e-3 in its light recipe")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--alg-ext", action="store_true", help="its recommendation for 2 bits")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict | None:
    options = parse(argv)
    if options.run is windows:
        return windows(options)
    out = Path(options.out)
    job = Job(options, linear_weights(Path(options.model)))
    if getattr(options, "windows", None):
        job.windows = read_windows(options.windows)
    try:
        options.run(job)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{options.rival}: the package `{error.name}` is not installed here; the docstring of "
            f"{Path(__file__).name} says which environment has it"
        ) from error
    write_dense(job, out)
    result = record(job)
    (out / "rival.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    json.dump(result, sys.stdout, indent=2)
    print()
    return result


if __name__ == "__main__":
    main()
