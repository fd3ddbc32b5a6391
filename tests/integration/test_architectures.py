"""Every architecture of ARCHITECTURES.md: one tiny random model through everything a user does.

``PYTHONPATH=.:kernels python tests/integration/test_architectures.py`` prints its table.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from watersic_hf import CalibrationError, WaterSICConfig
from watersic_hf.nn import packed_layers

ROOT = Path(__file__).parents[2]

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LATENT = {
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {"d_model": 32, "decoder_start_token_id": 0} | {
    f"{part}_{size}": value
    for part in ("encoder", "decoder")
    for size, value in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))
}
TEXT = SIZES | GROUPED
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA3 = {
    "text_config": TEXT | {"sliding_window": 8},
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
}
QWEN_VISION = {
    "hidden_size": 32,
    "out_hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "intermediate_size": 64,
    "patch_size": 4,
}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN2_VL = {
    "text_config": TEXT | {"rope_parameters": ROTARY},
    "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
}
QWEN3_VL = {
    "text_config": TEXT | {"rope_parameters": ROTARY | {"mrope_interleaved": True}},
    "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}


@dataclass(frozen=True)
class Row:
    """One architecture."""

    name: str
    model: str
    """Name of the class, and of the model type before it."""
    layers: int
    """Layers that are quantized in two blocks, with calibration."""
    changes: dict = field(default_factory=dict)
    """What differs from SIZES."""
    outside: int = 0
    """Layers that text does not reach block by block: quantized without data only."""
    note: str = ""
    """What is particular, for the reader."""
    calibrated: bool = True
    """Whether it can be calibrated on text."""

    @property
    def line(self) -> str:
        """Its line in ARCHITECTURES.md."""
        calibrated = "yes" if self.calibrated else "no"
        return f"| {self.name} | `{self.model.partition(' ')[2]}` | {calibrated} | {self.note} |"


NORM = "a norm follows every layer that writes to the residual stream: drift correction only"
PARALLEL = "attention and MLP in parallel"
HEAD = "the dense layer of the head is not calibrated and stays dense"
EXPERTS = "each expert calibrated on its own tokens; drift correction only"
T5_NOTE = "`wo` stays dense: transformers keeps it in float32 and reads its dtype"

ROWS = [
    Row("Llama", "llama LlamaForCausalLM", 14, GROUPED),
    Row("Mistral", "mistral MistralForCausalLM", 14, GROUPED | {"sliding_window": 8}),
    Row("Qwen2, Qwen2.5", "qwen2 Qwen2ForCausalLM", 14, {"num_key_value_heads": 2}),
    Row("Qwen3", "qwen3 Qwen3ForCausalLM", 14, GROUPED),
    Row("Gemma", "gemma GemmaForCausalLM", 14, GROUPED),
    Row(
        "Gemma 2",
        "gemma2 Gemma2ForCausalLM",
        14,
        GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        note=NORM,
    ),
    Row(
        "Gemma 3 (text)",
        "gemma3_text Gemma3ForCausalLM",
        14,
        GROUPED | {"sliding_window": 8},
        note=NORM,
    ),
    Row("Phi-1, Phi-2", "phi PhiForCausalLM", 12, note=PARALLEL),
    Row("Phi-3, Phi-4", "phi3 Phi3ForCausalLM", 8, {"num_key_value_heads": 2}),
    Row("GPT-2", "gpt2 GPT2LMHeadModel", 8, GPT, note="`Conv1D`"),
    Row("GPT", "openai-gpt OpenAIGPTLMHeadModel", 8, GPT, note="`Conv1D`"),
    Row(
        "GPT-Neo",
        "gpt_neo GPTNeoForCausalLM",
        12,
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    Row("GPT-NeoX, Pythia", "gpt_neox GPTNeoXForCausalLM", 8, note=PARALLEL),
    Row("GPT-J", "gptj GPTJForCausalLM", 12, GPT | {"rotary_dim": 4}, note=PARALLEL),
    Row("CodeGen", "codegen CodeGenForCausalLM", 8, GPT | {"rotary_dim": 4}, note=PARALLEL),
    Row("StarCoder", "gpt_bigcode GPTBigCodeForCausalLM", 8, GPT | {"n_inner": 64}),
    Row("StarCoder2", "starcoder2 Starcoder2ForCausalLM", 12, {"num_key_value_heads": 2}),
    Row("OPT", "opt OPTForCausalLM", 12, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Row(
        "XGLM",
        "xglm XGLMForCausalLM",
        12,
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    ),
    Row("BLOOM", "bloom BloomForCausalLM", 8, {"n_layer": 2, "n_head": 4}),
    Row(
        "MPT",
        "mpt MptForCausalLM",
        8,
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    Row(
        "Falcon",
        "falcon FalconForCausalLM",
        8,
        {"num_kv_heads": 2, "new_decoder_architecture": True},
        note=PARALLEL,
    ),
    Row("Persimmon", "persimmon PersimmonForCausalLM", 8),
    Row("StableLM", "stablelm StableLmForCausalLM", 14, {"num_key_value_heads": 2}),
    Row("OLMo", "olmo OlmoForCausalLM", 14),
    Row("OLMo 2", "olmo2 Olmo2ForCausalLM", 14, {"num_key_value_heads": 2}, note=NORM),
    Row("SmolLM3", "smollm3 SmolLM3ForCausalLM", 14, {"num_key_value_heads": 2}),
    Row("GLM", "glm GlmForCausalLM", 12, GROUPED),
    Row("GLM-4", "glm4 Glm4ForCausalLM", 12, GROUPED, note=NORM),
    Row(
        "Granite",
        "granite GraniteForCausalLM",
        14,
        {"num_key_value_heads": 2, "residual_multiplier": 0.2},
        note="scaled residual additions: drift correction only",
    ),
    Row("Cohere", "cohere CohereForCausalLM", 14, {"num_key_value_heads": 2}, note=PARALLEL),
    Row(
        "Cohere 2", "cohere2 Cohere2ForCausalLM", 14, GROUPED | {"sliding_window": 8}, note=PARALLEL
    ),
    Row("Helium", "helium HeliumForCausalLM", 14, GROUPED),
    Row("Nemotron", "nemotron NemotronForCausalLM", 12, GROUPED),
    Row("EXAONE 4", "exaone4 Exaone4ForCausalLM", 14, GROUPED, note=NORM),
    Row("Mixtral", "mixtral MixtralForCausalLM", 24, GROUPED | MIXTURE, note=EXPERTS),
    Row("Qwen2-MoE", "qwen2_moe Qwen2MoeForCausalLM", 30, GROUPED | MIXTURE, note=EXPERTS),
    Row("Qwen3-MoE", "qwen3_moe Qwen3MoeForCausalLM", 24, GROUPED | MIXTURE, note=EXPERTS),
    Row("OLMoE", "olmoe OlmoeForCausalLM", 24, MIXTURE, note=EXPERTS),
    Row(
        "gpt-oss",
        "gpt_oss GptOssForCausalLM",
        24,
        GROUPED | MIXTURE | {"sliding_window": 8},
        note=EXPERTS,
    ),
    Row("DeepSeek-V2", "deepseek_v2 DeepseekV2ForCausalLM", 24, LATENT | MIXTURE, note=EXPERTS),
    Row("DeepSeek-V3", "deepseek_v3 DeepseekV3ForCausalLM", 24, LATENT | MIXTURE, note=EXPERTS),
    Row(
        "GLM-4.5",
        "glm4_moe Glm4MoeForCausalLM",
        22,
        GROUPED | MIXTURE | {"first_k_dense_replace": 1},
        note=EXPERTS,
    ),
    Row("Phi-3.5-MoE", "phimoe PhimoeForCausalLM", 24, GROUPED | MIXTURE, note=EXPERTS),
    Row("Granite MoE", "granitemoe GraniteMoeForCausalLM", 24, GROUPED | MIXTURE, note=EXPERTS),
    Row(
        "Gemma 3",
        "gemma3 Gemma3ForConditionalGeneration",
        14,
        GEMMA3,
        note=f"language model only; {NORM}",
    ),
    Row(
        "Qwen2.5-VL",
        "qwen2_5_vl Qwen2_5_VLForConditionalGeneration",
        14,
        QWEN2_VL,
        note="language model only",
    ),
    Row(
        "Qwen3-VL",
        "qwen3_vl Qwen3VLForConditionalGeneration",
        14,
        QWEN3_VL,
        note="language model only",
    ),
    Row("BERT", "bert BertForMaskedLM", 12, outside=1, note=HEAD),
    Row("RoBERTa", "roberta RobertaForMaskedLM", 12, outside=1, note=HEAD),
    Row(
        "DistilBERT",
        "distilbert DistilBertForMaskedLM",
        12,
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        outside=1,
        note=HEAD,
    ),
    Row(
        "ModernBERT",
        "modernbert ModernBertForMaskedLM",
        8,
        {"local_attention": 8},
        outside=1,
        note=HEAD,
    ),
    Row(
        "ALBERT",
        "albert AlbertForMaskedLM",
        6,
        {"embedding_size": 32},
        outside=2,
        calibrated=False,
        note="one block is applied repeatedly: data-free only",
    ),
    Row("T5", "t5 T5ForConditionalGeneration", 28, T5, note=T5_NOTE),
    Row("mT5", "mt5 MT5ForConditionalGeneration", 32, T5, note=T5_NOTE),
    Row("BART", "bart BartForConditionalGeneration", 32, BART),
    Row("Marian", "marian MarianMTModel", 32, BART),
    Row(
        "Whisper",
        "whisper WhisperForConditionalGeneration",
        32,
        WHISPER,
        calibrated=False,
        note="reads audio, not text: data-free only",
    ),
    Row(
        "Whisper's decoder alone",
        "whisper WhisperForCausalLM",
        12,
        WHISPER,
        outside=8,
        note="cross attention stays dense: text does not reach it",
    ),
]


@pytest.fixture
def tokens():
    return torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(3))


def build(row):
    kind, _, name = row.model.partition(" ")
    sizes = {} if "text_config" in row.changes else SIZES
    config = AutoConfig.for_model(kind, **sizes | row.changes)
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def inputs(model, tokens):
    found = {"input_ids": tokens[:2]}
    if model.main_input_name == "input_features":
        g = torch.Generator().manual_seed(4)
        found = {"input_features": torch.randn(2, 8, 32, generator=g)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = tokens[2:, :9]
    return found


@torch.no_grad()
def logits(model, tokens):
    return model(**inputs(model, tokens)).logits


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model.replace(" ", "-"))
def test_quantize_save_reload_generate(tmp_path, tokens, watersic_log, row):
    dense = build(row)
    dense.save_pretrained(tmp_path / "dense")
    expected = logits(dense, tokens)

    load = type(dense).from_pretrained
    free = load(tmp_path / "dense", quantization_config=WaterSICConfig(7.0))
    assert len(list(packed_layers(free))) == row.layers + row.outside
    # 7 bits, with the scales and the tables of 32 x 32 layers, leave about 4 for the codes
    assert (logits(free, tokens) - expected).norm() < 0.25 * expected.norm()

    config = WaterSICConfig(7.0, dataset=tokens)
    if row.calibrated:
        model = load(tmp_path / "dense", quantization_config=config)
        assert len(list(packed_layers(model))) == row.layers
        noted = "the error of the residual stream is not compensated for" in watersic_log.text
        assert noted == ("drift" in row.note)
        assert (logits(model, tokens) - expected).norm() < 0.25 * expected.norm()
    else:
        with pytest.raises(CalibrationError, match="Quantize it without `dataset`"):
            load(tmp_path / "dense", quantization_config=config)
        model = free

    model.save_pretrained(tmp_path / "packed")
    again, info = load(tmp_path / "packed", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = logits(again, tokens)
    assert torch.equal(found, logits(model, tokens))
    if again.can_generate():
        prompt = {k: v for k, v in inputs(again, tokens).items() if k != "decoder_input_ids"}
        generated = [
            m.generate(**prompt, max_new_tokens=3, do_sample=False) for m in (model, again)
        ]
        assert torch.equal(*generated)

    torch.compiler.reset()
    # every layer is one node of the graph, which the backend does not look into
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, tokens), found)

    trains_an_adapter(again, tokens)

    undone = load(tmp_path / "packed")
    undone.dequantize()
    torch.testing.assert_close(logits(undone, tokens), found)
    kinds = {name: type(module) for name, module in dense.named_modules()}
    assert {name: type(module) for name, module in undone.named_modules()} == kinds


def trains_an_adapter(model, tokens):
    peft = pytest.importorskip("peft")
    # the matrices of experts are no layers of their own
    names = [name for name, layer in packed_layers(model) if isinstance(layer, nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    adapted(**inputs(model, tokens)).logits.square().mean().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    # PEFT itself leaves out what it takes for experts, the MLP of DeepSeek's dense layers too
    assert len(grads) >= len(names)
    assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())
    assert any(bool(g.any()) for g in grads.values())


def test_no_pattern_for_the_weights_of_experts_matches_the_names_of_their_matrices():
    rules = [
        rule
        for kind in transformers.CONFIG_MAPPING
        for rule in get_checkpoint_conversion_mapping(kind) or ()
        if isinstance(rule, WeightConverter)
    ]
    names = [
        f"model.layers.1.{home}.experts.packed.3.{matrix}.{tensor}"
        for home in ("mlp", "block_sparse_moe", "mixer", "feed_forward", "moe")
        for matrix in ("gate_up", "up", "down")
        for tensor in ("weight", "row_scale", "col_scale")
    ]

    patterns = {p for r in rules for p in (*r.source_patterns, *r.target_patterns)}
    assert len(patterns) > 50
    for pattern in patterns:
        expression = re.compile(pattern.replace("*", ".*"))
        assert not any(expression.search(name) for name in names), pattern


def table():
    head = "| architecture | class | calibrated | note |\n|---|---|---|---|"
    return "\n".join([head, *(row.line for row in ROWS)])


def test_architectures_md_lists_the_tested_models():
    text = (ROOT / "watersic_hf/integration/ARCHITECTURES.md").read_text(encoding="utf-8")

    assert f"\n{table()}\n" in text


@pytest.mark.parametrize("document", ["README.md", "watersic_hf/integration/README.md"])
def test_documents_give_the_number_of_tested_architectures(document):
    text = (ROOT / document).read_text(encoding="utf-8")

    assert set(re.findall(r"(\d+) (?:tested )?architectures", text)) == {str(len(ROWS))}


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
