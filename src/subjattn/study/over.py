"""Quantities over training: each arm's, at every step whose weights were kept, with its interval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from subjattn.run.folder import Folder
from subjattn.study.config import StudyConfig
from subjattn.study.terms import Terms, or_reason
from subjattn.study.values import Values, collect_over_training


def over_training(config: StudyConfig, folder: Folder, facts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A row for each arm, quantity and step: its mean and interval over facts and replicates.

    Steps that not every replicate has kept (the last of runs that stop by themselves) are left out.
    """
    table = collect_over_training(config, folder)
    table = table[~table["out_of_distribution"].astype(bool)]
    for (arm, style), own in table.groupby(["arm", "style"], sort=False):
        n_replicates = len(config.replicates_of(str(arm)))
        kept = own[["draw", "seed", "step"]].drop_duplicates().groupby("step").size()
        for step in sorted(kept.index[kept == n_replicates]):
            at = own[own["step"] == step]
            terms = Terms(config, folder, Values(at), facts)
            for quantity, part in at[["quantity", "part"]].drop_duplicates().itertuples(index=False):
                tested, _ = or_reason(terms.arm, f"{quantity}.{part}" if part else quantity, str(arm), str(style))
                if tested is not None:
                    low, high = tested.interval.ends()
                    yield {
                        "arm": arm,
                        "style": style,
                        "measure": f"{quantity}.{part}" if part else quantity,
                        "step": int(step),
                        "estimate": tested.interval.estimate,
                        "ci_low": low,
                        "ci_high": high,
                        "n_replicates": tested.interval.n_replicates,
                    }
