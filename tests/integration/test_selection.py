"""What is quantized of a model and what stays dense: patterns, sizes, routers, used weights."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from watersic_hf import CheckpointError, WaterSICConfig
from watersic_hf.checkpoint import pack_layer
from watersic_hf.integration.examination import weights_used_elsewhere
from watersic_hf.integration.experts import expert_counts, routing_layers
from watersic_hf.integration.linear_layers import fixed_bits, is_too_small
from watersic_hf.integration.reasons import NEW, SMALL, USED
from watersic_hf.integration.selection import Selection
from watersic_hf.nn import packed_layers
from watersic_hf.streams import block_stacks

BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA = BERT | {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}


def empty_model(model_class, model_config):
    with torch.device("meta"):
        return model_class._from_config(model_config)


def select(model_class, model_config, **settings):
    config = WaterSICConfig(4.0, **settings)
    selection = Selection.of(empty_model(model_class, model_config), config)
    selection.check(config)
    return selection


def select_llama(**settings):
    return select(LlamaForCausalLM, LlamaConfig(**LLAMA), **settings)


def dense_for(selection, reason):
    """Names of the dense modules with a reason, with ``*`` for numbers."""
    quantized = [*selection.shapes, *selection.experts]
    return {name for name, why in selection.left_dense(quantized).items() if why == reason}


@pytest.fixture
def tokens():
    return torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(3))


# -- patterns ---------------------------------------------------------------------------------


def test_a_string_is_one_pattern():
    selection = select_llama(modules_to_not_convert="down_proj")

    assert len(selection.shapes) == 12
    assert dense_for(selection, "named in modules_to_not_convert") == {
        "model.layers.*.mlp.down_proj"
    }


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("modules_to_not_convert", ["dwon_proj"], r"'dwon_proj' selects nothing; near .*down_proj"),
        ("modules_to_not_convert", "q_proj,k_proj", "selects nothing"),
        ("modules_to_not_convert", ["Linear"], "names of layers end with|near names"),
        ("modules_to_not_convert", ["re:.*down_proj"], r"write '\.\*down_proj', without `re:`"),
        ("layer_bits", {"mlp.dwon_proj": 5}, r"near names: mlp\.down_proj"),
        ("layer_bits", {"lm_head": 8}, r"stays dense: lm_head \(output head\)"),
        ("layer_bits", {"norm": 8}, "is no layer that can be quantized"),
        ("layer_bits", {"mlp": 3, "down_proj": 5}, "an earlier pattern, 'mlp', counts for"),
        ("zero_rows", {"layers.7": [0]}, "zero_rows: the pattern .* selects nothing"),
    ],
)
def test_a_pattern_without_effect_is_an_error_that_says_why(setting, value, message):
    with pytest.raises(ValueError, match=message):
        select_llama(**{setting: value})


@pytest.mark.parametrize("pattern", ["norm", "model.layers.0", r"layers\.\d+\.mlp", "lm_head"])
def test_any_module_can_be_named_to_stay_dense(pattern):
    select_llama(modules_to_not_convert=[pattern])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("modules_to_not_convert", ["(?i)DOWN"], r"Write '\(\?i:DOWN\)'"),
        ("modules_to_not_convert", ["*down_proj"], r"Any text is `\.\*`.*'down_proj'"),
        ("modules_to_not_convert", ["a)|(b"], "not a valid regular expression"),
        ("modules_to_not_convert", [3], "a pattern is a string, but 3 is none"),
        ("layer_bits", {"(?x)mlp": 3}, r"Write '\(\?x:mlp\)'"),
        ("layer_bits", "down_proj=3", "must be a mapping"),
        ("zero_rows", {"down_proj": 3}, "must be a list of numbers"),
        ("zero_rows", {"down_proj": "35"}, "must be a list of numbers"),
    ],
)
def test_an_invalid_pattern_is_refused_by_the_config(setting, value, message):
    with pytest.raises(ValueError, match=message):
        WaterSICConfig(**{setting: value})


def test_patterns_of_a_saved_config_are_not_checked_again():
    config = WaterSICConfig(modules_to_not_convert=["score"], layer_bits={"re:x": 5})

    selection = Selection.of(
        empty_model(LlamaForCausalLM, LlamaConfig(**LLAMA)), config, saved=True
    )

    assert len(selection.shapes) == 14


# -- very small layers ------------------------------------------------------------------------


def test_the_rule_for_small_layers():
    ones = torch.ones(64, dtype=torch.float64)
    stored = pack_layer(torch.zeros(4, 64, dtype=torch.int8), ones[:4], ones, name="layer")

    # prediction and sizes of the header agree within a byte per section
    assert fixed_bits(4, 64) == pytest.approx(stored.bits_per_weight, abs=1.0)
    small = [(4, 4), (16, 4), (4, 64), (1, 1024), (1024, 4), (16, 16)]
    assert all(is_too_small(*shape) for shape in small)
    large = [(16, 32), (32, 32), (64, 32), (160, 64), (64, 64), (4096, 64)]
    assert not any(is_too_small(*shape) for shape in large)


def test_small_layers_stay_dense_with_the_reason():
    selection = select(LlamaForCausalLM, LlamaConfig(**LLAMA | {"head_dim": 2}))

    assert dense_for(selection, SMALL) == {
        f"model.layers.*.self_attn.{name}_proj" for name in ("q", "k", "v", "o")
    }
    assert len(selection.shapes) == 6
    with pytest.raises(ValueError, match=r"no linear layer to quantize: .*so small"):
        select(
            LlamaForCausalLM,
            LlamaConfig(**LLAMA | {"hidden_size": 8, "intermediate_size": 8, "head_dim": 2}),
        )


# -- routers, and modules beside the blocks ---------------------------------------------------


def test_routers_of_experts_that_stay_dense_stay_dense():
    config = JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=32,
        num_local_experts=64,
    )
    selection = select(JetMoeForCausalLM, config)

    assert list(selection.shapes) == ["model.layers.0.self_attention.kv_proj"]
    assert len(dense_for(selection, "router of experts")) == 2


def test_routers_beside_a_list_of_experts_are_recognised():
    def mlp():
        return nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))

    block = nn.Module()
    block.gate = nn.Linear(32, 3)
    block.proj = nn.Linear(32, 32)
    block.experts = nn.ModuleList(mlp() for _ in range(3))
    model = nn.Module()
    model.layers = nn.ModuleList([block])

    assert list(routing_layers(model, expert_counts(model, {}))) == [r"layers\.0\.gate"]


def test_a_list_of_layers_beside_the_blocks_is_no_stack():
    model = nn.Module()
    model.projections = nn.ModuleList([nn.Linear(8, 8)])
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

    stacks = block_stacks(model, ["projections.0", "layers.0.0"])

    assert [[name for name, _ in stack] for stack in stacks] == [["layers.0"]]


# -- weights that other modules use -----------------------------------------------------------


class Reads(nn.Module):
    """A block whose second layer is used in some way by the block itself."""

    def __init__(self, use):
        super().__init__()
        self.one, self.two, self.use = nn.Linear(8, 8), nn.Linear(8, 8), use

    def forward(self, x):
        return self.two(self.use(self, self.one(x)))


class Model(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.layers = nn.ModuleList(Reads(use) for _ in range(2))

    def forward(self, input_ids, use_cache):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def divide(block, x):
    block.two.weight.data.div_(2)
    return x


def stop(block, x):
    x = x @ block.two.weight
    raise RuntimeError("cannot run on meta")


@pytest.mark.parametrize(
    ("use", "used"),
    [
        (lambda block, x: x, False),
        (lambda block, x: x.to(block.two.weight.device), False),
        (lambda block, x: x if block.two.weight.dtype == torch.uint8 else x / 0, False),
        (lambda block, x: x if (x > 0).all() else x @ block.two.weight, False),
        (lambda block, x: x.to(block.two.weight.dtype), True),
        (lambda block, x: x @ block.two.weight, True),
        (lambda block, x: x + torch.stack([block.two.weight]).sum(), True),
        (lambda block, x: x.view(-1, block.two.weight.shape[1]), True),
        (divide, True),
        (stop, True),
    ],
)
def test_weights_used_elsewhere(use, used):
    model = Model(use)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [f"layers.{i}.{name}" for i in range(2) for name in ("one", "two")]

    found = weights_used_elsewhere(model, layers)

    assert found == ({"layers.0.two", "layers.1.two"} if used else set())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert type(model.layers[0].two) is nn.Linear


MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
JAMBA = LLAMA | {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "use_mamba_kernels": False,
    "mamba_dt_rank": 32,
}
RWKV = BERT | {"attention_hidden_size": 32, "context_length": 32, "rescale_every": 1}


@pytest.mark.parametrize(
    ("model_class", "config", "used"),
    [
        (RwkvForCausalLM, RwkvConfig(**RWKV), {"attention.output", "feed_forward.value"}),
        (MambaForCausalLM, MambaConfig(**MAMBA, time_step_rank=32), {"mixer.dt_proj"}),
        (JambaForCausalLM, JambaConfig(**JAMBA), {"mamba.dt_proj"}),
    ],
    ids=["rwkv", "mamba", "jamba"],
)
def test_architectures_that_use_weights_of_layers(model_class, config, used):
    names = dense_for(select(model_class, config), USED)

    assert {".".join(name.split(".")[-2:]) for name in names} == used


def test_a_model_that_divides_weights_runs(tmp_path, tokens):
    dense = RwkvForCausalLM(RwkvConfig(**RWKV)).eval()
    dense.save_pretrained(tmp_path)
    expected = dense(tokens).logits

    model = RwkvForCausalLM.from_pretrained(tmp_path, quantization_config=WaterSICConfig(6.0))

    error = (model.eval()(tokens).logits - expected).norm() / expected.norm()
    assert error < 0.2


# -- layers that a checkpoint lacks -----------------------------------------------------------


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(folder)
    return folder


def new_of(model):
    left = model.config.quantization_config.left_dense
    return {name for name, reason in left.items() if reason == NEW}


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_new_head_stays_dense_and_is_saved(bert_folder, tmp_path, tokens, calibrated):
    data = {"dataset": tokens} if calibrated else {}
    model = BertForSequenceClassification.from_pretrained(
        bert_folder, quantization_config=WaterSICConfig(4.0, **data)
    ).eval()
    model.save_pretrained(tmp_path)

    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()

    assert new_of(model) == new_of(again) == {"classifier", "bert.pooler.dense"}
    assert len(list(packed_layers(model))) == 12
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_new_layers_in_the_blocks_stay_dense(bert_folder, tmp_path, tokens):
    config = BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    model = BertLMHeadModel.from_pretrained(
        bert_folder, config=config, quantization_config=WaterSICConfig(4.0, dataset=tokens)
    )

    assert len(list(packed_layers(model))) == 12
    assert all("crossattention" in name for name in new_of(model))
    assert len(new_of(model)) == 4


@pytest.mark.parametrize(
    "loaded", [BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering]
)
def test_any_class_loads_what_another_has_saved(bert_folder, tmp_path, tokens, loaded):
    first, second = tmp_path / "first", tmp_path / "second"
    BertForMaskedLM.from_pretrained(
        bert_folder, quantization_config=WaterSICConfig(4.0)
    ).save_pretrained(first)

    model, info = loaded.from_pretrained(first, output_loading_info=True)
    model.eval().save_pretrained(second)
    again = loaded.from_pretrained(second).eval()

    assert {name.rpartition(".")[0] for name in info["missing_keys"]} == new_of(model)
    assert len(list(packed_layers(again))) == 12
    assert torch.equal(model(tokens)[0], again(tokens)[0])


def test_a_layer_that_other_blocks_have_is_lost_and_not_new(bert_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    BertForMaskedLM.from_pretrained(
        bert_folder, quantization_config=WaterSICConfig(4.0)
    ).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layer.1.output.dense" not in n}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    for model_class in (BertForMaskedLM, BertForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"layer\.1\.output\.dense"):
            model_class.from_pretrained(tmp_path)
