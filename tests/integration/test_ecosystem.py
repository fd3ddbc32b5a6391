"""Hub, PEFT and Trainer, as users meet them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from watersic_hf import WaterSICLinear


@pytest.fixture
def model(quantized_folder):
    return AutoModelForCausalLM.from_pretrained(quantized_folder)


@pytest.fixture
def uploads(monkeypatch):
    """What an upload would carry, instead of the upload."""
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    found = {}

    def take(self, working_dir, repo_id, *args, **kwargs):
        from pathlib import Path

        found.update({f.name: f.read_bytes() for f in Path(working_dir).iterdir()}, repo=repo_id)

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})()

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", take)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", Api, raising=False)
        monkeypatch.setattr(f"{module}.create_repo", Api().create_repo, raising=False)
    return found


def test_pushed_model_has_tags_and_card_with_import(model, uploads):
    model.push_to_hub("someone/tiny-watersic")

    card = uploads["README.md"].decode()
    assert uploads["repo"] == "someone/tiny-watersic"
    assert {"model.safetensors", "config.json", "README.md"} <= set(uploads)
    code = card[card.index("```python") :]
    assert code.splitlines()[1].startswith("import watersic_hf")
    assert 'from_pretrained("someone/tiny-watersic")' in card
    assert "- watersic" in card
    assert "| bits per quantized weight, target | 4 |" in card


def test_saving_with_push_carries_the_card_too(model, uploads, tmp_path):
    model.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="someone/m")

    assert "import watersic_hf" in uploads["README.md"].decode()


def test_an_adapter_trains_saves_and_loads(quantized_folder, tmp_path, tokens):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(quantized_folder)
    config = peft.LoraConfig(
        r=8, target_modules=["v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    before = {n: p.clone() for n, p in base.named_parameters() if n.endswith("row_scale")}

    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)

    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, dict(base.named_parameters())[n]) for n, p in before.items())
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


def test_kbit_preparation_leaves_the_packed_layers(model, tokens):
    peft = pytest.importorskip("peft")

    prepared = peft.prepare_model_for_kbit_training(model)

    layer = prepared.model.layers[0].mlp.up_proj
    assert isinstance(layer, WaterSICLinear)
    assert layer.weight.dtype == torch.uint8
    layer.check("up_proj")
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapted(tokens, labels=tokens).loss.backward()


def test_trainer_without_adapter_is_refused(model, tmp_path, tokens):
    rows = [{"input_ids": t, "labels": t} for t in tokens]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )

    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=rows)

    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    Trainer(adapted, arguments, train_dataset=rows).train()


def test_tensor_parallelism_is_refused(model):
    model.config.distributed_config = type("Distributed", (), {"tp_size": 2})()

    with pytest.raises(ValueError, match="cannot be split over 2 tensor-parallel ranks"):
        model.hf_quantizer.update_parallel_plan(model, {})
