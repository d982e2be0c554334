"""Fig. 2 of Ghosal et al. (2024) in language models: gaps by popularity's exponent and by the length of pre-training.

`python experiments/world_curves.py` trains small Llamas on worlds drawn anew, fine-tunes each on the known facts that
its corpus says most or least (halves within relation and answer), in a wording that the corpus never has, and asks
known facts of other subjects. Every world is a replicate. Writes the table of docs/theory.md from
`runs/world_curves.csv`; a cell that is there is not made again, so that a stopped run goes on. About half an hour.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from theory_page import put, table
from world_shock import interval

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts.splits import split
from subjattn.worlds import KNOWLEDGE, WORLDS, InventedWorld
from subjattn.worlds.build import build


CELLS = [
    *(("zipf", alpha, steps) for alpha, steps in product((0.1, 1.0, 2.0), (100, 150, 250, 500))),
    *(("biographies", 1.0, steps) for steps in (300, 600)),
]
"""Kind of world, exponent, steps of pre-training."""
ARMS = ("top", "bottom")
N_TEST, MOST = (120, 60, 30), 160
"""Test facts, the first number for which there are known ones; and training facts of an arm at most."""
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"weights": "full", "learning_rate": 1e-3, "batch_size": 32, "steps": 60},
    "blocks": {"lora_rank": 64, "lora_alpha": 64, "learning_rate": 4e-3, "batch_size": 32, "steps": 200},
}
"""Of fine-tuning; `blocks` trains matrices of attention and MLPs, and no embedding, so that the prompt's own word stays
as nobody ever trained it."""
COLUMNS = ["kind", "zipf", "steps", "seed", "recall", "n", "way", "arm", "accuracy", "attention"]


def of_world(world: InventedWorld, seed: int, place: Path) -> list[dict[str, Any]]:
    """Both arms of one world; none where it has too few known facts."""
    about = build(world, place / "base")
    known = pd.read_parquet(place / "base" / KNOWLEDGE).query("category == 'HighlyKnown' and popularity == popularity")
    cell = {"kind": world.kind, "zipf": world.zipf, "steps": world.steps, "seed": seed, "recall": about["recall"]}
    facts = None
    for n_test in N_TEST:
        with suppress(BadInput):
            facts = split(known, ARMS, None, n_test, match=["relation"], seed=seed)
            break
    if facts is None:
        return [cell | {"n": 0, "way": way, "arm": "", "accuracy": None, "attention": None} for way in WAYS]
    test, rows = facts[facts["test"]], []
    for (way, how), arm in product(WAYS.items(), ARMS):
        taught = facts[facts[f"train_{arm}"]]
        if len(taught) > MOST:
            taught = taught.sample(MOST, random_state=seed)
        base = str(place / "base")
        out = str(sa.fine_tune(base, taught, place / way / arm, style="question", seed=seed, **how))
        model = sa.load_model(out) if how.get("weights") == "full" else sa.load_model(base, adapter=out)
        prompts = sa.make_prompts(test, model.tokenizer, "question")
        found = sa.predict(model, prompts)
        rows.append(
            cell
            | {
                "n": len(taught),
                "way": way,
                "arm": arm,
                "accuracy": found["correct"].mean(),
                "attention": float(sa.subject_attention(model, prompts).mean()),
            }
        )
    return rows


def gaps(values: pd.DataFrame) -> str:
    """Top minus bottom, means over worlds with t intervals."""
    rows = []
    for (way, kind, zipf, steps), of in values.groupby(["way", "kind", "zipf", "steps"], sort=False):
        arms = of[of["arm"] != ""].pivot_table(index="seed", columns="arm", values=["accuracy", "attention"])
        cells = ["too few known facts"] * 2
        if len(arms) > 1:
            cells = [shown(arms[name]["top"] - arms[name]["bottom"]) for name in ("accuracy", "attention")]
        each = of.drop_duplicates("seed")
        right = [f"{arms['accuracy'][arm].mean():.2f}" if len(arms) else "" for arm in ARMS]
        cell = [way, kind, f"{zipf:g}", str(steps), f"{each['recall'].mean():.2f}", f"{each['n'].mean():.0f}"]
        rows.append([*cell, *right, *cells, str(len(arms))])
    about = ["trained", "world", "α", "steps", "recall", "facts an arm"]
    return table([*about, *ARMS, "accuracy gap", "attention gap", "worlds"], rows)


def shown(gap: pd.Series) -> str:
    low, high = interval(gap.to_numpy())
    text = f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/world_curves.csv"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    if not asked.out.is_file():
        pd.DataFrame(columns=COLUMNS).to_csv(asked.out, index=False)
    there = pd.read_csv(asked.out)
    done = {*zip(there["kind"], there["zipf"], there["steps"], there["seed"], strict=True)}
    for seed, (kind, alpha, steps) in product(range(1, asked.worlds + 1), CELLS):
        if (kind, alpha, steps, seed) not in done:
            world = replace(WORLDS[kind], zipf=alpha, steps=steps, recall=None, seed=seed)
            with tempfile.TemporaryDirectory() as place:
                rows = of_world(world, seed, Path(place))
            pd.DataFrame(rows, columns=COLUMNS).to_csv(asked.out, mode="a", header=False, index=False)
            print(f"{kind}, α {alpha:g}, {steps} steps, world {seed}", file=sys.stderr, flush=True)
    values = pd.read_csv(asked.out).fillna({"arm": ""})
    order = {cell: number for number, cell in enumerate(CELLS)}
    keys = [order[cell] for cell in zip(values["kind"], values["zipf"], values["steps"], strict=True)]
    put({"world curves": gaps(values.assign(_order=keys).sort_values(["way", "_order", "seed"]))})


if __name__ == "__main__":
    main()
