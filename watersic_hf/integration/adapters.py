"""Explain to users of PEFT what it does not know about quantized layers."""

import functools
import importlib.util
from typing import Any

from watersic_hf.nn import PackedMatrix


def explain_merging() -> None:
    """Make PEFT refuse to merge an adapter into a quantized layer, and say what to do instead.

    PEFT 0.21.2 would fail when it adds a matrix to a payload ("output with shape ... doesn't match
    the broadcast shape"), and a layer has no way to refuse.
    """
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTuner

    check = getattr(BaseTuner, "_check_merge_allowed", None)
    if check is None or hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def check_merge_allowed(tuner: Any) -> None:
        check(tuner)
        for name, module in tuner.model.named_modules():
            if isinstance(module, PackedMatrix) and name.endswith(".base_layer"):
                raise ValueError(
                    f"{name.removesuffix('.base_layer')}: an adapter cannot be merged into a "
                    f"weight that is quantized with WaterSIC. Call "
                    f"`model.get_base_model().dequantize()` before you merge, or keep the adapter "
                    f"beside the quantized model."
                )

    BaseTuner._check_merge_allowed = check_merge_allowed
