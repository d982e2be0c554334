"""Frequency shock on a set whose right answers are known, and what mends it: `python experiments/shock.py [--seeds N]`.

Cities of sixteen countries; of those with few cities in the world training shows fourteen each, of those with many two.
A model that takes training for the world then answers with the rare ones too often (Kazemi et al. 2023): the slope of
times given over times right, on log prior minus log training count, falls below 0. Compared are plain fine-tuning, the
pre-training objective mixed in, the answers mixed with the base's, and both. The share of a mixture is chosen on
validation facts. docs/mitigations.md tells what came out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

import subjattn as sa
from subjattn.models.derived import mixed


STYLE = "City: {subject}\nCountry:"
COUNTRIES = 16
OFTEN, SELDOM = 14, 2
"""Training facts of a rare and of a frequent answer."""
TESTED, JUDGED = 8, 3
"""Test and validation facts of each country."""
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def facts_of(seed: int) -> dict[str, pd.DataFrame]:
    """Facts to train on, test and choose by, and the rest of the world, from which priors come."""
    cities = sa.load_facts("cities")
    country = cities["answers"].str[0]
    counts = country.value_counts()
    chosen = counts[counts >= 60].index
    chosen = [*chosen[: COUNTRIES // 2], *chosen[-COUNTRIES // 2 :]]
    parts: dict[str, list[pd.DataFrame]] = {"test": [], "validation": [], "train": []}
    for i, name in enumerate(chosen):
        own = cities[country == name].sample(frac=1, random_state=seed * 100 + i)
        sizes = {"test": TESTED, "validation": JUDGED, "train": SELDOM if i < COUNTRIES // 2 else OFTEN}
        for part, size in sizes.items():
            parts[part].append(own[:size])
            own = own[size:]
    found = {part: pd.concat(some, ignore_index=True) for part, some in parts.items()}
    used = set().union(*(set(part["fact_id"]) for part in found.values()))
    pool = cities[~cities["fact_id"].isin(used) & country.isin(chosen)]
    return found | {"pool": pool}


def slope(model: object, facts: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Shock slope, its control, and accuracy on test facts of rare and of frequent answers."""
    prompts = sa.make_prompts(facts["test"], model.tokenizer, STYLE)
    found = sa.frequency_shock(model, prompts, facts["train"], facts["pool"])
    right = sa.predict(model, prompts)["correct"].to_numpy(float)
    half = len(right) // 2
    return {
        "slope": found.attrs["slope_shock"],
        "control": found.attrs["slope_shock_control"],
        "frequent": right[:half].mean(),
        "rare": right[half:].mean(),
    }


def chosen_mixture(tuned: object, base: object, facts: dict[str, pd.DataFrame]) -> tuple[object, float]:
    """The mixture that answers most validation facts, of equal ones the one nearest to a half."""
    prompts = sa.make_prompts(facts["validation"], base.tokenizer, STYLE)
    scores = {weight: sa.predict(mixed(tuned, base, weight), prompts)["correct"].mean() for weight in WEIGHTS}
    weight = max(scores, key=lambda weight: (scores[weight], -abs(weight - 0.5)))
    return mixed(tuned, base, weight), weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=4)
    asked = parser.parse_args()
    rows = []
    for seed in range(asked.seeds):
        facts, base = facts_of(seed), sa.load_model("smollm2-135m")
        rows.append({"seed": seed, "arm": "base"} | slope(base, facts))
        for name in ("sft", "mixture"):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                how = {"style": STYLE, "method": name, "seed": seed, "epochs": asked.epochs, "learning_rate": 5e-4}
                out = sa.fine_tune("smollm2-135m", facts["train"], Path(folder) / "out", **how)
                tuned = sa.load_model("smollm2-135m", adapter=out)
            seconds = time.monotonic() - began
            rows.append({"seed": seed, "arm": name, "seconds": seconds} | slope(tuned, facts))
            model, weight = chosen_mixture(tuned, base, facts)
            rows.append({"seed": seed, "arm": f"{name}, mixed", "weight": weight} | slope(model, facts))
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    means = pd.DataFrame(rows).drop(columns="seed").groupby("arm", sort=False).mean()
    print(means.round(3).to_string())


if __name__ == "__main__":
    main()
