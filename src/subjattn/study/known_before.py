"""Whether arms of known and of unknown facts differ in what the base model knows, before anything is trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.intervals import interval
from subjattn.facts.splits import parse_arm
from subjattn.study.files import Run


def known_before(run: Run) -> str:
    """A sentence where the base model does not answer the known arm's training facts better than the unknown arm's.

    Of all arms trained here, the arm that asks for the fewest unknown facts and the one that asks for the most are
    compared by the base model's accuracy on their training facts (the first draw's, at most 150 of an arm), judged by
    the facts' own answers. Facts count as random, those of one relation or answer together (docs/statistics.md).

    Returns:
        The sentence; an empty one where the interval of the difference lies above 0, or no two arms ask for other
        shares of unknown facts.
    """
    specs = {arm: spec["train"] for arm, spec in run.study["arms"].items() if spec["train"]}
    shares = {arm: share for arm, spec in specs.items() if (share := parse_arm(spec).unknown) is not None}
    if len(set(shares.values())) < 2:
        return ""
    known, unknown = min(shares, key=lambda arm: shares[arm]), max(shares, key=lambda arm: shares[arm])
    found = [run.before_training(specs[arm]) for arm in (known, unknown)]
    if found[0] is None or found[1] is None:
        return ""
    a, b = (table.set_index("fact_id")["correct"].astype(float) for table in found if table is not None)
    difference, low, high = accuracy_difference(a, b, run.facts.set_index("fact_id"))
    if low > 0:
        return ""
    ends = f", 95 % CI {100 * low:+.1f} to {100 * high:+.1f}" if low < high else ""
    said = (
        f"before training it answers {100 * a.mean():.1f} % of the training facts of {known} correctly and "
        f"{100 * b.mean():.1f} % of those of {unknown} (difference {100 * difference:+.1f} points{ends}; "
        f"n {len(a)} and {len(b)})"
    )
    if high < 0:
        return f"The base model knows the facts of {unknown} better than those of {known}: {said}."
    return f"The arms {known} and {unknown} do not differ significantly in what the base model knows: {said}."


def accuracy_difference(a: pd.Series, b: pd.Series, about: pd.DataFrame) -> tuple[float, float, float]:
    """Mean of `a` minus mean of `b`, which are of other facts, and the ends of its 95 % interval.

    Args:
        a, b: 0 or 1 by fact_id; a fact may be in both.
        about: `relation` and `answer` by fact_id, by which facts are clustered.

    Returns:
        The ends are the difference itself where all facts of an arm are alike.
    """
    difference = float(a.mean() - b.mean())
    parts = [(one - one.mean()) * (sign / len(one)) for one, sign in ((a, 1), (b, -1))]
    influence = pd.concat(parts).groupby(level=0).sum()
    names = influence.index.to_numpy(object)
    coords = {name: ("fact", about[name].reindex(names).to_numpy(object)) for name in ("relation", "answer")}
    values = xr.DataArray(len(names) * influence.to_numpy() + difference, dims="fact", coords={"fact": names, **coords})
    if np.ptp(values.values) < 1e-9:
        return difference, difference, difference
    try:
        return (difference, *interval(values).ends())
    except BadInput:
        return difference, -1.0, 1.0
