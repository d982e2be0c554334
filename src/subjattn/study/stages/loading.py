"""The model of a stage, kept for the next one: a process holds one at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subjattn.models import LoadedModel, load_model
from subjattn.models.arms import Arms, load_arms
from subjattn.models.derived import mixed, restored
from subjattn.study.stages.tables import load_prompts


_held: dict[tuple[object, ...], LoadedModel] = {}
_described: dict[str, Any] = {}
"""What the model that is held is."""


def _plain(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> LoadedModel:
    """The model that `settings` names, under the adapter trained for it (an input) or brought along (a setting).

    Where the weights themselves were trained, the input is a whole model.
    """
    adapter: str | None = str(inputs["adapter"]) if "adapter" in inputs else settings.get("adapter")
    whole = adapter is not None and _is_whole(Path(adapter))
    files = Path(adapter or ".").glob("*.safetensors") if adapter else ()
    written = max((file.stat().st_mtime_ns for file in files), default=None)
    key = (settings["model"], *settings.get("identity", ()), adapter, written, settings["dtype"])
    if key not in _held:
        release()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "adapter .* was trained on", UserWarning)  # said when it was planned
            if whole:
                _held[key] = load_model(str(adapter), dtype=settings["dtype"])
            else:
                identical = adapter is not None and taught_nothing(Path(adapter))
                _held[key] = load_model(
                    settings["model"], adapter=adapter, dtype=settings["dtype"], identical=identical
                )
    return _held[key]


def loaded(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> LoadedModel:
    """The model of a stage: as it is, or made of a tuned one and its base."""
    if "derived" not in settings:
        return _plain(settings, inputs)
    key = ("derived", str(settings["derived"]), *settings.get("identity", ()), *map(str, inputs.values()))
    if key not in _held:
        tuned, base = loaded_pair(settings, inputs)
        if how := settings["derived"].get("restore"):
            made = restored(tuned, base, how["share"], how["which"], seed=settings["seed"])
        else:
            how = settings["derived"]["mix"]
            weight = json.loads(inputs["mixing"].read_text())["weight"] if "mixing" in inputs else how["weight"]
            prompts, shown = (load_prompts(inputs[role]) if "shown" in inputs else () for role in ("prompts", "shown"))
            made = mixed(tuned, base, weight, how["form"], prompts=prompts, shown=shown)
        release()
        _held[key] = made
    return _held[key]


def loaded_pair(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> tuple[LoadedModel, LoadedModel]:
    """The tuned model that a stage's model is made of, and its base."""
    own = {name: of for name, of in settings.items() if name != "derived"}
    tuned = _plain(own, inputs)
    return tuned, load_model(settings.get("base_model") or settings["model"], dtype=settings["dtype"])


def loaded_arms(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Arms:
    """The same model beside its base, named `tuned`; the base is then the model that is held."""
    adapter = str(inputs["adapter"]) if "adapter" in inputs else settings.get("adapter")
    base = settings.get("base_model") or settings["model"]
    if "restore" in settings.get("derived", {}):
        made = loaded(settings, inputs)
        return load_arms(load_model(base, dtype=settings["dtype"]), checkpoints={"tuned": made}, identical=["tuned"])
    held = _plain({"model": base, "dtype": settings["dtype"], "identity": (adapter, settings["model"])}, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adapter .* was trained on", UserWarning)
        if adapter and _is_whole(Path(adapter)):
            return load_arms(held, checkpoints={"tuned": adapter})
        if adapter:
            return load_arms(held, adapters={"tuned": adapter})
        return load_arms(held, checkpoints={"tuned": settings["model"]})


def taught_nothing(folder: Path) -> bool:
    """Whether a trained arm's folder is of an arm that was taught no facts."""
    log = folder / "training.json"
    return log.is_file() and json.loads(log.read_text())["n_facts"] == 0


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds a whole model, and no adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def provenance() -> dict[str, Any]:
    """What the model that is held is; its weights, which no measure changes, are gone through once and not by stage."""
    if not _described:
        (model,) = _held.values()
        _described.update(model.provenance())
    return _described


def release() -> None:
    """Let go of the model that is held."""
    _held.clear()
    _described.clear()
