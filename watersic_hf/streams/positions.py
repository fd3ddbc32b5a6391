"""How many tokens a model can read at once."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

#: Names of the limit in configurations of models of text.
_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")

#: Last part of the name of a table of learned positions; others are of images or relative.
_TABLE = re.compile(r"wpe|(embed_)?positions?(_embed|_embedding|_embeddings)?")


def position_limit(model: nn.Module) -> int | None:
    """Return the most tokens that a model can read at once; None if nothing limits them.

    It is the smallest of what the configuration says and of the positions in its tables.  A table
    of which the first rows stand for padding has fewer positions than rows, as RoBERTa's.

    Args:
        model: the model, also on meta.
    """
    config = model.config
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _LIMITS]
    # parts with a configuration of another kind read images or sound
    limits += _table_limits(model, {type(config), type(text)})
    return min((limit for limit in limits if limit), default=None)


def _table_limits(module: nn.Module, kinds: set[type]) -> Iterator[int]:
    """Yield the number of positions of every table in a module."""
    for name, child in module.named_children():
        config: Any = getattr(child, "config", None)
        if config is not None and type(config) not in kinds:
            continue
        weight = getattr(child, "weight", None)
        if _TABLE.fullmatch(name) and isinstance(weight, Tensor) and weight.dim() == 2:
            padding = getattr(child, "padding_idx", None)
            unused = 0 if padding is None else padding + 1
            yield weight.shape[0] - getattr(child, "offset", unused)
        else:
            yield from _table_limits(child, kinds)
