"""The checkpoint: which tensors a quantized layer is stored as, and the files that hold them."""

from watersic_hf.checkpoint.comparison import compare_checkpoints
from watersic_hf.checkpoint.files import (
    TensorHeader,
    checkpoint_files,
    read_headers,
    read_state,
    read_tensors,
    write_state,
)
from watersic_hf.checkpoint.inspection import inspect_checkpoint, verify_checkpoint
from watersic_hf.checkpoint.schema import (
    FORMAT_VERSION,
    CheckpointError,
    PackedLayer,
    layer_charge,
    pack_layer,
    rescale_layer,
    stored_layers,
    tensor_specs,
    validate_layer,
)

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "PackedLayer",
    "TensorHeader",
    "checkpoint_files",
    "compare_checkpoints",
    "inspect_checkpoint",
    "layer_charge",
    "pack_layer",
    "read_headers",
    "read_state",
    "read_tensors",
    "rescale_layer",
    "stored_layers",
    "tensor_specs",
    "validate_layer",
    "verify_checkpoint",
    "write_state",
]
