"""Read the YAML of a study of one-layer worlds; every wrong field is named with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subjattn.study.read import parse_as, read_raw
from subjattn.theory.config import TheoryConfig


def load_theory(path: str | Path, settings: Sequence[str] = ()) -> TheoryConfig:
    """Read a study of worlds and apply `key=value` settings, such as `replicates=3`.

    Raises:
        BadInput: no such file, no YAML, or fields with a wrong name or value; the message names each with its line.
    """
    return parse_as(TheoryConfig, *read_raw(path, settings))
