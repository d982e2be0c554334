"""Relations far from the others by embedding, to test what was not trained (Gong et al. 2025)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from subjattn.errors import BadInput


def relation_distances(facts: pd.DataFrame, vectors: Float[np.ndarray, "fact d"]) -> pd.Series:
    """Cosine distance of each relation's mean vector from the mean of the other relations' mean vectors.

    Args:
        facts: a table of facts.
        vectors: one embedding per fact, such as those of `subjattn.measures.embeddings.prompt_embeddings`.

    Returns:
        0 (the same direction) to 2, by relation, the farthest first; equal distances by name.

    Raises:
        BadInput: fewer than two relations.
    """
    relations = sorted(facts["relation"].unique())
    if len(relations) < 2:
        raise BadInput(f"there is one relation, {relations[0]!r}: no other to be far from")
    of = facts["relation"].to_numpy()
    means = np.stack([vectors[of == relation].mean(0) for relation in relations]).astype(float)
    others = (means.sum(0) - means) / (len(relations) - 1)
    norms = np.linalg.norm(means, axis=1) * np.linalg.norm(others, axis=1)
    distances = 1 - (means * others).sum(1) / norms
    table = pd.DataFrame({"relation": relations, "distance": distances})
    table = table.sort_values(["distance", "relation"], ascending=[False, True])
    return table.set_index("relation")["distance"]
