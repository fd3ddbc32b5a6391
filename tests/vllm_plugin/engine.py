"""Start engines of vLLM, two at a time, each in a process of its own, and write what they say.

Run as a script: ``engine.py CASES RESULTS``, two JSON files.  vLLM keeps state that a second engine
in one process trips over, and its import takes long; so each engine is a fork of this process,
which has imported what an engine would.
"""

import importlib
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

#: What an engine imports, most of it when it starts.
IMPORTS = (
    "torch._inductor.standalone_compile",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "watersic_hf.vllm_plugin.config",
)


def run(case: dict) -> dict:
    """Return the greedy tokens of an engine and their log-probabilities, or its error."""
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True}
    try:
        engine = LLM(model=case["model"], **options | case.get("options", {}))
        if case.get("call") == "reload":
            engine.collective_rpc("reload_weights")
        settings = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
        extra = {}
        if case.get("lora"):
            from vllm.lora.request import LoRARequest

            extra["lora_request"] = LoRARequest("adapter", 1, case["lora"])
        prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
        outputs = engine.generate(prompts, settings, use_tqdm=False, **extra)
    except BaseException:
        return {"error": traceback.format_exc()}
    found = []
    for output in outputs:
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        log_probabilities = [
            completion.logprobs[i][token].logprob for i, token in enumerate(tokens)
        ]
        found.append({"tokens": tokens, "log_probabilities": log_probabilities})
    return {"outputs": found}


def start(case: dict, core: int, part: Path) -> int:
    """Fork a process that runs a case on a core; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": str(core)} | case.get("environment", {})
        if case.get("options", {}).get("enforce_eager", True):
            # a function of vLLM's sampler is compiled even so
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
            torch._dynamo.config.disable = True
        # what its workers write, too
        log = Path(f"{part}.log")
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        found = run(case)
        if "error" in found:
            found["error"] += log.read_text()
        part.write_text(json.dumps(found))
    finally:
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    """Run all cases, one for each core at a time."""
    for module in IMPORTS:
        importlib.import_module(module)
    # on a CPU, vLLM would spawn the ranks, which import everything anew
    executor = importlib.import_module("vllm.v1.executor.multiproc_executor")
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    cases = json.loads(Path(sys.argv[1]).read_text())
    parts = {name: Path(f"{sys.argv[2]}.{name}") for name in cases}
    cores = sorted(os.sched_getaffinity(0))[:2]
    running = {}
    for name, case in cases.items():
        if len(running) == len(cores):
            del running[os.wait()[0]]
        core = next(core for core in cores if core not in running.values())
        running[start(case, core, parts[name])] = core
    for child in running:
        os.waitpid(child, 0)
    results = {name: json.loads(part.read_text()) for name, part in parts.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
