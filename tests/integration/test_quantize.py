import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from watersic_hf import CalibrationError, WaterSICConfig, WaterSICLinear
from watersic_hf.checkpoint import average_bits


def files_of(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_all_projections_are_quantized_and_nothing_else(quantize, packed_names, dataset):
    model = quantize(dataset=dataset)

    names = packed_names(model)

    assert len(names) == 2 * 7
    assert all(".layers." in name for name in names)
    assert type(model.lm_head) is nn.Linear
    assert model.is_quantized
    assert model.quantization_method == "watersic"


@pytest.mark.parametrize("dataset", [None, "pydoc"])
@pytest.mark.parametrize("bits", [3.0, 4.5, 6.0])
def test_stored_bits_match_target_bits(quantize, dataset, bits):
    model = quantize(dataset=dataset, bits=bits)

    layers = [m for m in model.modules() if isinstance(m, WaterSICLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    stored = sum(m.packed.stored_bits for m in layers) / weights

    assert stored == pytest.approx(bits, rel=0.01)
    assert average_bits(model.hf_quantizer.reports) == pytest.approx(stored)


def test_more_bits_are_closer_to_the_original(quantize, llama_folder, tokens):
    original = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        expected = original(tokens).logits
        errors = [
            float((quantize(bits=bits)(tokens).logits - expected).norm()) for bits in (3, 4, 6, 8)
        ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * float(expected.norm())


def test_calibration_lowers_the_error_of_the_layers_outputs(quantize, make_llama, tmp_path):
    # inputs of very unequal size: what calibration knows and data-free quantization does not
    dense = make_llama()
    with torch.no_grad():
        for block in dense.model.layers:
            block.input_layernorm.weight.copy_(torch.logspace(-1.5, 1, 64))
            block.post_attention_layernorm.weight.copy_(torch.logspace(1, -1.5, 64))
    dense.save_pretrained(tmp_path)
    g = torch.Generator().manual_seed(9)
    data = [torch.randint(0, 320, (64,), generator=g) for _ in range(24)]
    tokens = torch.randint(0, 320, (4, 64), generator=g)

    with torch.no_grad():
        expected = dense(tokens).logits
        errors = [
            float(
                (
                    quantize(tmp_path, dataset=d, bits=3.5, samples=24)(tokens).logits - expected
                ).norm()
            )
            for d in (None, data)
        ]

    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("dataset", [None, "pydoc", "self"])
def test_the_same_seed_gives_the_same_file_byte_for_byte(quantize, tmp_path, dataset):
    for name in ("a", "b"):
        quantize(dataset=dataset, seed=5).save_pretrained(tmp_path / name)

    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_another_seed_gives_another_file(quantize, tmp_path):
    for seed in (1, 2):
        quantize(seed=seed).save_pretrained(tmp_path / str(seed))

    assert files_of(tmp_path / "1") != files_of(tmp_path / "2")


def test_layer_bits_set_bits_by_pattern(quantize):
    model = quantize(bits=4.0, layer_bits={"down_proj": 6.0}, allocation="uniform")

    bits = {r.name: r.bits for r in model.hf_quantizer.reports}

    assert all(b == pytest.approx(6, abs=0.2) for n, b in bits.items() if "down_proj" in n)
    assert all(b == pytest.approx(4, abs=0.2) for n, b in bits.items() if "down_proj" not in n)


def test_layers_that_are_skipped_stay_dense(quantize, packed_names, tmp_path):
    model = quantize(modules_to_not_convert=["v_proj", r"layers\.1\.mlp"])
    model.save_pretrained(tmp_path)

    names = packed_names(model)

    assert len(names) == 14 - 2 - 3
    assert not any("v_proj" in name or "layers.1.mlp" in name for name in names)
    assert packed_names(AutoModelForCausalLM.from_pretrained(tmp_path)) == names


def test_the_users_configuration_is_not_changed(llama_folder):
    config = WaterSICConfig(bits=4)

    LlamaForCausalLM.from_pretrained(llama_folder, quantization_config=config)

    assert config.modules_to_not_convert is None
    assert config == WaterSICConfig(bits=4)


def test_model_with_all_layers_skipped_is_refused(quantize):
    with pytest.raises(ValueError, match="has no linear layer to quantize: 15 were found"):
        quantize(modules_to_not_convert=["layers"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_dense_layers_have_the_requested_dtype(quantize, tokens, dtype, dataset):
    model = quantize(dataset=dataset, load={"dtype": dtype})

    assert model.model.norm.weight.dtype == dtype
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == dtype
    assert layer.row_scale.dtype == torch.float16
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_biases_are_kept(make_llama, quantize, tmp_path, dataset):
    dense = make_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    dense.save_pretrained(tmp_path)

    model = quantize(tmp_path, dataset=dataset)

    for name, layer in model.named_modules():
        if isinstance(layer, WaterSICLinear):
            assert torch.equal(layer.bias, dense.get_submodule(name).bias), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_the_head_stays_dense_tied_or_not(make_llama, quantize, tmp_path, tied, dataset):
    make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)

    model = quantize(tmp_path, dataset=dataset)

    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "load", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}]
)
@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_a_device_map_changes_nothing_on_one_device(quantize, tokens, load, dataset):
    with torch.no_grad():
        plain = quantize(dataset=dataset)(tokens).logits
        mapped = quantize(dataset=dataset, load=load)(tokens).logits

    assert torch.equal(plain, mapped)


def test_quantizing_into_a_disk_offload_is_refused(quantize, tmp_path):
    where = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }

    with pytest.raises(ValueError, match="cannot quantize a model while it is offloaded to disk"):
        quantize(dataset=None, load={"device_map": where, "offload_folder": str(tmp_path)})


@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_a_weight_that_is_not_finite_stops_with_the_layers_name(
    make_llama, quantize, tmp_path, dataset
):
    dense = make_llama()
    with torch.no_grad():
        dense.model.layers[0].mlp.gate_proj.weight[3, 4] = float("inf")
    dense.save_pretrained(tmp_path)

    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.mlp\.gate_proj: 1 of 10240 entries of weight"
    ):
        quantize(tmp_path, dataset=dataset)


def test_activations_that_are_not_finite_stop_with_the_layers_name(make_llama, quantize, tmp_path):
    dense = make_llama()
    with torch.no_grad():
        dense.model.layers[1].post_attention_layernorm.weight[5] = float("nan")
    dense.save_pretrained(tmp_path)

    with pytest.raises(CalibrationError, match=r"^model\.layers\.1\.mlp\.gate_proj: "):
        quantize(tmp_path)


def test_dead_feature_and_zero_layer_are_quantized(make_llama, quantize, tmp_path, tokens):
    dense = make_llama()
    with torch.no_grad():
        dense.model.layers[0].input_layernorm.weight[7] = 0
        dense.model.layers[0].mlp.up_proj.weight[:90].zero_()
        dense.model.layers[1].self_attn.k_proj.weight.zero_()
        dense.model.layers[1].mlp.down_proj.weight[:, 3] = 0
    dense.save_pretrained(tmp_path)

    model = quantize(tmp_path)

    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()
    zero = model.model.layers[1].self_attn.k_proj.dequantize().weight
    assert zero.count_nonzero() == 0


def test_calibration_with_one_row_of_two_tokens_completes(quantize, tokens):
    model = quantize(dataset=[[5, 6]])

    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()


def test_reports_name_every_layer(quantize, packed_names):
    model = quantize()

    reports = model.hf_quantizer.reports

    assert sorted(r.name for r in reports) == sorted(packed_names(model))
    # a layer that makes up for others may leave its own output further off than zeros would
    assert all(r.tokens == 4 * 64 and r.error > 0 for r in reports)


def test_a_dictionary_serves_as_configuration(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config={"quant_method": "watersic", "bits": 4}
    )

    assert model.config.quantization_config.bits == 4


def test_registering_twice_changes_nothing():
    from transformers.quantizers import auto

    import watersic_hf

    def registered():
        return (
            dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
            dict(auto.AUTO_QUANTIZER_MAPPING),
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
        )

    # the import has registered the plugin already
    before = registered()
    watersic_hf.register()
    watersic_hf.register()

    assert registered() == before
    assert before[0]["watersic"] is WaterSICConfig
    assert before[2].count(WaterSICConfig) == 1


@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_rows_named_by_hand_are_zero_and_what_they_feed_is_dead(quantize, dataset):
    rows = [3, 70]

    model = quantize(dataset=dataset, zero_rows={r"layers\.0\.mlp\.(gate|up)_proj": rows})

    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        weight = layer.dequantize().weight
        assert torch.equal((weight == 0).all(1).nonzero()[:, 0], torch.tensor(rows))
    if dataset is not None:
        assert bool((mlp.down_proj.dequantize().weight[:, rows] == 0).all())


@pytest.mark.parametrize("dataset", [None, "pydoc"])
def test_rows_that_a_layer_does_not_have_are_refused(quantize, dataset):
    with pytest.raises(ValueError, match=r"up_proj has rows 0 to 159, and \[160\] are to be"):
        quantize(dataset=dataset, zero_rows={r"layers\.0\.mlp\.up_proj": [160]})


def test_massive_channels_are_found_and_written_into_the_configuration(
    make_llama, quantize, tmp_path
):
    dense = make_llama()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            dense.get_submodule(f"model.layers.1.mlp.{name}").weight[7] *= 300
    dense.save_pretrained(tmp_path)

    model = quantize(tmp_path, zero_rows="auto")

    assert model.config.quantization_config.zero_rows == {
        rf"model\.layers\.1\.mlp\.{name}_proj": [7] for name in ("gate", "up")
    }
    assert bool((model.model.layers[1].mlp.up_proj.dequantize().weight[7] == 0).all())


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "uniform"},
        {"row_importance": False},
        {"drift": 0.0, "residual": False},
        {"drift": 1.0},
        {"residual": False},
        {"attention": 0.7},
        {"mixing": True},
        {"rescale": False},
        {"damping": 1e-2},
    ],
    ids=str,
)
def test_every_setting_changes_the_file_but_not_the_bits(quantize, changes):
    ordinary, changed = quantize(bits=3.0), quantize(bits=3.0, **changes)

    for model in (ordinary, changed):
        assert average_bits(model.hf_quantizer.reports) == pytest.approx(3.0, rel=0.01)
    assert any(
        not torch.equal(a.weight, b.weight)
        for a, b in zip(ordinary.modules(), changed.modules(), strict=True)
        if isinstance(a, WaterSICLinear)
    )


def test_layer_bits_are_not_reallocated(quantize):
    model = quantize(bits=4.0, layer_bits={"down_proj": 6.0}, allocation="sensitivity")

    bits = {r.name: r.bits for r in model.hf_quantizer.reports}

    assert all(b == pytest.approx(6, abs=0.2) for n, b in bits.items() if "down_proj" in n)
    others = [b for n, b in bits.items() if "down_proj" not in n]
    assert max(others) - min(others) > 0.2
