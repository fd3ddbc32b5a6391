"""The page about a quantized model, made from the files of its folder alone."""

from watersic_hf.report.facts import Facts, read_facts
from watersic_hf.report.folder import save_page
from watersic_hf.report.page import PAGE_FILE, model_page, write_page

__all__ = ["PAGE_FILE", "Facts", "model_page", "read_facts", "save_page", "write_page"]
