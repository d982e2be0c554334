"""Stage `split`: test facts, demonstrations, and training facts of every arm and draw; table to table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.select import first_answers, set_aside, thirds_of
from subjattn.facts.shuffle import taught
from subjattn.facts.splits import facts_of, split
from subjattn.run.plan import Context
from subjattn.study.config import SplitConfig
from subjattn.study.files import training_file


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `facts.parquet` (all facts in use), `test.parquet`, `validation.parquet`, `shown.parquet`, and each arm's
    training facts.

    Of an arm with shuffled answers there are two files: what it is taught, and the same facts as they are.
    """
    pool = pd.read_parquet(inputs["pool"])
    scores = [pd.read_parquet(path) for role, path in sorted(inputs.items()) if role.startswith("scores")]
    if scores:
        by_id = pd.concat(scores).set_index("fact_id")
        pool = pool.assign(
            answer_logprob=by_id["answer_logprob"].reindex(pool["fact_id"]).to_numpy(),
            answer_logprob_template=by_id["template"].iloc[0] if len(by_id) else None,
        )
    distances = json.loads(inputs["relations"].read_text()) if "relations" in inputs else None
    table = made(pool, settings, distances)
    table.to_parquet(out / "facts.parquet", index=False)
    described = ["fact_id", "subject", "relation", "question", "answers", "choices", "answer", "third", "n_tokens"]
    kept = [name for name in (*described, "out_of_distribution", "popularity") if name in table]
    table[table["test"]][kept].to_parquet(out / "test.parquet", index=False)
    table[table["demonstration"]][kept].to_parquet(out / "shown.parquet", index=False)
    table[table["validation"]][kept].to_parquet(out / "validation.parquet", index=False)
    for spec, number in product(settings["specs"], range(settings["draws"])):
        own = training_facts(table, spec, number)[kept]
        own.to_parquet(out / training_file(facts_of(spec), number), index=False)
        if facts_of(spec) != spec:
            with naming_fields():
                shuffled = taught(own, spec, settings["seed"], number)
            shuffled.to_parquet(out / training_file(spec, number), index=False)


def training_facts(table: pd.DataFrame, spec: str, number: int) -> pd.DataFrame:
    """The facts of one draw of a specification, with their own answers."""
    return table[table[train_column(spec, number)]].sort_values("fact_id")


def train_column(spec: str, number: int) -> str:
    """The column that marks the facts of one draw of a specification."""
    return f"train_{spec}" if number == 0 else f"train_{spec}@{number}"


_SPLIT = ("by", "within", "match", "controlled", "held_out")
_FIELDS = {"n": "facts.n_test", "arms": "arms"} | {
    name: f"facts.{name}" for name in ("n_test", "n_train", "n_validation")
}
_FIELDS |= {"n_held_out": "facts.split.held_out.n_test"} | {name: f"facts.split.{name}" for name in _SPLIT}
"""Fields of a study by arguments of a split, so that an error names what the user can change."""


@contextmanager
def naming_fields() -> Iterator[None]:
    """Let errors of a split begin with the study's field."""
    try:
        yield
    except BadInput as error:
        if error.field not in _FIELDS:
            raise
        raise BadInput(f"{_FIELDS[error.field]}: {error}", field=_FIELDS[error.field]) from None


@naming_fields()
def made(pool: pd.DataFrame, settings: Mapping[str, Any], distances: Mapping[str, float] | None) -> pd.DataFrame:
    """Facts in use, with the columns that `facts.splits.split` adds, one per further draw, and `demonstration`.

    Args:
        pool: facts with all that ranks them.
        settings: `split` (a SplitConfig), `specs`, `n_train`, `n_test`, `n_validation`, `shots`, `draws`, `seed`.
        distances: of relations, the farthest first, where the split holds some out by it.

    Raises:
        BadInput: the facts do not give what is asked; the message says what is short.
    """
    chosen, seed = SplitConfig.model_validate(settings["split"]), settings["seed"]
    ranked: dict[str, Any] = {"by": chosen.by, "within": chosen.within, "controlled": chosen.controlled}
    shown = set_aside(pool, **ranked, shots=settings["shots"], seed=seed)
    left = pool[~shown]
    if settings["specs"]:
        table = _drawn(left, settings, chosen, _held_out(chosen, distances))
    else:
        table = left.assign(third=thirds_of(left, **ranked), answer=first_answers(left), out_of_distribution=False)
        table["test"] = table["fact_id"].isin(draw(table, settings["n_test"], seed)["fact_id"])
        table["validation"] = False
    used = [name for name in map(str, table) if name in ("test", "validation") or name.startswith("train_")]
    table = table[table[used].any(axis=1)].assign(demonstration=False)
    if shown.any():
        third = thirds_of(pool, **ranked)[shown]
        aside = pool[shown].assign(third=third, answer=first_answers(pool), out_of_distribution=False)
        aside = aside.assign(**dict.fromkeys(used, False), demonstration=True)
        table = pd.concat([table, aside], ignore_index=True)
    return table


def _drawn(facts: pd.DataFrame, settings: Mapping[str, Any], chosen: SplitConfig, held_out: list[str]) -> pd.DataFrame:
    """The split of every draw; test facts are the same in all."""
    tables = [
        split(
            facts,
            settings["specs"],
            settings["n_train"],
            settings["n_test"],
            by=chosen.by,
            within=chosen.within,
            match=chosen.match,
            controlled=chosen.controlled,
            held_out=held_out,
            n_held_out=chosen.held_out.n_test if chosen.held_out else 0,
            n_validation=settings["n_validation"],
            seed=settings["seed"],
            draw=number,
        )
        for number in range(settings["draws"])
    ]
    table = tables[0]
    for number, other in enumerate(tables[1:], 1):
        own = other.set_index("fact_id").reindex(table["fact_id"])
        for spec in settings["specs"]:
            table[train_column(spec, number)] = own[train_column(spec, 0)].to_numpy()
    return table


def _held_out(chosen: SplitConfig, distances: Mapping[str, float] | None) -> list[str]:
    held_out = chosen.held_out
    if held_out is None or held_out.relations or distances is None:
        return held_out.relations if held_out else []
    if held_out.farthest >= len(distances):
        raise BadInput(
            f"held_out.farthest={held_out.farthest} leaves none of the {len(distances)} relations to train on",
            field="held_out",
        )
    return list(distances)[: held_out.farthest]
