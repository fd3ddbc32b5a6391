from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from watersic_hf import WaterSICConfig
from watersic_hf.calibration import Draw, calibration_windows
from watersic_hf.finetuning import finetune_to_folder, folder


def test_windows_differ_from_those_of_the_calibration(
    quantized_folder, llama_folder, tmp_path, monkeypatch
):
    drawn = []

    def record(model, teacher, windows, **options):
        drawn.append(windows)
        raise InterruptedError

    monkeypatch.setattr(folder, "finetune_scales", record)
    config = AutoConfig.from_pretrained(quantized_folder).quantization_config
    with pytest.raises(InterruptedError):
        finetune_to_folder(
            str(quantized_folder),
            tmp_path / "o",
            str(llama_folder),
            samples=config["samples"],
            sequence_length=config["sequence_length"],
        )
    calibrated = calibration_windows(
        "pydoc",
        tokenizer=AutoTokenizer.from_pretrained(quantized_folder),
        samples=config["samples"],
        sequence_length=config["sequence_length"],
        seed=config["seed"],
    )
    known, others = ({tuple(w.tolist()) for w in windows} for windows in (calibrated, drawn[0]))

    assert len(others) == len(known) == 4
    assert others.isdisjoint(known)


@pytest.mark.parametrize(
    ("calibrated", "dataset", "same"),
    [
        ("pydoc", "pydoc", True),
        ("t.txt", "/somewhere/t.txt", True),
        # as earlier versions saved it
        ("/somewhere/else/t.txt", Path("t.txt"), True),
        ("someone/texts", "someone/texts", True),
        ("someone/texts", "another/texts", False),
        ("t.txt", "/somewhere/u.txt", False),
    ],
)
def test_calibration_is_known_by_the_name_of_its_set(calibrated, dataset, same):
    config = WaterSICConfig(dataset=calibrated, samples=3, sequence_length=512, seed=7)
    model = torch.nn.Module()
    model.config = LlamaConfig(max_position_embeddings=64, quantization_config=config)

    found = folder._calibration_draw(model, dataset)

    assert found == (Draw(samples=3, sequence_length=64, seed=7) if same else None)
