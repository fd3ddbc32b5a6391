"""The compiled functions that `watersic_hf.codec` calls, in one place."""

from watersic_kernels.cpu.codes import add_columns, count_symbols, find_path_codes, sum_rows
from watersic_kernels.cpu.rans import LANES, decode_chunk
from watersic_kernels.cpu.rans_encoder import encode_chunk
from watersic_kernels.cpu.threads import in_parts

__all__ = [
    "LANES",
    "add_columns",
    "count_symbols",
    "decode_chunk",
    "encode_chunk",
    "find_path_codes",
    "in_parts",
    "sum_rows",
]
