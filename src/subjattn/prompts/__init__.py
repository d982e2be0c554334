"""Prompts: facts asked in a style, with the exact tokens of subject and answer."""

from subjattn.prompts.make import make_prompts, subject_lengths
from subjattn.prompts.prompt import ROLES, Prompt, PromptSet
from subjattn.prompts.show import example, notice_first, notice_relations, on_line, pieces
from subjattn.prompts.spans import subject_spans, token_span
from subjattn.prompts.style import Style, check_template, default_styles
from subjattn.prompts.swaps import ablate, aligned, swap_subjects


__all__ = [
    "ROLES",
    "Prompt",
    "PromptSet",
    "Style",
    "ablate",
    "aligned",
    "check_template",
    "default_styles",
    "example",
    "make_prompts",
    "notice_first",
    "notice_relations",
    "on_line",
    "pieces",
    "subject_lengths",
    "subject_spans",
    "swap_subjects",
    "token_span",
]
