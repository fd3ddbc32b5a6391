"""From a model to hidden states: its blocks, what runs through them, the processes at work."""

from watersic_hf.streams.blocks import ResidentBlocks
from watersic_hf.streams.topology import block_stacks, decoder_blocks

__all__ = ["ResidentBlocks", "block_stacks", "decoder_blocks"]
