"""Quantized embeddings and heads, tied and not."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from watersic_hf import WaterSICConfig
from watersic_hf.checkpoint import inspect_checkpoint, model_size
from watersic_hf.nn import WaterSICEmbedding, WaterSICLinear, WaterSICTiedHead, packed_layers


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def dense_folder(make_llama, tmp_path, tied):
    make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def load(tmp_path):
    """Save a model and load it in some residency."""

    def run(model, residency="dense", **options):
        model.save_pretrained(tmp_path / "packed")
        config = WaterSICConfig(runtime={"residency": residency})
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", quantization_config=config, **options
        )

    return run


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_vocabulary_quantize_save_reload_generate_dequantize(
    quantize, dense_folder, tmp_path, tokens, load, tied, dataset
):
    model = quantize(
        dense_folder, dataset=dataset, quantize_embeddings=True, quantize_head=not tied
    )
    expected = logits(model, tokens)

    again, info = load(model, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again, tokens), expected)
    assert isinstance(again.get_input_embeddings(), WaterSICEmbedding)
    assert type(again.lm_head) is (WaterSICTiedHead if tied else WaterSICLinear)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    stored = (tmp_path / "packed" / "model.safetensors").read_bytes()
    assert (b"lm_head.weight" in stored) != tied
    generated = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (model, again)]
    assert torch.equal(*generated)
    torch.compiler.reset()
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, tokens), expected)

    for residency in ("packed", "entropy", "stored"):
        small = load(again, residency)
        assert {layer.residency for _, layer in packed_layers(small)} == {residency}
        torch.testing.assert_close(logits(small, tokens), expected)
        small.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == stored
        assert small.dtype == torch.float32
        assert small.to(torch.bfloat16).dtype == torch.bfloat16
        assert logits(copy.deepcopy(small), tokens).dtype == torch.bfloat16

    again.dequantize()
    torch.testing.assert_close(logits(again, tokens), expected)
    assert type(again.get_input_embeddings()) is nn.Embedding
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def test_vocabulary_matrices_have_their_own_bits(quantize, dense_folder, tmp_path, tied):
    model = quantize(dense_folder, bits=3.0, quantize_embeddings=5.0, quantize_head=5.0)
    model.save_pretrained(tmp_path / "packed")
    found = inspect_checkpoint(tmp_path / "packed")
    size = model_size(tmp_path / "packed")
    original = model_size(dense_folder)

    totals = found["totals"]
    assert totals["bits"] == pytest.approx(3.0, abs=0.05)
    assert totals["table_bits"] == pytest.approx(5.0, rel=0.02)
    assert (totals["layers"], totals["tables"]) == (14, 1 if tied else 2)
    assert size.parameters == original.parameters == totals["model_parameters"]
    assert totals["model_bits"] == pytest.approx(8 * size.nbytes / original.parameters)
    assert found["dense"] == []
    assert [r.bits for r in model.hf_quantizer.reports if r.table] == [
        row["bits"]
        for row in sorted(found["layers"], key=lambda r: r["name"] == "lm_head")
        if row["table"]
    ]


@pytest.mark.parametrize("tied", [False], indirect=True)
def test_untied_head_alone_is_quantized_or_skipped(quantize, dense_folder, tokens, load):
    model = quantize(dense_folder, quantize_head=6.0)

    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.config.quantization_config.left_dense == {"model.embed_tokens": "embedding"}
    assert torch.equal(logits(load(model), tokens), logits(model, tokens))

    model = quantize(dense_folder, quantize_head=True, modules_to_not_convert=["lm_head"])

    assert type(model.lm_head) is nn.Linear
    dense = model.config.quantization_config.left_dense
    assert dense["lm_head"] == "named in modules_to_not_convert"


def test_tied_matrix_with_two_bit_settings_is_refused(quantize, llama_folder):
    with pytest.raises(ValueError, match="are one matrix, but 4 bits are asked for the embedding"):
        quantize(llama_folder, quantize_embeddings=True, quantize_head=5.0)


def test_unquantizable_embedding_is_logged_with_its_reason(tmp_path, tokens, watersic_log):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)

    model = BertForMaskedLM.from_pretrained(
        tmp_path, quantization_config=WaterSICConfig(6.0, quantize_embeddings=True)
    )

    dense = model.config.quantization_config.left_dense
    assert dense["bert.embeddings.word_embeddings"] == "tied to a head with a bias"
    assert "was to be quantized, but stays dense" in watersic_log.text


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_scaled_embedding_keeps_its_scale(tmp_path, tokens, load):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=60,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    dense = Gemma3ForCausalLM(config).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")

    model = Gemma3ForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=WaterSICConfig(8.0, quantize_embeddings=8.0)
    )
    table = model.get_input_embeddings()
    rows, small = table(tokens), load(model, "packed").get_input_embeddings()(tokens)
    kind = type(dense.get_input_embeddings())

    # rounded to bfloat16, as the model does
    assert float(rows.norm() / table.dense_weight[tokens].norm()) == pytest.approx(
        60**0.5, rel=1e-2
    )
    assert torch.equal(small, rows)
    model.dequantize()
    assert type(model.get_input_embeddings()) is kind
    assert torch.equal(model.get_input_embeddings()(tokens), rows)


def test_headless_model_loads_and_saves_quantized_embedding(
    quantize, llama_folder, tmp_path, tokens
):
    full = quantize(llama_folder, dataset=None, quantize_embeddings=True)
    full.save_pretrained(tmp_path / "full")

    body = AutoModel.from_pretrained(tmp_path / "full")
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")

    assert isinstance(body.embed_tokens, WaterSICEmbedding)
    assert torch.equal(logits(again, tokens), logits(full, tokens))


def test_quantized_embedding_can_be_offloaded(quantize, llama_folder, tmp_path, tokens):
    model = quantize(llama_folder, dataset=None, quantize_embeddings=True)
    model.save_pretrained(tmp_path / "packed")
    where = {
        "model.embed_tokens": "disk",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }

    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=where, offload_folder=tmp_path / "offload"
    )

    assert again.get_input_embeddings().weight.device.type == "meta"
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens))


def test_adapters_train_on_vocabulary_and_merge_once_dequantized(quantize, llama_folder, tokens):
    peft = pytest.importorskip("peft")
    base = quantize(llama_folder, dataset=None, quantize_embeddings=True)
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    )
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval(), tokens)

    with pytest.raises(ValueError, match=r"cannot be merged .*get_base_model\(\).dequantize\(\)"):
        model.merge_and_unload()
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()

    # the head was tied to the table without its adapter
    assert not any(True for _ in packed_layers(merged))
    assert merged.model.layers[0].self_attn.q_proj.weight.shape == (64, 64)
    assert logits(merged, tokens).shape == expected.shape


def test_vision_language_model_quantizes_text_and_keeps_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    from watersic_hf.integration import quantize_to_folder

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = Gemma3Config(
        text_config=sizes | {"vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8},
        vision_config=sizes | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")

    settings = WaterSICConfig(6.0, quantize_embeddings=True)
    quantize_to_folder(str(tmp_path / "dense"), tmp_path / "packed", settings)
    found = inspect_checkpoint(tmp_path / "packed")

    assert (found["totals"]["layers"], found["totals"]["tables"]) == (7, 1)
    reasons = {row["name"]: row["reason"] for row in found["dense"]}
    assert len(reasons) > 8
    assert set(reasons.values()) == {"beside the language model, where text does not run"}
    assert AutoTokenizer.from_pretrained(tmp_path / "packed")("x")["input_ids"]
