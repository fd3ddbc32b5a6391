import pytest
from transformers import AutoConfig, AutoTokenizer

from watersic_hf.calibration import calibration_windows
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
