"""Files with the state of an unfinished computation, from which it can be resumed."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from watersic_hf.checkpoint.files import checksum_of, write_tensors
from watersic_hf.checkpoint.schema import CheckpointError


def write_state(
    file: str | os.PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the state of a computation to one file, atomically.

    Args:
        file: file to write; its folder is created if necessary.
        tensors: tensors of the state, by name.
        facts: other values of the state, which JSON can represent.  The value ``identity`` tells
            which computation the state belongs to.

    Raises:
        CheckpointError: the file cannot be written; see `files.replacing`.
    """
    facts = dict(facts) | {"checksums": _checksums(tensors)}
    # one file for the tensors and the facts, so that the two cannot be from different moments
    write_tensors(dict(tensors), file, {"facts": json.dumps(facts)})


def read_state(
    file: str | os.PathLike,
    *,
    identity: Mapping[str, Any],
    advice: str = "Delete it; its content is then computed again.",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts that `write_state` has written.

    Args:
        file: file to read.
        identity: identity of the computation that wants to resume.
        advice: what to do if the file is damaged, for the message; default: delete it.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is the state of another
            computation; the message lists the differences.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {}).get("facts", "{}"))
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. {advice}") from error
    require_identity(file, facts.get("identity", {}), identity)
    if facts.pop("checksums", None) != _checksums(tensors):
        raise CheckpointError(
            f"{file}: this state is damaged: its bytes do not match their checksum. {advice}"
        )
    return tensors, facts


def require_identity(
    file: str | os.PathLike, found: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Check that a state belongs to a computation.

    Args:
        file: file of the state, for the message.
        found: identity that the state was written with.
        identity: identity of the computation that wants to resume.

    Raises:
        CheckpointError: the two differ; the message lists the differences.
    """
    differing = list(_differences(found, identity))
    if differing:
        raise CheckpointError(
            f"{file}: this state was written with other {' and '.join(differing)}, and cannot be "
            f"resumed with these. Use the original ones, or choose another folder."
        )


def _differences(found: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the entries that differ, with both values if they are short."""
    for name, wanted in identity.items():
        value = found.get(name)
        if value == wanted:
            continue
        if isinstance(value, Mapping) and isinstance(wanted, Mapping):
            parts = ", ".join(_differences(value, dict.fromkeys(value) | dict(wanted)))
            yield f"{name} ({parts})"
        else:
            texts = [json.dumps(v) for v in (value, wanted)]
            shown = all(len(text) < 40 for text in texts)
            yield f"{name} ({texts[0]} instead of {texts[1]})" if shown else name


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: checksum_of(tensor) for name, tensor in tensors.items()}
