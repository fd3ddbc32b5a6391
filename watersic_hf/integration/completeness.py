"""Whether the files of a model hold every tensor that the model needs."""

import logging
import os
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from watersic_hf.checkpoint import CheckpointError
from watersic_hf.integration.source import ModelSource

logger = logging.getLogger(__name__)


def require_tensors(folder: str | os.PathLike, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that lacks tensors of its model, quantized or not.

    The model is made on meta, so that no weight is read.  A model that transformers does not know
    is not checked.

    Args:
        folder: folder of the model.
        trust_remote_code: whether Python code of the folder may be run.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the model's; the message
            names it.
    """
    source = ModelSource(name=os.fspath(folder), trust_remote_code=trust_remote_code)
    verbosity = transformers_logging.get_verbosity()
    # transformers would print a table
    transformers_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source.name, **source.options)
        _, found = source.load_model(config, device_map={"": "meta"}, output_loading_info=True)
    except CheckpointError:
        raise
    except Exception as error:
        # a model of another library, or one that needs its weights to be made
        logger.info("%s: whether tensors are missing was not checked: %s", folder, error)
        return
    finally:
        transformers_logging.set_verbosity(verbosity)
    lost = sorted(_names(found["missing_keys"]) | _names(found["mismatched_keys"]))
    if lost:
        raise CheckpointError(
            f"{lost[0]}: the files lack this tensor, or hold one of another shape; that is so for "
            f"{len(lost)} in all. The model is incomplete: save it again, or download it again."
        )


def _names(keys: Any) -> set[str]:
    """Return names of tensors; transformers adds shapes to those that do not match."""
    return {key if isinstance(key, str) else key[0] for key in keys}
