"""What the measures say of models whose fault is known: measure × organism, written into docs/validation.md.

`python experiments/validate.py --seeds 3 --facts 40`. Organisms are planted with facts that the model knows, until it
has lost a fifth of them, and measured on others that it knows. Harmless updates are random ones, as large as the
faults' where that leaves accuracy within 2 points, else halved until it does; their range is what a measure says of
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.evidence.changes import judge_changes
from subjattn.evidence.diagnosis import ACCOUNTS, diagnose
from subjattn.measures.record import Quantity, measure_of
from subjattn.models import LoadedModel
from subjattn.organisms import Organism, damage_mlps, favour, look_away, random_update, shrink_values, untouched
from subjattn.prompts import Prompt, PromptSet


DOC = Path(__file__).parent.parent / "docs" / "validation.md"
TEMPLATE = "City: {subject}\nCountry:"
LOST, FELL, WITHIN = 0.2, 0.1, 0.02
"""Of the facts planted with, what is lost; of those held out, what has to be; and what a harmless update may lose."""
MEASURES: dict[str, dict[str, Any]] = {
    "accuracy": {},
    "answer_logprob": {},
    "attention_to_subject": {},
    "knockout": {},
    "subject_sensitivity": {},
    "head_contributions": {},
    "probe": {"folds": 3, "roles": "subject_last"},
    "hidden_knowledge": {"wrong": 4},
}
SHOWN = (
    "accuracy",
    "answer_logprob",
    "attention_max",
    "attention_without_sinks",
    "attention_over_its_place",
    "attention_value_weighted",
    "knockout_drop_total",
    "knockout_calibrated_total",
    "swap_distance",
    "swap_flips",
    "mlp_contribution",
    "probe_accuracy",
    "external_k",
    "external_k_prior",
    "internal_k",
)
WANTED = {*SHOWN, *(name for account in ACCOUNTS for sign in account.signs for name in sign.quantities)}


def known(model: LoadedModel, n: int) -> tuple[pd.DataFrame, list[Prompt]]:
    """Facts, and prompts of those that the model answers rightly."""
    facts = sa.load_facts("cities", n=n, seed=5)
    prompts = sa.make_prompts(facts, model.tokenizer, TEMPLATE)
    return facts, [one for one, right in zip(prompts, sa.predict(model, prompts)["correct"], strict=True) if right]


def accuracy(model: LoadedModel, prompts: Sequence[Prompt]) -> float:
    return float(sa.predict(model, prompts)["correct"].mean())


def faults(model: LoadedModel, prompts: Sequence[Prompt], seed: int) -> Iterator[tuple[str, Callable[[], Organism]]]:
    """Every fault at growing strengths, until enough is lost."""
    n_layers, n_heads = model.model.config.num_hidden_layers, model.model.config.num_key_value_heads
    looks = sa.subject_attention(model, prompts).mean("fact").values.reshape(n_layers, n_heads, -1).mean(-1)
    order = [(int(one) // n_heads, int(one) % n_heads) for one in np.argsort(-looks, axis=None)]
    shares = (0.3, 0.5, 0.7, 0.85, 1.0)
    answers = pd.Series({one.answers[0]: one.answer_ids[0] for one in prompts})
    token = int(answers.sort_index().iloc[np.random.default_rng(seed).integers(len(answers))])
    third = n_layers // 3
    grids: dict[str, list[Callable[[], Organism]]] = {
        "looks away": [partial(look_away, model, prompts, order[:n], 3.0) for n in (1, 2, 3, 4, 8, 16)],
        "values shrunk": [partial(shrink_values, model, prompts, range(third, n_layers), share) for share in shares],
        "MLPs damaged": [partial(damage_mlps, model, prompts, range(2 * third), share) for share in shares],
        "answer favoured": [partial(favour, model, token, size) for size in (3.0, 4.0, 5.0, 6.0, 8.0, 10.0)],
    }
    for name, grid in grids.items():
        yield name, partial(_enough, grid, prompts)


def _enough(grid: Sequence[Callable[[], Organism]], prompts: Sequence[Prompt]) -> Organism:
    for make in grid:
        made = make()
        if accuracy(made.model, prompts) <= 1 - LOST:
            break
    return made


def harmless(model: LoadedModel, prompts: Sequence[Prompt], norm: float, seed: int) -> Organism:
    """A random update of this norm, or of half of it, and so on, that leaves accuracy as it was."""
    while accuracy((made := random_update(model, norm, seed)).model, prompts) < 1 - WITHIN:
        norm /= 2
    return made


def values(model: LoadedModel, prompts: PromptSet, facts: pd.DataFrame) -> dict[str, tuple[Quantity, xr.DataArray]]:
    """Values per fact of all quantities that are no shares of others."""
    found = {}
    for name, settings in MEASURES.items():
        try:
            dataset = sa.measure(name, model, prompts, settings, facts=facts)
        except BadInput as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for quantity in measure_of(name).quantities:
            if quantity.name in WANTED and quantity.over is None:
                array = quantity.per_fact(dataset)
                if array.dims == ("fact",):
                    found[quantity.name] = quantity, array
    return found


def compared(organism: Organism, seed: int, base: Any, own: Any) -> list[dict[str, Any]]:
    """Differences from the base with their intervals and verdicts, and what is diagnosed from these."""
    intervals, same = {}, []
    for name, (quantity, array) in own.items():
        try:
            intervals[name] = sa.contrast(array, base[name][1], bounds=quantity.bounds)
        except BadInput as error:
            if array.equals(base[name][1]):  # to the last digit, so that there is no interval
                same.append(name)
            else:
                print(f"{organism.fault}: {name}: {error}", file=sys.stderr)
    judged = [name for name in intervals if own[name][0].smallest_effect is not None]
    changes = judge_changes([(intervals[name], float(own[name][0].smallest_effect)) for name in judged])
    verdicts = dict(zip(judged, (one.verdict for one in changes), strict=True))
    verdicts |= dict.fromkeys(same, "no change that matters")
    supported = [row["account"] for row in diagnose(verdicts) if row["status"] == "supported"]
    about = {
        "organism": organism.fault,
        "seed": seed,
        "places": json.dumps(organism.places),
        "strength": organism.strength,
        "norm": organism.norm,
        "diagnosis": ", ".join(supported) or "open",
    }
    rows = [about | {"quantity": name, "estimate": 0.0, "low": 0.0, "high": 0.0} for name in same]
    rows += [
        about | {"quantity": name, "estimate": one.estimate, "low": one.ci_low, "high": one.ci_high}
        for name, one in intervals.items()
    ]
    return [row | {"verdict": verdicts.get(row["quantity"], "")} for row in rows]


def run(n_facts: int, seeds: int, n_harmless: int, out: Path) -> None:
    """Measure all organisms, and write what there is after each."""
    model = sa.load_model("smollm2-135m")
    facts, prompts = known(model, 400)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(prompts))
        planted = [prompts[int(i)] for i in order[:30]]
        held = PromptSet("list", tuple(prompts[int(i)] for i in order[30 : 30 + n_facts]))
        base, norms = values(model, held, facts), []

        def add(organism: Organism, base: Any = base, seed: int = seed, held: PromptSet = held) -> None:
            start = time.monotonic()
            rows.extend(compared(organism, seed, base, values(organism.model, held, facts)))
            pd.DataFrame(rows).to_csv(out, index=False)
            print(f"seed {seed}: {organism}, {time.monotonic() - start:.0f} s", flush=True)

        for _, make in faults(model, planted, seed):
            organism = make()
            if organism.fault != "answer favoured":
                norms.append(organism.norm)
            add(organism)
        add(untouched(model, seed))
        for i in range(seed, n_harmless, seeds):
            add(harmless(model, planted, float(np.mean(norms)), i))


def table(rows: pd.DataFrame) -> list[str]:
    """Mean differences over seeds by organism, those outside the range of harmless updates in bold."""
    order = ["looks away", "values shrunk", "MLPs damaged", "answer favoured", "nothing"]
    organisms = [one for one in order if one in set(rows["organism"])]
    idle = rows[rows["organism"] == "random"].groupby("quantity")["estimate"].agg(["min", "max"])
    idle = pd.DataFrame({"min": idle["min"].clip(upper=0), "max": idle["max"].clip(lower=0)})
    lines = ["| quantity | " + " | ".join(organisms) + " | harmless |", "|---" * (len(organisms) + 2) + "|"]
    for name in SHOWN:
        cells = []
        for organism in organisms:
            its = rows[(rows["organism"] == organism) & (rows["quantity"] == name)]
            if its.empty or its["estimate"].isna().all():
                cells.append("not defined")
                continue
            low, high = idle.loc[name] if name in idle.index else (0.0, 0.0)
            found = int(((its["low"] > high) | (its["high"] < low)).sum())
            mean = f"{its['estimate'].mean():+.3f}"
            cells.append(f"**{mean}** ({found}/{len(its)})" if found else mean)
        band = f"{idle.loc[name, 'min']:+.3f} to {idle.loc[name, 'max']:+.3f}" if name in idle.index else ""
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {band} |")
    return lines


def planted(rows: pd.DataFrame) -> list[str]:
    """What was planted, what it cost, whether it counts, and what the diagnosis says of it."""
    lines = ["| organism | seed | strength | places | norm | accuracy | counts | diagnosis |", "|---" * 8 + "|"]
    for _, row in rows[rows["quantity"] == "accuracy"].iterrows():
        places = json.loads(row["places"])
        shown = f"{len(places)}" if len(places) > 3 else ", ".join(map(str, places)) or "none"
        counts = {"nothing": row["estimate"] == 0, "random": row["estimate"] >= -WITHIN}
        enough = counts.get(row["organism"], row["estimate"] <= -FELL)
        lines.append(
            f"| {row['organism']} | {row['seed']} | {row['strength']:.3g} | {shown} | {row['norm']:.1f} "
            f"| {row['estimate']:+.2f} | {'yes' if enough else 'no'} | {row['diagnosis']} |"
        )
    return lines


def write(name: str, lines: list[str]) -> None:
    """Put a table between its marks."""
    text = DOC.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, after = text.split(start)[0], text.split(end)[1]
    DOC.write_text(before + "\n".join([start, *lines, end]) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=40, help="held-out facts measured")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--harmless", type=int, default=10, help="random updates")
    parser.add_argument("--out", type=Path, default=Path("validation.csv"), help="numbers of every organism")
    parser.add_argument("--table", action="store_true", help="only write the tables of --out")
    asked = parser.parse_args()
    if not asked.table:
        run(asked.facts, asked.seeds, asked.harmless, asked.out)
    rows = pd.read_csv(asked.out)
    write("table", table(rows))
    write("planted", planted(rows))


if __name__ == "__main__":
    main()
