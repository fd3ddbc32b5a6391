"""The command line: ``watersic quantize | finetune | eval | inspect | diff | verify | demo``."""

from watersic_hf.cli.main import main

__all__ = ["main"]
