"""Stage `measures`: one measure of one arm in one style."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import NoActivations, NotDefined
from subjattn.measures.record import VALUE_COLUMNS, Asked, Measure, measure_of, values_of
from subjattn.models.arms import Arms
from subjattn.prompts import PromptSet
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded, loaded_arms, provenance
from subjattn.study.stages.tables import load_prompts


OWN_PROMPTS = "each arm reads its own reasoning here, which may repeat the subject: arms cannot be compared"


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `array.nc`, `values.parquet` and `provenance.json`; or `not_defined.json`, which says why."""
    measure, prompts, chosen, reason = _given(settings, inputs)
    if reason:
        (out / "not_defined.json").write_text(json.dumps({"reason": reason}))
        return
    try:
        dataset, arms = _measured(measure, prompts, chosen, settings, inputs, context)
    except (NoActivations, NotDefined) as error:
        (out / "not_defined.json").write_text(json.dumps({"reason": str(error)}))
        return
    _storable(dataset).to_netcdf(out / "array.nc", engine="h5netcdf")
    pd.DataFrame(values_of(measure, dataset), columns=VALUE_COLUMNS).to_parquet(out / "values.parquet", index=False)
    (out / "provenance.json").write_text(json.dumps(provenance() if arms is None else arms.provenance(), indent=1))


def over_training(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `array.nc` and `values.parquet` with a `step`, of the weights that training kept; or `not_defined.json`.

    Step 0 is the model before training; measures that compare with it begin at the first step kept. The arm itself
    stands at the step that its weights are of: the last, or with `stop: validation` the best.
    """
    measure, prompts, chosen, reason = _given(settings, inputs)
    if reason:
        (out / "not_defined.json").write_text(json.dumps({"reason": reason}))
        return
    adapter = inputs["adapter"]
    others = {role: path for role, path in inputs.items() if role != "adapter"}
    steps: dict[int, Path | None] = {} if "base" in measure.needs else {0: None}
    steps |= {int(path.name): path for path in sorted(adapter.glob("steps/*"), key=lambda path: int(path.name))}
    log = json.loads((adapter / "training.json").read_text())
    steps[log.get("best_step", len(log["losses"]))] = adapter
    found, tables = [], []
    for step, folder in (steps := dict(sorted(steps.items()))).items():
        own = others if folder is None else others | {"adapter": folder}
        found.append(_measured(measure, prompts, chosen, settings, own, context)[0])
        rows = pd.DataFrame(values_of(measure, found[-1]), columns=VALUE_COLUMNS)
        tables.append(rows.assign(step=step))
    whole = xr.concat(found, pd.Index(list(steps), name="step"), combine_attrs="drop_conflicts")
    _storable(whole).to_netcdf(out / "array.nc", engine="h5netcdf")
    pd.concat(tables, ignore_index=True).to_parquet(out / "values.parquet", index=False)


def _given(
    settings: Mapping[str, Any], inputs: Mapping[str, Path]
) -> tuple[Measure, PromptSet, dict[str, Any], str | None]:
    """What is measured, of which prompts, with which choices among them; or why it is not defined."""
    measure, prompts = measure_of(settings["measure"]), load_prompts(inputs["prompts"])
    chosen = json.loads(inputs["chosen"].read_text()) if "chosen" in inputs else {}
    if settings.get("where") == "correct" and chosen:
        prompts, chosen = _known_alone(prompts, chosen)
    return measure, prompts, chosen, _not_defined(measure, prompts, settings, chosen, trained="training" in inputs)


def _measured(
    measure: Measure,
    prompts: PromptSet,
    chosen: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    context: Context,
) -> tuple[xr.Dataset, Arms | None]:
    """A measure's arrays of the model that a stage is about, and that model beside its base where it needs one."""
    arms = loaded_arms(settings, inputs) if "base" in measure.needs else None
    model = loaded(settings, inputs) if arms is None else arms.base
    asked = Asked(
        model,
        prompts,
        order=chosen.get("order", ()),
        known=frozenset(chosen.get("known", ())),
        pairs=[(clean, corrupt) for clean, corrupt in chosen.get("pairs", ())],
        memory_budget=None if context.memory_share == 1 else _half_of_what_is_free(model),
        tell=context.tell,
        arms=arms,
        reference=_reference(inputs),
        known_elsewhere=_known_elsewhere(inputs),
        **_facts(inputs, prompts),
    )
    return measure.run(asked, measure.parse(settings["settings"])), arms


def _known_alone(prompts: PromptSet, chosen: Mapping[str, Any]) -> tuple[PromptSet, dict[str, Any]]:
    """Prompts and choices of the facts alone that the reference model answers rightly."""
    known = set(chosen["known"])
    left = {
        "known": chosen["known"],
        "order": [fact for fact in chosen["order"] if fact in known],
        "pairs": [pair for pair in chosen["pairs"] if known.issuperset(pair)],
    }
    return PromptSet(prompts.style, tuple(prompt for prompt in prompts if prompt.fact_id in known)), left


def _facts(inputs: Mapping[str, Path], prompts: PromptSet) -> dict[str, Any]:
    """What measures that need `facts` are given beside the prompts."""
    if "pool" not in inputs:
        return {}
    pool = pd.read_parquet(inputs["pool"])
    asked = {prompt.fact_id for prompt in prompts}
    inside = pool["fact_id"].isin(asked)
    return {
        "relations": dict(zip(pool["fact_id"][inside], pool["relation"][inside], strict=True)),
        "pool": pool[~inside],
        "training": pd.read_parquet(inputs["training"]) if "training" in inputs else None,
    }


def _reference(inputs: Mapping[str, Path]) -> xr.Dataset | None:
    """The reference model's arrays, where a measure needs them and they are defined."""
    path = inputs["reference"] / "array.nc" if "reference" in inputs else None
    return xr.load_dataset(path, engine="h5netcdf") if path is not None and path.is_file() else None


def _known_elsewhere(inputs: Mapping[str, Path]) -> frozenset[str] | None:
    if "chosen_elsewhere" not in inputs:
        return None
    return frozenset(json.loads(inputs["chosen_elsewhere"].read_text())["known"])


def _storable(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with NUL characters in its texts made visible, which netCDF cannot hold."""
    for name, array in dataset.variables.items():
        if array.dtype.kind in "UO" and any("\0" in text for text in array.values.ravel().tolist()):
            shown = [text.replace("\0", "␀") for text in array.values.ravel().tolist()]
            assign = dataset.assign_coords if name in dataset.coords else dataset.assign
            dataset = assign({name: (array.dims, np.array(shown).reshape(array.shape))})
    return dataset


def _not_defined(
    measure: Measure, prompts: PromptSet, settings: Mapping[str, Any], chosen: Mapping[str, Any], *, trained: bool
) -> str | None:
    if not prompts:
        return "the reference model answers none of the facts rightly"
    if "subject" in measure.needs and any(prompt.span is None for prompt in prompts):
        return "the facts have no subject"
    if "same_prompts" in measure.needs and settings["own_prompts"]:
        return OWN_PROMPTS
    if "swaps" in measure.needs and not chosen.get("pairs"):
        return "no two facts can be swapped: none agree in length and differ in their answer"
    if "base" in measure.needs and not settings.get("tuned"):
        return "this arm is the base itself"
    if "base" in measure.needs and "mix" in settings.get("derived", {}):
        return "this arm is a mixture of two models, and no tuned one"
    if "base" in measure.needs and settings.get("derived", {}).get("restore", {}).get("share") == 1:
        return "nothing is left of this arm's update: it is the base itself"
    if "trained" in measure.needs and settings.get("taught_nothing"):
        return "this arm was taught nothing"
    if "trained" in measure.needs and not trained:
        return "this arm is not trained here, so what it was taught is not known"
    return None


def _half_of_what_is_free(model: Any) -> int:
    import torch

    if not torch.cuda.is_available():
        return 2**28
    return int(torch.cuda.mem_get_info(model.model.device)[0] // 2)
