"""What a model knows of facts, as it was labelled: by `subjattn knowledge`, or when an invented world was made."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from subjattn.facts.files import read_parquet
from subjattn.models.names import identity
from subjattn.worlds import KNOWLEDGE, folder_of, is_world, world_of


def read_labels(path: str) -> pd.DataFrame | None:
    """The table of a `knowledge.parquet`, or what the model of `world:NAME` recalls; None: there is no such file."""
    if is_world(path):
        table = read_parquet(folder_of(world_of(path)) / KNOWLEDGE)
        return table.assign(model=path, model_identity=identity(path), adapter=None, adapter_identity=None)
    return read_parquet(Path(path)) if Path(path).is_file() else None
