import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

from watersic_hf import WaterSICConfig, WaterSICRuntime
from watersic_hf.nn import packed_layers
from watersic_hf.testing import assert_close

SIZES = {
    "vocab_size": 320,
    "hidden_size": 72,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def quantized(kind, folder, **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**SIZES)).save_pretrained(folder)
    config = WaterSICConfig(bits=3.0, runtime=WaterSICRuntime(residency="dense"))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, GemmaConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_residencies_give_the_logits_of_the_dense_weights(kind, dtype, tmp_path, tokens):
    model = quantized(kind, tmp_path, dtype=dtype)
    with torch.no_grad():
        expected = model(tokens).logits

        for residency in ("packed", "entropy", "stored"):
            model.set_residency(residency)
            assert {layer.residency for _, layer in packed_layers(model)} == {residency}
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            assert_close(model(tokens).logits, expected, tolerance=tolerance)


@pytest.mark.parametrize("residency", ["packed", "entropy"])
def test_generation_with_a_static_cache_has_no_graph_breaks(residency, tmp_path, tokens):
    model = quantized(LlamaConfig, tmp_path)
    model.set_residency(residency)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, disable_compile=True, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")

    found = model.generate(tokens, disable_compile=True, **options)

    assert torch.equal(found, expected)


def test_a_copied_and_a_pickled_model_set_their_own_residency(tmp_path):
    model = quantized(LlamaConfig, tmp_path)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_residency("stored")
        assert {layer.residency for _, layer in packed_layers(other)} == {"stored"}
    assert {layer.residency for _, layer in packed_layers(model)} == {"dense"}
    assert not hasattr(model.dequantize(), "set_residency")
