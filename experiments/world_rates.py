"""How often a whole study is wrong, and how often it finds what is there: hundreds of them in a world.

`python experiments/world_rates.py --workers 2` runs `world_placebo.yaml` under one seed after another, with two arms
drawn alike, and then with effects planted; a study's claims are one line of `runs/world_rates.jsonl`, so that a stopped
run goes on. When all are there it writes the table of docs/validation.md, and ends with an error where a claim is
surely called more often than 5 % without an effect. About 10 s a study.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
import validation_page as page
from rich.console import Console
from scipy.stats import binomtest

from subjattn.errors import StagesFailed
from subjattn.study.read import load_study
from subjattn.study.run import run_study


HERE = Path(__file__).parent
NOMINAL = 0.05

CONDITIONS: Mapping[str, tuple[int, int, list[str]]] = {
    "placebo": (1, 200, []),
    "shuffled answers": (1001, 100, ["arms.other.train=shuffled:random"]),
    "fewer steps": (2001, 100, ["arms.other.training.steps=12"]),
}
"""First seed, number of studies, and what is set."""


def study(condition: str, seed: int) -> list[dict[str, Any]]:
    """Run one study and say what became of its claims, or why there is none."""
    config = load_study(HERE / "world_placebo.yaml", [f"seed={seed}", *CONDITIONS[condition][2]])
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = run_study(config, Path(folder) / "run", Console(file=io.StringIO()), workers=1)
    except StagesFailed as error:  # such as few facts of a relation, all of one answer: nothing to shuffle
        return [{"condition": condition, "seed": seed, "refused": str(error)}]
    return [
        {"condition": condition, "seed": seed, "claim": claim["id"]}
        | {name: claim[name] for name in ("verdict", "estimate", "ci_low", "ci_high", "smallest_effect", "family")}
        for claim in found["claims"]
    ]


def share(hits: int, n: int) -> str:
    """In percent, with its Clopper–Pearson interval."""
    own = binomtest(hits, n).proportion_ci(0.95, "exact")
    return f"{100 * hits / n:.1f} [{100 * own.low:.1f}, {100 * own.high:.1f}]"


def wrong(rows: pd.DataFrame) -> list[str]:
    """Claims that are surely called one way or the other more often than they may be, with no effect there."""
    placebo = rows[rows["condition"] == "placebo"]
    return [
        str(claim)
        for claim, its in placebo.groupby("claim", sort=False)
        if binomtest(int(called(its).sum()), len(its)).proportion_ci(0.95, "exact").low > NOMINAL
    ]


def called(rows: pd.DataFrame) -> pd.Series:
    return rows["verdict"].isin(["supported", "contradicted"])


def table(rows: pd.DataFrame) -> list[str]:
    """Verdicts by condition and claim, and how often the interval holds the mean of all studies (of placebos: 0)."""
    lines = [
        "| condition | claim | studies | mean effect | least that matters | supported, % | contradicted, % | "
        "no effect that matters, % | interval without 0, % | interval without the mean, % |",
        "|" + "---|" * 10,
    ]
    for (condition, claim), its in rows.groupby(["condition", "claim"], sort=False):
        n, truth = len(its), 0.0 if condition == "placebo" else float(its["estimate"].mean())
        verdicts = [share(int((its["verdict"] == verdict).sum()), n) for verdict in ("supported", "contradicted")]
        none = share(int((its["verdict"] == "no effect that matters").sum()), n)
        zero, mean = (int(((its["ci_low"] > value) | (its["ci_high"] < value)).sum()) for value in (0.0, truth))
        lines.append(
            f"| {condition} | {claim} | {n} | {its['estimate'].mean():+.3f} | {its['smallest_effect'].iloc[0]:g} | "
            f"{' | '.join(verdicts)} | {none} | {share(zero, n)} | {share(mean, n)} |"
        )
    return lines


def rows_of(path: Path) -> pd.DataFrame:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return pd.DataFrame([row for line in lines for row in json.loads(line)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--studies", type=int, help="of each condition, in place of all")
    parser.add_argument("--out", type=Path, default=Path("runs/world_rates.jsonl"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(asked.out)
    done = set() if rows.empty else set(zip(rows["condition"], rows["seed"], strict=True))
    todo = [
        (condition, seed)
        for condition, (first, n, _) in CONDITIONS.items()
        for seed in range(first, first + (asked.studies or n))
        if (condition, seed) not in done
    ]
    with ProcessPoolExecutor(asked.workers) as pool, asked.out.open("a", encoding="utf-8") as file:
        for number, future in enumerate(as_completed([pool.submit(study, *each) for each in todo]), 1):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            print(f"{number} of {len(todo)}", file=sys.stderr, flush=True)
    rows = rows_of(asked.out)
    rows["condition"] = pd.Categorical(rows["condition"], list(CONDITIONS))
    rows = rows.sort_values(["condition", "seed"], kind="stable").astype({"condition": str})
    if "refused" in rows:
        print(rows["refused"].dropna().to_string(), file=sys.stderr)
        rows = rows[rows["refused"].isna()]
    lines = table(rows)
    print("\n".join(lines))
    if not asked.studies:
        page.write(**{"world rates": lines})
    if often := wrong(rows):
        sys.exit(f"called too often without an effect: {', '.join(often)}")


if __name__ == "__main__":
    main()
