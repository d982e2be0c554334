"""Frequency Shock (Kazemi et al. 2023) where frequencies before and after are known.

`python experiments/world_shock.py` draws worlds anew and fine-tunes the model of each on facts whose answers are as
frequent as in its corpus, all alike, or turned round. It is asked all facts that are left; each answer's times given
over times right stand against the change of its frequency. Compared are plain fine-tuning, the corpus' own text
mixed in, the answers mixed with the base's (share chosen on validation facts), and both. Writes table and figure
of docs/theory.md from `runs/world_shock.csv`, which is made first where it is not there: half a minute a world.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from scipy import stats
from theory_page import DOC, put, table

import subjattn as sa
from subjattn.measures.poisson import poisson_slope
from subjattn.models.derived import mixed
from subjattn.worlds import world_of
from subjattn.worlds.sentences import said_in


ASKED = {"world:zipf-weak": "cloze", "world:zipf": "question"}
"""Of each kind of world the wording trained and asked in: its own, in which the weak one errs; or one it never saw."""
PER_ANSWER, JUDGED = 3, 2
"""Training facts an answer where all are alike, and validation facts of each."""
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BINS = (-12, -2, -1, -0.3, 0.3, 1, 2, 12)
DESIGNS = ("as said", "alike", "turned round")
TRAINING = {"weights": "full", "learning_rate": 1e-3, "batch_size": 32, "steps": 60}
TEXT = {"text_length": 5, "text_batch": 64, "texts": 20_000}
"""One sentence of the world a block, each."""


def facts_of(world: str, design: str, seed: int) -> dict[str, pd.DataFrame]:
    """Facts to train on, to choose by and to ask; each relation has as many in every design."""
    facts = sa.load_facts(world)
    facts = facts[facts["popularity"].notna()].assign(answer=lambda of: of["answers"].str[0])
    parts: dict[str, list[pd.DataFrame]] = {"train": [], "validation": [], "test": []}
    rng = np.random.default_rng(seed)
    for _, of in facts.groupby("relation"):
        counts = of["answer"].value_counts()
        total = PER_ANSWER * len(counts)
        want = {"as said": counts / len(of), "alike": counts * 0 + 1 / len(counts)}.get(design)
        if want is None:
            want = (1 / counts) / (1 / counts).sum()
        for answer, share in want.items():
            own = of[of["answer"] == answer].sample(frac=1, random_state=rng)
            n = min(round(float(share) * total), len(own) - JUDGED - 1)
            parts["train"].append(own[:n])
            parts["validation"].append(own[n : n + JUDGED])
            parts["test"].append(own[n + JUDGED :])
    return {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}


def changes(world: str, train: pd.DataFrame) -> pd.Series:
    """Of each relation's answer, log2 of its share of the training facts over its share of the corpus' sentences."""
    said = sa.load_facts(world).assign(answer=lambda of: of["answers"].str[0]).fillna({"popularity": 0.0})
    before = said.groupby(["relation", "answer"])["popularity"].sum()
    after = train.groupby(["relation", "answer"]).size().reindex(before.index, fill_value=0) + 0.5
    shares = [of / of.groupby("relation").transform("sum") for of in (after, before)]
    return np.log2(shares[0] / shares[1])


def asked(
    model: Any, tokenizer: Any, facts: dict[str, pd.DataFrame], style: str, change: pd.Series
) -> list[dict[str, Any]]:
    """Every answer's times given and times right among the test facts, by relation."""
    prompts = sa.make_prompts(facts["test"], tokenizer, style)
    found = sa.predict(model, prompts)
    given = found["prediction"].str.split().str[0].fillna("")
    test = facts["test"].assign(given=given.to_numpy(), correct=found["correct"].to_numpy())
    rows = []
    for (relation, answer), of in test.groupby(["relation", "answer"]):
        own = test["relation"] == relation
        rows.append(
            {
                "relation": relation,
                "answer": answer,
                "change": change[relation, answer],
                "right": len(of),
                "given": int((test.loc[own, "given"] == answer).sum()),
                "correct": int(of["correct"].sum()),
            }
        )
    return rows


def chosen(tuned: Any, base: Any, facts: dict[str, pd.DataFrame], style: str) -> tuple[Any, float]:
    """The mixture that answers most validation facts, of equal ones the one nearest to a half."""
    prompts = sa.make_prompts(facts["validation"], base.tokenizer, style)
    scores = {weight: sa.predict(mixed(tuned, base, weight), prompts)["correct"].mean() for weight in WEIGHTS}
    weight = max(scores, key=lambda weight: (scores[weight], -abs(weight - 0.5)))
    return mixed(tuned, base, weight), weight


def of_world(kind: str, seed: int) -> list[dict[str, Any]]:
    """All designs and arms of one world."""
    rows, world, style = [], f"{kind}@{seed}", ASKED[kind]
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus.txt"
        corpus.write_text("\n\n".join(f"{prompt} {answer}" for prompt, answer in said_in(world_of(world)).sentences))
        base = sa.load_model(world)
        for design in DESIGNS:
            facts = facts_of(world, design, seed)
            change = changes(world, facts["train"])
            models = {"base": (base, 0.0)}
            for name, method in (("tuned", "sft"), ("mixture", "mixture")):
                own = TRAINING | (TEXT | {"text": str(corpus)} if method == "mixture" else {})
                out = sa.fine_tune(
                    world, facts["train"], Path(place) / design / name, style=style, method=method, seed=seed, **own
                )
                models[name] = (sa.load_model(str(out)), 1.0)
                models[f"{name}, mixed"] = chosen(models[name][0], base, facts, style)
            for arm, (model, weight) in models.items():
                about = {"world": kind, "seed": seed, "design": design, "arm": arm, "weight": weight}
                rows += [about | row for row in asked(model, base.tokenizer, facts, style, change)]
    return rows


def slopes(counts: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and the measure's slope, of each model: below 0, what became more frequent is given too often."""
    rows = []
    for keys, of in counts.groupby(["world", "design", "arm", "seed"], sort=False):
        before_over_after = -np.log(2) * of["change"].to_numpy()
        found = poisson_slope(*of[["given", "right"]].to_numpy(float).T, before_over_after, of["relation"].to_numpy())
        slope = np.nan if isinstance(found, str) else found.slope
        rows.append([*keys, slope, of["correct"].sum() / of["right"].sum(), of["weight"].iloc[0]])
    return pd.DataFrame(rows, columns=["world", "design", "arm", "seed", "slope", "accuracy", "weight"])


def with_interval(values: pd.Series, most: float = np.inf) -> str:
    """Mean over worlds, with its 95 % t interval, cut off where no value can be."""
    low, high = interval(values.to_numpy())
    return f"{values.mean():+.2f} [{low:+.2f}, {min(high, most):+.2f}]"


def interval(values: np.ndarray) -> tuple[float, float]:
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(values.mean() - half), float(values.mean() + half)


def by_model(counts: pd.DataFrame) -> str:
    rows = []
    for (world, design, arm), of in slopes(counts).groupby(["world", "design", "arm"], sort=False):
        slope = with_interval(of["slope"]) if of["slope"].notna().all() else "not defined"
        weight = f"{of['weight'].mean():.2f}" if "mixed" in arm else ""
        accuracy = with_interval(of["accuracy"], most=1.0).replace("+", "")
        rows.append([f"{world}, {ASKED[world]}", design, arm, accuracy, slope, weight])
    return table(["world, asked in", "tuning's frequencies", "", "accuracy", "shock slope", "share of the tuned"], rows)


def plot(counts: pd.DataFrame) -> go.Figure:
    """Times given over times right by the change of an answer's frequency, means over worlds with 95 % intervals."""
    titles = [f"{world}: {design}" for world in ASKED for design in DESIGNS]
    figure = make_subplots(
        len(ASKED), len(DESIGNS), shared_xaxes=True, shared_yaxes=True, subplot_titles=titles, vertical_spacing=0.12
    )
    for (row, world), (column, design) in product(enumerate(ASKED, 1), enumerate(DESIGNS, 1)):
        own = counts[(counts["world"] == world) & (counts["design"] == design)]
        for number, (arm, of) in enumerate(own.groupby("arm", sort=False)):
            if arm == "base" and ASKED[world] != "cloze":
                continue  # it hardly answers
            at = ratios(of)
            figure.add_scatter(
                x=at["change"] + 0.08 * (number - 2),
                y=at["mean"],
                error_y={"array": at["high"] - at["mean"], "thickness": 1, "width": 0},
                name=str(arm),
                legendgroup=str(arm),
                showlegend=(row, column) == (1, 1),
                mode="lines+markers",
                line={"color": qualitative.D3[number], "width": 1.5},
                marker={"size": 5},
                row=row,
                col=column,
            )
    figure.update_yaxes(range=[-3, 2], zeroline=True, zerolinecolor="#999")
    figure.update_yaxes(title_text="log2 given / right", col=1)
    figure.update_xaxes(title_text="log2 change of the answer's frequency", row=len(ASKED))
    figure.update_annotations(font_size=12)
    figure.update_layout(template="plotly_white", width=1050, height=640, legend={"orientation": "h", "y": 1.12})
    return figure


def ratios(counts: pd.DataFrame) -> pd.DataFrame:
    """By bins of the change that two worlds have: mean `change`, `mean` of log2 given / right, and its `high` end."""
    binned = counts.assign(bin=pd.cut(counts["change"], BINS, labels=False)).groupby(["bin", "seed"])
    each = binned.agg(given=("given", "sum"), right=("right", "sum"), change=("change", "mean"))
    each["log"] = np.log2((each["given"] + 0.5) / (each["right"] + 0.5))
    rows = [
        {"change": of["change"].mean(), "mean": of["log"].mean(), "high": interval(of["log"].to_numpy())[1]}
        for _, of in each.groupby("bin")
        if len(of) > 1
    ]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/world_shock.csv"))
    asked_for = parser.parse_args()
    if not asked_for.out.is_file():
        rows = []
        for kind, seed in product(ASKED, range(1, asked_for.worlds + 1)):
            rows += of_world(kind, seed)
            print(f"{kind}@{seed} of {asked_for.worlds}", file=sys.stderr, flush=True)
        asked_for.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(asked_for.out, index=False)
    counts = pd.read_csv(asked_for.out)
    put({"frequency shock": by_model(counts)})
    plot(counts).write_image(DOC.with_name("theory-shock.png"), scale=1.5)


if __name__ == "__main__":
    main()
