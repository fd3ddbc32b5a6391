import numpy as np
import pytest
import torch

from watersic_hf.codec import compiled


@pytest.fixture(params=["compiled", "numpy"])
def implementation(request, monkeypatch):
    """Run a test with the compiled functions of the codec, and with those of numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "_loader", None)
    elif compiled.functions() is None:
        pytest.skip("numba is not installed")
    return request.param


@pytest.fixture
def layer_codes():
    """Codes like those of a layer, and their scales: log-normal by row and column."""

    def make(rows, cols, bits, *, nu=None, seed=0):
        rng = np.random.default_rng(seed)
        scale_AN = 2.0 ** (
            0.3 * rng.standard_normal(rows)[:, None] + 0.5 * rng.standard_normal(cols)
        )
        if nu is None:
            noise_AN = rng.standard_normal((rows, cols))
        else:
            noise_AN = rng.standard_t(nu, (rows, cols)) * np.sqrt((nu - 2) / nu)
        # 2^h = 4.13 for the differential entropy h of a standard normal
        scale_AN *= 2.0**bits / 4.13
        return torch.from_numpy(np.rint(noise_AN * scale_AN).astype(np.int32)), scale_AN

    return make
