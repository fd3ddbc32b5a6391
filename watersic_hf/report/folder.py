"""Write the page about a quantized model into the folder of the model."""

import os
from pathlib import Path

from watersic_hf.checkpoint import inspect_checkpoint
from watersic_hf.report.facts import read_facts
from watersic_hf.report.page import PAGE_FILE, write_page


def save_page(folder: str | os.PathLike) -> Path:
    """Write the page `PAGE_FILE` into a model's folder, without decoding its layers.

    Args:
        folder: folder of the quantized model.

    Returns:
        The file that was written.
    """
    page = Path(folder) / PAGE_FILE
    write_page(page, read_facts(folder, inspect_checkpoint(folder, decode=False)))
    return page
