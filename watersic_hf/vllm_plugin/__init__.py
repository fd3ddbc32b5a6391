"""Quantized models in vLLM: the entry point of its general plugins.

vLLM calls `register` in every process, so this module imports nothing of it.  The installation of
watersic-hf beside vLLM is all that is needed.
"""

import logging

logger = logging.getLogger(__name__)

#: Versions of vLLM that the plugin is tested with, by their first two numbers.
TESTED_VERSIONS = ("0.32",)


def register() -> None:
    """Register the format with vLLM; it may be called several times.

    A version of vLLM that lacks what the plugin needs is left as it is, with an error in the log:
    it serves other models as before, and refuses quantized ones.
    """
    try:
        import vllm
        from vllm.model_executor.layers.quantization import register_quantization_config

        from watersic_hf.vllm_plugin.config import WaterSICVllmConfig
    except ImportError as error:
        logger.error(
            "watersic: this version of vLLM cannot run quantized models: %s. Tested versions: %s.",
            error,
            ", ".join(TESTED_VERSIONS),
        )
        return
    if not vllm.__version__.startswith(tuple(f"{version}." for version in TESTED_VERSIONS)):
        logger.warning(
            "watersic: vLLM %s is not a tested version (%s).",
            vllm.__version__,
            ", ".join(TESTED_VERSIONS),
        )
    register_quantization_config("watersic")(WaterSICVllmConfig)
