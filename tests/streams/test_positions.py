import pytest
import torch
import transformers

from watersic_hf.streams import position_limit

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "ffn_dim": 32,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "n_layers": 1,
    "n_heads": 2,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "emb_dim": 32,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "d_kv": 16,
    "max_position_embeddings": 20,
}

#: Model and configuration by the first part of their names, what the configuration says, limit.
MODELS = [
    ("Bert", "ForMaskedLM", {}, 20),
    ("Roberta", "ForMaskedLM", {}, 18),
    ("XLMRoberta", "ForMaskedLM", {}, 18),
    ("MPNet", "ForMaskedLM", {}, 18),
    ("Longformer", "ForMaskedLM", {"attention_window": [4]}, 18),
    ("Esm", "ForMaskedLM", {"mask_token_id": 3, "position_embedding_type": "absolute"}, 18),
    ("GPT2", "LMHeadModel", {}, 20),
    ("OpenAIGPT", "LMHeadModel", {}, 20),
    ("OPT", "ForCausalLM", {}, 20),
    ("Bart", "ForConditionalGeneration", {}, 20),
    (
        "LED",
        "Model",
        {
            "max_encoder_position_embeddings": 32,
            "attention_window": 4,
            "max_decoder_position_embeddings": 16,
        },
        16,
    ),
    ("Mpt", "ForCausalLM", {"max_seq_len": 16}, 16),
    ("Whisper", "ForCausalLM", {"max_target_positions": 16}, 16),
    ("Llama", "ForCausalLM", {}, 20),
    ("T5", "ForConditionalGeneration", {}, None),
]


@pytest.mark.parametrize(("kind", "head", "sizes", "limit"), MODELS, ids=[m[0] for m in MODELS])
@torch.no_grad()
def test_model_reads_as_many_tokens_as_its_limit_says(kind, head, sizes, limit):
    known = getattr(transformers, f"{kind}Config")
    names = SIZES.keys() - ({"max_position_embeddings"} if limit != 20 and limit != 18 else set())
    model = getattr(transformers, f"{kind}{head}")(known(**{n: SIZES[n] for n in names} | sizes))

    assert position_limit(model.eval()) == limit
    tokens = torch.randint(3, 50, (1, limit or 100))
    inputs = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    model(input_ids=tokens, **inputs)


def test_positions_of_images_are_no_limit():
    text = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    vision = text | {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**text, max_position_embeddings=64),
                vision_config=transformers.CLIPVisionConfig(**vision),
            )
        )

    assert "position_embedding" in " ".join(name for name, _ in model.named_modules())
    assert position_limit(model) == 64
