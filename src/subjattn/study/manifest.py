"""What a run's numbers were made with: the study, models and hashes, and the circumstances of every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from subjattn.errors import BadInput
from subjattn.evidence.intervals import CONFIDENCE
from subjattn.run.folder import RECORD, Folder
from subjattn.run.perform import VERSIONS
from subjattn.run.plan import SCHEMA, Plan, wrong_schema
from subjattn.study import files
from subjattn.study.config import StudyConfig


CIRCUMSTANCES = ("versions", "python", "platform", "device", "threads")


def manifest(config: StudyConfig, plan: Plan, folder: Folder) -> dict[str, Any]:
    """The content of `manifest.json`."""
    arms = {}
    for arm in config.arms:
        stage = files.measured(arm, config.replicates_of(arm)[0], config.styles_of(arm)[0], "accuracy")
        arms[arm] = json.loads((folder.path(stage) / "provenance.json").read_text())
    return {
        "study": config.model_dump(mode="json"),
        "seed": config.seed,
        "replicates": config.replicates.model_dump(),
        "versions": {name: version(name) for name in VERSIONS},
        "intervals": {
            "confidence": CONFIDENCE,
            "method": "facts and replicates crossed, both random (docs/statistics.md)",
        },
        "arms": arms,
        "mixtures": mixtures(plan, folder),
        "stages": {stage.name: _circumstances(folder, stage.name) for stage in plan},
    }


def _circumstances(folder: Folder, stage: str) -> dict[str, Any]:
    record = folder.record(stage) or {}
    return {name: record.get(name) for name in ("recipe", "inputs", "seconds", *CIRCUMSTANCES)}


def mixtures(plan: Plan, folder: Folder) -> list[str]:
    """What differs between stages that are made: versions, devices, threads; a line each."""
    seen: dict[str, dict[str, list[str]]] = {}
    for stage in plan:
        record = folder.record(stage.name) or {}
        for name, value in _flat({key: record.get(key) for key in CIRCUMSTANCES}).items():
            if value is not None and (stage.device or name not in ("device", "threads")):
                seen.setdefault(name, {}).setdefault(value, []).append(stage.name)
    return [f"{name}: {'; '.join(map(_shown, found.items()))}" for name, found in seen.items() if len(found) > 1]


def _shown(found: tuple[str, list[str]]) -> str:
    value, stages = found
    return f"{value} ({len(stages)} stages, such as {stages[0]})"


def _flat(record: Mapping[str, Any]) -> dict[str, str | None]:
    versions = record.get("versions") or {}
    rest = {name: None if of is None else str(of) for name, of in record.items() if name != "versions"}
    return rest | {name: str(of) for name, of in versions.items()}


def check_version(folder: Path) -> None:
    """Refuse a folder that another version of subjattn wrote into; BadInput says which and what to do."""
    if (folder / "facts" / RECORD).is_file():
        raise BadInput(wrong_schema(repr(str(folder)), None))
    try:
        found = json.loads((folder / files.PLAN).read_text())["schema"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if found != SCHEMA:
        raise BadInput(wrong_schema(repr(str(folder)), found))
