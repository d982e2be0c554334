"""One measure of one model, without a study: what `subjattn measure` does, as a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import ValidationError

from subjattn.errors import BadInput
from subjattn.measures.answers import predict
from subjattn.measures.pairs import choose_pairs
from subjattn.measures.record import Asked, measure_of
from subjattn.measures.where import check_where
from subjattn.measures.where import where as facts_where
from subjattn.models.arms import Arms


if TYPE_CHECKING:
    from subjattn.backends import Backend, BackendName
    from subjattn.models import LoadedModel
    from subjattn.prompts import PromptSet


def measure(
    name: str,
    model: LoadedModel | Arms,
    prompts: PromptSet,
    settings: Mapping[str, Any] | None = None,
    *,
    where: str | None = None,
    knowledge: str | Path | None = None,
    facts: pd.DataFrame | None = None,
    training: pd.DataFrame | None = None,
    seed: int = 0,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Any measure of the registry on one model.

    Args:
        name: see `subjattn measure --list`.
        model: from `load_model`; or, for measures that compare a tuned model with its base, both from `load_arms`.
        prompts: facts asked in one style.
        settings: of the measure; `subjattn measure NAME --help` shows them.
        where: only the facts that the model knows: `correct`, `known` or a SliCK category; see `subjattn.where`.
        knowledge: the labels of `subjattn knowledge`, for all but `correct`.
        facts: a table that holds the facts asked, and more from which priors of answers come, for measures that look at
            relations and priors; without, all facts asked count as of one relation.
        training: the facts that the model was trained on, for measures that compare its answers with those.
        seed: of the draw of facts and pairs, for measures that do not take all.
        backend: what computes it.
        memory_budget: bytes of working memory beyond the weights.

    Returns:
        The measure's arrays over `fact` and more; `measure_of(name).quantities` says what they mean. With `where`, the
        attribute of that name says which facts they are of.

    Raises:
        BadInput: no such measure or setting, or the prompts do not give what it needs.
    """
    found = measure_of(name)
    check_where(where, knowledge)
    if not found.any_backend and (backend != "engine" or memory_budget is not None):
        raise BadInput(f"measure {name!r} is computed by the model itself: leave out the backend and the memory budget")
    try:
        chosen = found.parse(dict(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([name, *(".".join(map(str, first["loc"])),) * bool(first["loc"])])
        raise BadInput(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    arms, one = (model, model.base) if isinstance(model, Arms) else (None, model)
    if ("base" in found.needs) != (arms is not None):
        given = "takes a tuned model beside its base" if arms is None else "takes one model"
        raise BadInput(f"measure {name!r} {given}: give it what {'load_arms' if arms is None else 'load_model'} gives")
    if "trained" in found.needs and training is None:
        raise BadInput(f"measure {name!r} compares answers with those trained on: give training=…, a table of facts")
    asked_of = len(prompts)
    if where is not None:
        prompts = facts_where(prompts, where, model=one, scorer=getattr(chosen, "scorer", None), knowledge=knowledge)
    rng = np.random.default_rng(seed)
    order = [prompts[int(i)] for i in rng.permutation(len(prompts))]
    known: set[str] = set()
    pairs: list[tuple[str, str]] = []
    if "known" in found.needs:
        predictions = predict(one, prompts)
        known = set(predictions["fact_id"][predictions["correct"]])
    if "swaps" in found.needs:
        chosen_pairs, _ = choose_pairs(order, known, len(order), rng)
        pairs = [(clean.fact_id, corrupt.fact_id) for clean, corrupt in chosen_pairs]
        if not pairs:
            raise BadInput("no two facts can be swapped: none agree in length and differ in their answer; ask more")
    asked = Asked(
        one,
        prompts,
        order=[prompt.fact_id for prompt in order],
        known=frozenset(known),
        pairs=pairs,
        backend=backend,
        memory_budget=memory_budget,
        arms=arms,
        training=training,
        **_about(facts, prompts),
    )
    dataset = found.run(asked, chosen)
    return dataset if where is None else dataset.assign_attrs(where=f"{where}: {len(prompts)} of {asked_of} facts")


def _about(facts: pd.DataFrame | None, prompts: PromptSet) -> dict[str, Any]:
    """Relations of the facts asked, and the facts that are not."""
    if facts is None:
        return {}
    asked = [prompt.fact_id for prompt in prompts]
    relations = facts.set_index("fact_id")["relation"]
    if missing := [fact for fact in asked if fact not in relations.index]:
        raise BadInput(
            f"facts: there is no fact {missing[0]!r} in the table, but it is asked: give the table it is from"
        )
    return {"relations": relations[asked].to_dict(), "pool": facts[~facts["fact_id"].isin(asked)]}
