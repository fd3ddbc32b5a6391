"""The entry point that vLLM calls, without vLLM and with versions of it that are not tested."""

import importlib.metadata
import subprocess
import sys
import types

from watersic_hf import vllm_plugin


def test_the_entry_point_is_installed():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="watersic")

    assert entry.load() is vllm_plugin.register


def test_the_package_imports_nothing_of_vllm():
    code = "import sys, watersic_hf.vllm_plugin; assert 'vllm' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_version_without_what_is_needed_still_serves_other_models(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))

    vllm_plugin.register()

    assert "this version of vLLM cannot run quantized models" in caplog.text
    assert "0.32" in caplog.text
