"""Tables of docs/theory.md from the studies of language models in worlds, and from those of the graph account.

subjattn run experiments/world_zipf.yaml     # and its other three worlds, and gong_graph.yaml, as the page says
python experiments/world_page.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from theory_page import put, table
from world_shock import interval

import subjattn as sa
from subjattn.study.files import Run


RUNS = Path("runs")
WORLDS = ("zipf", "zipf-weak", "biographies", "biographies-weak")
MORE = (1, 2, 3, 4)
"""Numbers of further worlds of the weak kinds."""
STYLE = "question"
QUANTITIES = {
    "accuracy": "accuracy",
    "answer_logprob": "log-probability of the answer",
    "attention_to_subject": "attention to the subject",
    "attention_without_sinks": "— without sinks",
    "attention_over_its_place": "— over its place's",
    "knockout_drop_total": "knock-out of the subject, nats",
    "knockout_calibrated_total": "— at each arm's own temperature",
    "knockout_lost": "— right answers lost",
    "swap_distance": "answers move with another name",
    "mask_distance": "— without the name",
    "detached_errors": "errors given without the name too",
    "external_k": "answers preferred when asked (K)",
    "internal_k": "answers told apart inside (K)",
    "hidden": "hidden: inside minus asked",
    "update_share.qk": "answer carried by the update of Q, K",
    "update_share.vo": "— of V, O",
    "update_share.mlp": "— of MLPs",
    "frequency_shock": "shock slope",
}
GRAPHS = {
    "gong_graph": "SmolLM2, cities",
    "gong_graph_zipf_weak": "`world:zipf-weak`",
    "gong_graph_biographies_weak": "`world:biographies-weak`",
}


def run_of(name: str) -> Run:
    return sa.open_run(RUNS / name.replace("-", "_"))


def arms(runs: dict[str, Run]) -> str:
    """Accuracy of every arm in the wording that the corpus never has."""
    names = list(next(iter(runs.values())).arms)
    rows = []
    for world, run in runs.items():
        own = {arm: run.summary["arms"][arm]["styles"] for arm in names}
        cells = [f"{own[arm][STYLE]['accuracy']:.3f}" for arm in names]
        rows.append([f"`world:{world}`", f"{own['base']['cloze']['accuracy']:.3f}", *cells])
    return table(["world", "base, asked as in the corpus", *names], rows)


def differences(runs: dict[str, Run]) -> str:
    """Bottom minus top, of every measure; bold where the interval leaves out 0."""
    rows = []
    for quantity, words in QUANTITIES.items():
        found = [contrast(run, quantity) for run in runs.values()]
        rows.append([words, *(shown(row["estimate"], row["ci_low"], row["ci_high"]) for row in found)])
    return table(["training on facts said least, against most", *(f"`world:{world}`" for world in runs)], rows)


def across_worlds(runs: dict[str, list[Run]]) -> str:
    """Bottom minus top again, of worlds drawn anew: the mean of the worlds' differences, its t interval over worlds."""
    rows = []
    for quantity, words in QUANTITIES.items():
        cells = []
        for own in runs.values():
            each = [contrast(run, quantity)["estimate"] for run in own]
            known = np.array([one for one in each if one is not None], float)
            ends = interval(known) if len(known) > 2 else (None, None)
            cells.append(shown(known.mean() if len(known) else None, *ends))
        rows.append([words, *cells])
    singles = [", ".join(f"{contrast(run, 'accuracy')['estimate']:+.3f}" for run in own) for own in runs.values()]
    rows.insert(1, ["— world by world", *singles])
    return table(["", *(f"`world:{world}`, {len(own)} worlds" for world, own in runs.items())], rows)


def contrast(run: Run, quantity: str) -> dict[str, Any]:
    for row in run.summary["contrasts"]:
        if (row["measure"], row["arm_a"], row["arm_b"], row["style"]) == (quantity, "bottom", "top", STYLE):
            return dict(row)
    return dict.fromkeys(("estimate", "ci_low", "ci_high"))


def shown(estimate: float | None, low: float | None, high: float | None) -> str:
    if estimate is None or low is None or high is None:
        return "not defined"
    digits = 3 if max(abs(estimate), abs(low), abs(high)) < 1 else 2
    text = f"{estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def claims(runs: dict[str, Run]) -> str:
    rows = []
    for world, run in runs.items():
        own = {claim["id"]: claim["verdict"] for claim in run.summary["claims"]}
        rows.append([f"`world:{world}`", *own.values()])
    return table(["verdict", *own], rows)


def graph(runs: dict[str, Run]) -> tuple[str, str]:
    """Rank correlations of predictor and outcome, over arms and sets of demonstrations; and how often they tell."""
    rows, answers = [], []
    for title, run in runs.items():
        facts, judged = sa.graph_account(run)
        mean = facts.groupby("arm", sort=False)[["before", "after"]].mean()
        answers += [[title, arm, f"{of['before']:.3f}", f"{of['after']:.3f}"] for arm, of in mean.iterrows()]
        for (arm, outcome), of in judged.groupby(["arm", "outcome"], sort=False):
            cells = [correlations(of[of["predictor"] == name]) for name in of["predictor"].unique()]
            rows.append([title, arm, {"rescued": "rescued", "logprob_gain": "log-probability"}[outcome], *cells])
    head = ["model", "arm", "gain", "graph", "graph of training alone", "similarity", "popularity"]
    return table(head, rows), table(["model", "arm", "right, bare", "right, behind demonstrations"], answers)


def correlations(of: pd.DataFrame) -> str:
    """Their range over sets of demonstrations, and how many of them have an interval without 0, to either side."""
    own = of.dropna(subset="rho")
    if own.empty:
        return "not defined"
    up, down = int((own["low"] > 0).sum()), int((own["high"] < 0).sum())
    tells = ", ".join(f"{n} {word}" for n, word in ((up, "above 0"), (down, "below")) if n)
    return f"{own['rho'].min():+.2f} to {own['rho'].max():+.2f}" + (f" ({tells})" if tells else "")


def main() -> None:
    runs = {world: run_of(f"world_{world}") for world in WORLDS}
    several = {
        world: [runs[world], *(run_of(f"world_{world}_{number}") for number in MORE)]
        for world in WORLDS
        if "weak" in world
    }
    account, answers = graph({title: run_of(name) for name, title in GRAPHS.items()})
    put(
        {
            "world arms": arms(runs),
            "world differences": differences(runs),
            "world claims": claims(runs),
            "several worlds": across_worlds(several),
            "graph account": account,
            "graph answers": answers,
        }
    )


if __name__ == "__main__":
    main()
