"""Where a model is loaded from: a folder or the hub, and the options that every part needs."""

import contextlib
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on the disk or on the hub.

    Its configuration, weights, tokenizer and processor are all loaded with the same options.
    """

    name: str
    """Folder or hub name."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the main branch."""
    subfolder: str = ""
    """Folder within the repository that holds the model."""
    trust_remote_code: bool = False
    """Whether Python code of the repository may be run."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained`."""
        given = {
            "revision": self.revision,
            "subfolder": self.subfolder,
            "trust_remote_code": self.trust_remote_code,
        }
        return {name: value for name, value in given.items() if value}

    @property
    def title(self) -> str:
        """Name of the model for readers elsewhere: of a folder its own name, without its path."""
        folder = Path(self.name)
        return Path(os.path.abspath(folder)).name if folder.is_dir() else self.name

    def load_config(self) -> Any:
        """Return the configuration of the model.

        Raises:
            ValueError: an adapter is there and not a model, or the model is quantized already.
        """
        if find_adapter_config_file(self.name, revision=self.revision, subfolder=self.subfolder):
            raise ValueError(
                f"{self.name} is an adapter, and a model is needed. Merge it first: load it with "
                f"`peft.AutoPeftModelForCausalLM.from_pretrained`, call `merge_and_unload()`, save "
                f"the result and the tokenizer to a folder, and quantize that folder."
            )
        config = AutoConfig.from_pretrained(self.name, **self.options)
        found = getattr(config, "quantization_config", None)
        if found is not None:
            found = found if isinstance(found, dict) else found.to_dict()
            raise ValueError(
                f"{self.name} is quantized already, with {found.get('quant_method')}, and dense "
                f"weights are needed. Name the original model, or dequantize this one and save the "
                f"result first."
            )
        return config

    def empty_model(self, config: Any) -> nn.Module:
        """Return the model of a configuration on meta: its modules and shapes, and no memory."""
        model_class = self._model_class(config)
        # a class of an architecture, or one that finds it
        build = getattr(model_class, "_from_config", None)
        if build is None:
            build = functools.partial(
                model_class.from_config, trust_remote_code=self.trust_remote_code
            )
        with torch.device("meta"):
            return build(config)

    def load_model(self, config: Any, **options: Any) -> nn.Module:
        """Return the model with its weights.

        Args:
            config: configuration of the model.
            options: further arguments of `from_pretrained`.
        """
        model_class = self._model_class(config)
        return model_class.from_pretrained(self.name, **self.options, **options)

    def save_processor(self, folder: Path) -> None:
        """Save the processor of the model, or its tokenizer if it has no processor."""
        # a slow import, with triton among it
        from transformers import AutoProcessor

        try:
            AutoProcessor.from_pretrained(self.name, **self.options).save_pretrained(folder)
            return
        except (OSError, ValueError, ImportError) as error:
            logger.info("No processor is saved, only a tokenizer: %s", error)
        # a model without a tokenizer is still a model
        with contextlib.suppress(OSError, ValueError):
            AutoTokenizer.from_pretrained(self.name, **self.options).save_pretrained(folder)

    def folder(self) -> Path:
        """Return the folder with the files of the model: its own, or one in the hub's cache."""
        if Path(self.name).is_dir():
            return Path(self.name, self.subfolder)
        where = {"revision": self.revision, "subfolder": self.subfolder}
        return Path(cached_file(self.name, "config.json", **where)).parent

    def _model_class(self, config: Any) -> Any:
        """Return the class that the model was saved as, or an automatic one that finds it."""
        name = next(iter(getattr(config, "architectures", None) or []), "")
        if hasattr(transformers, name):
            return getattr(transformers, name)
        for automatic, reference in (getattr(config, "auto_map", None) or {}).items():
            is_class = isinstance(reference, str) and reference.rpartition(".")[2] == name
            if is_class and automatic.startswith("AutoModel"):
                return getattr(transformers, automatic)
        return AutoModelForCausalLM
