"""The check of a saved model against its original."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from watersic_hf.checkpoint import CheckReport, PackedLayer, read_check, rescale_layer
from watersic_hf.cli import main
from watersic_hf.evaluation import check as check_module
from watersic_hf.evaluation import check_folder
from watersic_hf.integration import ModelSource

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_llama, tokenizer):
    """A model whose predictions are far from uniform."""
    folder = tmp_path_factory.mktemp("original")
    model = make_llama(num_hidden_layers=4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, original):
    folder = tmp_path_factory.mktemp("quantized")
    command = ["quantize", str(original), str(folder), "--bits", "7", "--dataset", "none"]
    assert main(command) == 0
    return folder


def test_the_result_is_printed_and_kept(quantized, capsys):
    check = read_check(quantized)

    assert check.tokens == 510
    assert 0 < check.kl_median <= check.kl_p90
    assert not check.broken
    assert f"KL {check.kl_mean:.3f} bits per token" in (quantized / "README.md").read_text()
    assert "KL to the original" in (quantized / "report.html").read_text()
    assert main(["inspect", str(quantized)]) == 0


def test_no_check(original, tmp_path, capsys):
    command = ["quantize", str(original), str(tmp_path), "--bits", "7", "--dataset", "none"]

    assert main([*command, "--no-check", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["check"] is None
    assert read_check(tmp_path) is None


def test_a_model_that_stays_on_the_disk_has_the_same_result(original, quantized, monkeypatch):
    monkeypatch.setattr(check_module, "IN_MEMORY_BYTES", 0)

    check = check_folder(quantized, ModelSource(name=str(original)))

    assert check.kl_mean == pytest.approx(read_check(quantized).kl_mean, rel=1e-3)
    assert check.text == ""


def damage(quantized, folder):
    """Copy a model, and scale one layer as no quantizer would."""
    shutil.copytree(quantized, folder)
    tensors = load_file(folder / "model.safetensors")
    packed = PackedLayer(**{f: tensors[f"{LAYER}.{f}"] for f in PackedLayer.__annotations__})
    packed = rescale_layer(packed, packed.row_scale * 20, packed.col_scale, name=LAYER)
    tensors |= {f"{LAYER}.{field}": tensor for field, tensor in packed.tensors().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_broken_model_is_named_with_its_layer(original, quantized, tmp_path, monkeypatch, capsys):
    damage(quantized, tmp_path / "damaged")

    check = check_folder(tmp_path / "damaged", ModelSource(name=str(original)))

    assert check.broken
    assert check.suspects == (LAYER,)
    monkeypatch.setattr("watersic_hf.evaluation.check_folder", lambda *_: check)
    command = ["quantize", str(original), str(tmp_path / "new"), "--bits", "7", "--dataset", "none"]
    assert main(command) == 1
    assert LAYER in capsys.readouterr().err
    assert "**This model is broken.**" in (tmp_path / "new" / "README.md").read_text()
    assert "BROKEN" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.parametrize(
    ("kl", "expected", "broken"),
    [
        (0.2, 0.2, False),
        (0.09, 0.01, False),
        (0.9, 0.2, False),
        (1.1, 0.2, True),
        (float("nan"), 1, True),
    ],
)
def test_what_is_broken(kl, expected, broken):
    check = CheckReport(
        tokens=1,
        kl_mean=kl,
        kl_median=kl,
        kl_p90=kl,
        kl_expected=expected,
        top1_agreement=0.5,
        text="",
    )

    assert check.broken is broken


def test_a_model_without_a_tokenizer_is_not_checked(original, quantized, tmp_path, caplog):
    shutil.copytree(quantized, tmp_path / "plain")
    for file in (tmp_path / "plain").glob("tokenizer*"):
        file.unlink()

    assert check_folder(tmp_path / "plain", ModelSource(name=str(original))) is None
    assert "not checked" in caplog.text
