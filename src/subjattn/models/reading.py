"""Read other libraries' files quietly, and turn what goes wrong with them into one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from subjattn.errors import BadInput, SubjattnError


LONGEST_REASON = 300


@contextmanager
def quiet() -> Iterator[None]:
    """Silence other libraries' bars and notices, which would tear the progress display."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def reading(what: str, error: type[SubjattnError] = BadInput) -> Iterator[None]:
    """Read files quietly; what goes wrong is raised as `error`, in one line with its reason."""
    try:
        with quiet():
            yield
    except SubjattnError:
        raise
    except Exception as cause:  # of whichever library reads, or fetches
        raise error(f"{what} cannot be loaded: {reason_of(cause)}") from None


def reason_of(cause: Exception) -> str:
    """An error's first line, and those after it where the first only announces them."""
    lines = [line for line in (" ".join(line.split()) for line in str(cause).splitlines()) if line]
    if isinstance(cause, KeyError) or not lines:
        return f"{type(cause).__name__} {cause}".strip()
    text = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"
