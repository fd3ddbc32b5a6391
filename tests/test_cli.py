import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from watersic_hf import WaterSICConfig
from watersic_hf.cli import main
from watersic_hf.integration.settings import settings_of


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama_folder):
    out = tmp_path_factory.mktemp("cli") / "out"
    options = ("--bits", 4, "--samples", 4, "--sequence-length", 64)
    status = run("quantize", llama_folder, out, *options, "--layer-bits=v_proj=6", "--skip=k_proj")
    assert status == 0
    return out


def test_quantize_writes_weights_config_tokenizer_card_and_page(quantized, capsys):
    names = {f.name for f in quantized.iterdir()}

    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    card = (quantized / "README.md").read_text("utf-8")
    assert card.count("import watersic_hf") == 1
    assert re.search(r"^\| `self_attn\.v_proj` \| 2 \| [56]\.\d+ \| 0\.\d+ \|$", card, re.MULTILINE)
    assert (quantized / "report.html").read_text("utf-8").count("<svg") == 4


def test_quantize_says_what_it_calibrates_on(llama_folder, tmp_path, capsys):
    options = ("--samples", 4, "--sequence-length", 32, "--no-check")
    assert run("quantize", llama_folder, tmp_path / "q", *options) == 0
    text = capsys.readouterr().err

    assert "Calibrating on pydoc: 4 windows of 32 tokens, 128 tokens." in text
    assert "with --samples 1 and about" in text
    assert "with --samples 16" in text


def test_quantize_says_that_it_uses_no_data(llama_folder, tmp_path, capsys):
    options = ("--dataset", "none", "--no-check")
    assert run("quantize", llama_folder, tmp_path / "q", *options) == 0

    assert "Quantizing without calibration data" in capsys.readouterr().err


def test_set_changes_any_other_setting(llama_folder, tmp_path, capsys):
    options = ["--dataset=none", "--set=allocation=uniform", "--set=drift=0", "--set=mixing=true"]

    assert run("quantize", llama_folder, tmp_path / "o", *options) == 0

    saved = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert saved["allocation"] == "uniform"
    assert saved["drift"] == 0
    assert saved["mixing"] is True


def test_quantize_keeps_the_architecture_of_the_checkpoint(tokenizer, tmp_path, capsys):
    config = T5Config(
        vocab_size=320,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    options = ("--bits=6", "--samples=4", "--sequence-length=32")

    assert run("quantize", tmp_path / "t5", tmp_path / "o", *options) == 0

    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "o").hf_quantizer is not None
    card = (tmp_path / "o" / "README.md").read_text()
    assert "T5ForConditionalGeneration.from_pretrained" in card
    assert "text-generation" not in card


@pytest.mark.parametrize(
    ("text", "message"),
    [("bits=3", "must be NAME=VALUE with a name among"), ("drift=high", "drift is 'high'")],
)
def test_set_refuses_unknown_names_and_bad_values(llama_folder, tmp_path, capsys, text, message):
    assert run("quantize", llama_folder, tmp_path / "o", "--set", text) == 1
    assert message in capsys.readouterr().err


def test_quantize_refuses_to_overwrite(quantized, llama_folder, capsys):
    assert run("quantize", llama_folder, quantized) == 1
    assert "holds a model already" in capsys.readouterr().err


def test_inspect_prints_a_row_per_layer_and_the_totals(quantized, capsys):
    assert run("inspect", quantized) == 0

    out = capsys.readouterr().out
    assert sum("_proj" in line and " x " in line for line in out.splitlines()) == 12
    assert "12 layers" in out
    assert any("embed_tokens.weight" in line and "embedding" in line for line in out.splitlines())


def test_inspect_json_has_bits_entropies_and_errors(quantized, capsys):
    assert run("inspect", quantized, "--json") == 0

    found = json.loads(capsys.readouterr().out)
    layer = next(r for r in found["layers"] if r["name"].endswith("v_proj"))
    assert layer["bits"] == pytest.approx(6, abs=0.3)
    assert layer["class_entropy"] <= layer["pooled_entropy"] + 1e-9
    assert 0 < layer["error"] < 1
    assert found["totals"]["layers"] == 12


def test_inspect_html_is_the_page_of_quantize_plus_entropies(quantized, tmp_path, capsys):
    page = tmp_path / "page.html"

    assert run("inspect", quantized, "--html", page) == 0

    first, second = ((quantized / "report.html"), page)
    first, second = (file.read_text("utf-8") for file in (first, second))
    assert "H class" in second
    assert "H class" not in first
    plots = [re.findall(r"<svg.*?</svg>", text, re.DOTALL) for text in (first, second)]
    assert plots[0] == plots[1]


def test_inspect_html_works_without_a_report(quantized, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(quantized, bare)
    (bare / "watersic_report.jsonl").unlink()

    assert run("inspect", bare, "--html", tmp_path / "page.html") == 0

    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<svg") == 3
    assert 'id="waterfilling"' in page


def test_diff_compares_layers_settings_and_tensors(quantized, llama_folder, tmp_path, capsys):
    options = ("--bits=4", "--samples=4", "--sequence-length=64", "--set=allocation=uniform")
    assert run("quantize", llama_folder, tmp_path / "b", *options, "--skip=k_proj") == 0
    capsys.readouterr()

    assert run("diff", quantized, tmp_path / "b") == 0
    table = capsys.readouterr().out
    assert run("diff", quantized, quantized, "--json") == 0
    same = json.loads(capsys.readouterr().out)

    assert len(re.findall(r"^model\.layers\..*_proj ", table, re.MULTILINE)) == 12
    assert re.search(r'^allocation +"sensitivity" +"uniform"$', table, re.MULTILINE)
    assert re.search(r"^layer_bits .*v_proj", table, re.MULTILINE)
    assert same["tensors"]["different"] == same["totals"]["difference"] == 0
    assert all(layer["identical"] for layer in same["layers"])
    assert all(layer["error_a"] == layer["error_b"] > 0 for layer in same["layers"])


def test_verify_counts_what_it_checked(quantized, capsys):
    assert run("verify", quantized, "--json") == 0

    assert json.loads(capsys.readouterr().out)["layers"] == 12


def test_eval_compares_with_the_original(quantized, llama_folder, capsys):
    status = run(
        "eval",
        quantized,
        "--against",
        llama_folder,
        "--windows",
        2,
        "--sequence-length",
        64,
        "--prompt",
        "def f",
        "--json",
    )

    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["tokens"] == 2 * 63
    assert found["kl_bits"] > 0
    assert 0 < found["top1_agreement"] <= 1
    assert found["perplexity"] == pytest.approx(found["original_perplexity"], rel=0.2)
    assert found["text"].startswith("def f")
    assert found["residency"] == "dense"
    assert found["memory_bytes"] > found["original_memory_bytes"] > 0
    assert found["tokens_per_second"] > 0 < found["original_tokens_per_second"]


def test_eval_prints_a_table(quantized, capsys):
    assert run("eval", quantized, "--windows", 1, "--sequence-length", 64) == 0

    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "time to the first of 64 tokens" in printed


def test_eval_prints_tasks_of_both_models(quantized, llama_folder, write_task, capsys):
    documents = [
        {"question": f"Item {n} is", "choices": ["a", "b"], "answer": n % 2} for n in range(8)
    ]
    task = write_task("quiz", documents)
    options = ("--windows", 1, "--sequence-length", 64, "--limit", 6, "--against", llama_folder)

    assert run("eval", quantized, *options, "--tasks", task) == 0
    table = capsys.readouterr().out
    assert run("eval", quantized, *options, "--tasks", task, "--json") == 0
    found = json.loads(capsys.readouterr().out)

    both = [found[key]["quiz"] for key in ("original_tasks", "tasks")]
    row = next(line for line in table.splitlines() if line.startswith("quiz, acc "))
    cells = [f"{metrics['acc']:.4f} +- {metrics['acc_stderr']:.4f}" for metrics in both]
    assert re.split("  +", row) == ["quiz, acc", *cells]


def test_eval_refuses_task_options_without_tasks(quantized, capsys):
    assert run("eval", quantized, "--few-shot", 2) == 1
    assert "require --tasks" in capsys.readouterr().err


def test_finetune_keeps_the_size_and_resumes(
    quantized, llama_folder, spoil_scales, tmp_path, capsys
):
    spoil_scales(AutoModelForCausalLM.from_pretrained(quantized)).save_pretrained(tmp_path / "q")
    options = (
        "--teacher",
        llama_folder,
        "--tokenizer",
        llama_folder,
        "--samples",
        8,
        "--sequence-length",
        32,
        "--epochs",
        1,
        "--batch-size",
        2,
        "--learning-rate",
        1e-2,
        "--resume",
        tmp_path / "state",
    )
    assert run("finetune", tmp_path / "q", tmp_path / "a", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run("finetune", tmp_path / "q", tmp_path / "b", *options) == 0
    table = capsys.readouterr().out

    assert found["kl_bits_after"] < 0.9 * found["kl_bits_before"]
    assert f"{found['kl_bits_after']:.5f}" in table
    card = (tmp_path / "a" / "README.md").read_text("utf-8")
    assert "| scales finetuned | pydoc, 224 tokens, epoch 1 |" in card
    before, first, second = (tmp_path / name / "model.safetensors" for name in ("q", "a", "b"))
    assert first.stat().st_size == before.stat().st_size
    assert first.read_bytes() != before.read_bytes()
    # the second run resumed from the state of the first
    assert first.read_bytes() == second.read_bytes()


def test_finetune_reports_if_no_epoch_helped(quantized, llama_folder, tmp_path, capsys):
    options = ("--samples", 2, "--sequence-length", 16, "--epochs", 1, "--learning-rate", 0.5)

    assert run("finetune", quantized, tmp_path / "o", "--teacher", llama_folder, *options) == 0

    assert "no epoch lowered the held-out KL, original scales kept" in capsys.readouterr().out
    assert "finetuned" not in (tmp_path / "o" / "README.md").read_text("utf-8")
    before, after = (folder / "model.safetensors" for folder in (quantized, tmp_path / "o"))
    assert before.read_bytes() == after.read_bytes()


def test_finetune_refuses_to_overwrite_and_needs_a_quantized_model(
    quantized, llama_folder, tmp_path, capsys
):
    options = ("--teacher", llama_folder, "--samples", 2, "--sequence-length", 16)

    assert run("finetune", quantized, quantized, *options) == 1
    assert "holds a model already" in capsys.readouterr().err
    assert run("finetune", llama_folder, tmp_path / "out", *options) == 1
    assert "no layer quantized with WaterSIC" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback(tmp_path, capsys):
    assert run("verify", tmp_path) == 1

    err = capsys.readouterr().err
    assert err.startswith("watersic: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["/nowhere/at/all", "a/b/c", __file__])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("inspect", name)

    assert f"there is no folder {name}" in capsys.readouterr().err


def test_eval_names_a_missing_text_file(quantized, capsys):
    assert run("eval", quantized, "--text", "nowhere.txt") == 1

    assert "the text file nowhere.txt does not exist" in capsys.readouterr().err


def test_debug_raises_the_original_error(tmp_path):
    from watersic_hf import CheckpointError

    with pytest.raises(CheckpointError):
        run("verify", tmp_path, "--debug")


def test_quantize_options_are_declared_by_the_settings():
    from watersic_hf.cli.main import build_parser
    from watersic_hf.cli.quantize import _config

    arguments = build_parser().parse_args(["quantize", "model", "out"])

    assert _config(arguments) == WaterSICConfig(dataset="pydoc")


def test_quantize_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("quantize", "--help")

    text = " ".join(capsys.readouterr().out.split())
    for name, setting in settings_of(WaterSICConfig).items():
        assert setting.option is None or setting.summary in text, name
    assert "drift: strength of activation-drift" in text
    assert "(default: sensitivity)" in text
    assert "name on the Hub, or none (default: pydoc)" in text


@pytest.mark.parametrize("text", ["v_proj", "v_proj=x"])
def test_bad_layer_bits_are_explained(llama_folder, tmp_path, capsys, text):
    assert run("quantize", llama_folder, tmp_path / "o", "--layer-bits", text) == 1
    assert "must be PATTERN=BITS" in capsys.readouterr().err


def test_commands_and_options(capsys):
    from watersic_hf.cli.main import build_parser

    (commands,) = (a for a in build_parser()._actions if a.choices)
    options = {
        name: sorted(o for a in parser._actions for o in a.option_strings if o.startswith("--"))
        for name, parser in commands.choices.items()
    }

    common = ["--debug", "--help", "--json"]
    source = ["--revision", "--subfolder", "--trust-remote-code"]
    assert options == {
        "quantize": sorted(
            [
                *common,
                *source,
                "--bits",
                "--dataset",
                "--tokenizer",
                "--samples",
                "--sequence-length",
                "--batch-size",
                "--layer-bits",
                "--skip",
                "--lattice",
                "--set",
                "--seed",
                "--dtype",
                "--device-map",
                "--max-shard-size",
                "--no-check",
                "--dry-run",
                "--processes",
            ]
        ),
        "finetune": sorted(
            [
                *common,
                *source,
                "--teacher",
                "--dataset",
                "--tokenizer",
                "--samples",
                "--sequence-length",
                "--epochs",
                "--learning-rate",
                "--batch-size",
                "--seed",
                "--resume",
                "--dtype",
                "--device-map",
            ]
        ),
        "eval": sorted(
            [
                *common,
                *source,
                "--against",
                "--text",
                "--sequence-length",
                "--windows",
                "--tasks",
                "--few-shot",
                "--limit",
                "--batch-size",
                "--dtype",
                "--device-map",
                "--prompt",
            ]
        ),
        "inspect": sorted([*common, "--html"]),
        "diff": common,
        "verify": common,
        "audit": common,
        "serve": ["--help", "--print", "--residency"],
        "run": ["--help", "--module"],
        "demo": sorted([*common, "--bits", "--model", "--out"]),
    }


def test_demo_runs_on_a_given_model(llama_folder, tmp_path, capsys):
    assert (
        run("demo", "--model", llama_folder, "--bits", 4, "--out", tmp_path / "kept", "--json") == 0
    )

    found = json.loads(capsys.readouterr().out)
    assert found["bits_stored"] == pytest.approx(4, rel=0.01)
    assert found["perplexity_after"] > 1
    assert found["text"]
    kept = {file.name for file in (tmp_path / "kept").iterdir()}
    assert {"model.safetensors", "report.html"} <= kept


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "watersic_hf.cli", "--help"], capture_output=True, text=True
    )

    assert done.returncode == 0
    assert "quantize" in done.stdout


def test_a_closed_pipe_is_not_an_error(quantized):
    command = [sys.executable, "-m", "watersic_hf.cli", "inspect", str(quantized)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as inspect:
        inspect.stdout.close()
        complaint = inspect.stderr.read()

    assert inspect.returncode == 0
    assert b"rror" not in complaint


def run_program(*arguments):
    command = [sys.executable, "-m", "watersic_hf.cli", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_run_knows_the_format_in_a_file_a_module_and_a_console_script(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, helper\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known\n"
        "print('watersic' in known, sys.argv[1:], __name__)\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "helper.py").write_text("")

    done = run_program(str(script), "--json", "-m", "x")

    assert done.stdout.strip() == "True ['--json', '-m', 'x'] __main__"
    assert done.returncode == 3
    assert "usage: python -m json.tool" in run_program("-m", "json.tool", "--help").stdout
    assert "Transformers" in run_program("transformers", "--help").stdout


def test_run_shows_the_errors_of_the_program(tmp_path):
    (tmp_path / "program.py").write_text("raise KeyError('lost')")

    assert "Traceback" in run_program(str(tmp_path / "program.py")).stderr
    missing = run_program("no-such-program")
    assert "no console script, file or module no-such-program" in missing.stderr
    assert missing.returncode == 1


def test_serve_is_a_command_of_vllm(llama_folder, monkeypatch, capsys):
    monkeypatch.delenv("WATERSIC_RESIDENCY", raising=False)
    command = ["serve", str(llama_folder), "--port", "8001", "--residency", "packed", "--print"]

    assert main(command) == 0

    out = capsys.readouterr().out
    assert out.startswith("WATERSIC_RESIDENCY=packed ")
    assert f"--model {llama_folder} --port 8001" in out
    assert "WATERSIC_RESIDENCY" not in os.environ


def test_serve_without_vllm_says_what_to_install(llama_folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main(["serve", str(llama_folder)]) == 1

    assert "pip install vllm" in capsys.readouterr().err
