import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

# scripts import their neighbours by name, as when they are run
sys.path.append(str(FOLDER))


@pytest.fixture(scope="session")
def load():
    """Load a script of `benchmarks/` by its name."""

    def load_script(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load_script
