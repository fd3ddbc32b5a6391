"""The HTML page about a quantized model, made only from the files in its folder."""

from watersic_hf.report.facts import Facts, read_facts
from watersic_hf.report.page import PAGE_FILE, model_page, write_folder_page, write_page

__all__ = ["PAGE_FILE", "Facts", "model_page", "read_facts", "write_folder_page", "write_page"]
