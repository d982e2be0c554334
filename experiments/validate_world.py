"""The diagnosis on another architecture than its rules were made on: organisms planted in `world:biographies`.

`python experiments/validate_world.py` plants faults in heads, layers and answers drawn anew, on facts that the model
knows, asks for the diagnosis on others, and writes the table of docs/validation.md: two minutes. Damage to MLPs is
not among them: the model reads names by attention alone, and loses nothing to it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import validation_page as page
from validate import ASKED, RIGHT, Grid, Sheet, accuracy, diagnosed, drawn, enough, harmless, parted

import subjattn as sa
from subjattn.models import LoadedModel
from subjattn.organisms import Organism, shrink_values
from subjattn.prompts import Prompt, PromptSet


WORLD, STYLE = "world:biographies", "cloze"
FIRST_SEED = 400


def grids(model: LoadedModel, prompts: list[Prompt], seed: int) -> dict[str, Grid]:
    """Every fault at growing strengths; values from the first layer on, which alone read names here."""
    rng, every = np.random.default_rng([seed, 15]), drawn(model, prompts, seed)
    layers, jitter = range(int(rng.integers(1, 5))), float(rng.uniform(0.9, 1))
    shares = [jitter * share for share in (0.45, 0.6, 0.7, 0.8, 0.9, 1.0)]
    values = [partial(shrink_values, model, prompts, layers, share) for share in shares]
    return {"looks away": every["looks away"], "values shrunk": values, "answer favoured": every["answer favoured"]}


def asked_of(base: LoadedModel, organism: Organism, others: PromptSet, seed: int, sheet: Sheet) -> None:
    held = others[: ASKED.get(organism.fault, 80)]
    fell = accuracy(organism.model, held) - 1
    row = {"quantity": "accuracy", "estimate": fell, "low": fell, "high": fell}
    sheet.add(organism, seed, iter([row, *diagnosed(base, organism, held)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/validate_world.csv"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    model, sheet = sa.load_model(WORLD), Sheet(given.out)
    prompts = sa.make_prompts(sa.load_facts(WORLD, n=800, seed=5), model.tokenizer, STYLE)
    right = sa.predict(model, prompts)["correct"]
    known = [prompt for prompt, own in zip(prompts, right, strict=True) if own]
    for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
        planted, others = parted(known, seed, len(known))
        made = [enough(grid, planted) for grid in grids(model, planted, seed).values()]
        made += [harmless(model, planted, one.norm, 2 * seed + i) for i, one in enumerate(made[:2])]
        for organism in made:
            asked_of(model, organism, others, seed, sheet)
    page.write(**{"diagnoses in a world": page.diagnoses(pd.read_csv(given.out), RIGHT)})


if __name__ == "__main__":
    main()
