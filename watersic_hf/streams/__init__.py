"""From a model to hidden states: find its blocks and run them one by one, in several processes."""

from watersic_hf.streams.blocks import ResidentBlocks
from watersic_hf.streams.positions import position_limit
from watersic_hf.streams.topology import block_stacks, decoder_blocks

__all__ = ["ResidentBlocks", "block_stacks", "decoder_blocks", "position_limit"]
