"""Pairs of prompts for patching: those between known facts first, and afterwards those in which there was something.

Patching asks how an answer that is known comes about. A pair with a fact that the model gets wrong says little of
that, and where the swap hardly moves the answer a share of what it destroyed is noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.measures.patching import destroyed
from subjattn.prompts import Prompt, swap_subjects


def choose_pairs(
    prompts: Sequence[Prompt], known: set[str], n: int, rng: np.random.Generator
) -> tuple[list[tuple[Prompt, Prompt]], pd.DataFrame]:
    """Up to `n` subject swaps, at random, those between two known facts first.

    The choice does not depend on the order of prompts. Each fact is clean at most once.

    Args:
        prompts: facts asked in one style.
        known: ids of the facts that count as known.
        n: pairs at most.
        rng: of the choice.

    Returns:
        The pairs `(clean, corrupt)`, and a table with a row for each: `clean`, `corrupt` (fact ids) and `known`
        (whether both are). No pairs where no two prompts can be swapped.

    Raises:
        BadInput: `n` is below 1.
    """
    if n < 1:
        raise BadInput(f"n={n} pairs are none: ask for at least 1")
    ordered = sorted(prompts, key=lambda prompt: prompt.fact_id)
    shuffled = [ordered[int(i)] for i in rng.permutation(len(ordered))]
    pairs = swap_subjects([prompt for prompt in shuffled if prompt.fact_id in known], rng)[:n]
    taken = {clean.fact_id for clean, _ in pairs}
    others = [pair for pair in swap_subjects(shuffled, rng) if pair[0].fact_id not in taken]
    pairs += others[: n - len(pairs)]
    rows = [(clean.fact_id, corrupt.fact_id, {clean.fact_id, corrupt.fact_id} <= known) for clean, corrupt in pairs]
    return pairs, pd.DataFrame(rows, columns=["clean", "corrupt", "known"]).astype({"known": bool})


def keep_pairs(effect: xr.DataArray, floor: float) -> xr.DataArray:
    """Of a `patch_grid`, the pairs whose clean run differs from the corrupt one by at least `floor`; NaN elsewhere.

    Args:
        effect: `(fact, …)` of `logit_diff` (logits) or `answer_logprob` (nats).
        floor: smallest difference, clean minus corrupt, in the array's unit.

    Returns:
        The array with a coordinate `kept` `(fact,)`; facts stay where they are, so that arms which keep other pairs
        still stand side by side.

    Raises:
        BadInput: an array that holds no change, or a floor that is no number.
    """
    if not np.isfinite(floor):
        raise BadInput(
            f"floor={floor} is no number: give the smallest difference that counts, in {effect.attrs['unit']}"
        )
    kept = (destroyed(effect) >= floor).values
    return effect.where(xr.DataArray(kept, dims="fact")).assign_coords(kept=("fact", kept))
