"""Stages of a study of one-layer worlds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors.torch import load_file, save_file

from subjattn.run.plan import Context
from subjattn.theory.gap import Finetuning, Pretraining, WorldSettings, ask, finetune, pretrain
from subjattn.theory.onelayer import OneLayer
from subjattn.theory.statements import check_all


def statements(settings: Mapping[str, Any], _: Mapping[str, Path], out: Path, __: Context) -> None:
    """`statements.json`: how each of the paper's statements fared."""
    found = [asdict(checked) | {"holds": checked.holds} for checked in check_all(settings["seed"])]
    (out / "statements.json").write_text(json.dumps(found, indent=1))


def pretraining(settings: Mapping[str, Any], _: Mapping[str, Path], out: Path, context: Context) -> None:
    """`models.safetensors`: `values-STEP` and `scores-STEP` of every replicate."""
    found = _pretrained(settings)
    tensors = {f"values-{step}": model.values for step, model in found.items()}
    save_file(tensors | {f"scores-{step}": model.scores for step, model in found.items()}, out / "models.safetensors")
    context.tell(_cost(settings))


def finetuning(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """`array.nc`: what `finetune` returns, with a dimension `pretraining` of the steps before."""
    world, training = WorldSettings(**settings["world"]), Finetuning(**settings["training"])
    tensors = load_file(inputs["pretrained"])
    steps = sorted(int(name.partition("-")[2]) for name in tensors if name.startswith("values"))
    tokens = world.make(settings["zipf"], settings["seeds"][0]).tokens
    found = []
    for step in steps:
        model = OneLayer(tokens, tensors[f"values-{step}"], tensors[f"scores-{step}"])
        found.append(finetune(world, settings["zipf"], model, training, settings["seeds"]))
        context.tell(4 * _cost(settings))
    xr.concat(found, dim=xr.IndexVariable("pretraining", steps)).to_netcdf(out / "array.nc", engine="h5netcdf")


def looking(settings: Mapping[str, Any], _: Mapping[str, Path], out: Path, context: Context) -> None:
    """`array.nc`: what facts are answered along a pre-training, `(step, replicate, subject, relation)`."""
    world = WorldSettings(**settings["world"])
    found = _pretrained(settings)
    answers = np.stack([world.make(settings["zipf"], seed).answer_tokens for seed in settings["seeds"]])
    arrays = [ask(model, answers, prompts=False) for model in found.values()]
    xr.concat(arrays, dim=xr.IndexVariable("step", list(found))).to_netcdf(out / "array.nc", engine="h5netcdf")
    context.tell(_cost(settings))


def _pretrained(settings: Mapping[str, Any]) -> dict[int, OneLayer]:
    world, training = WorldSettings(**settings["world"]), Pretraining(**settings["training"])
    return pretrain(world, settings["zipf"], training, settings["seeds"])


def _cost(settings: Mapping[str, Any]) -> float:
    training = settings["training"]
    return float(len(settings["seeds"]) * training["steps"][-1] * training["batch"])
