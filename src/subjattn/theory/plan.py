"""From a study of one-layer worlds to stages; the only place that knows what feeds what, and the names of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subjattn.run.plan import Plan, Stage
from subjattn.theory.config import TheoryConfig
from subjattn.theory.gap import ARMS, Steps, WorldSettings


STATEMENTS = "statements"
_WORK = "subjattn.theory.stages"
_MEMORY = 2e8
"""Bytes of a stage, roughly."""


def pretrained(world: str, zipf: float) -> str:
    return f"worlds/{world}/zipf-{zipf:g}/pretrained"


def finetuned(world: str, zipf: float, way: str) -> str:
    return f"worlds/{world}/zipf-{zipf:g}/{way}"


def along(world: str, zipf: float, name: str) -> str:
    return f"worlds/{world}/zipf-{zipf:g}/along/{name}"


def plan_theory(config: TheoryConfig) -> Plan:
    """Stages of every world and exponent: pre-training, each way of fine-tuning, and trainings looked at on the way."""
    stages = []
    if config.statements:
        stages.append(Stage(STATEMENTS, f"{_WORK}:statements", settings={"seed": config.seed}))
    for name, world in config.worlds.items():
        for zipf in world.zipf:
            own = {
                "world": world.model_dump(mode="json", include=set(WorldSettings.model_fields)),
                "zipf": zipf,
                "seeds": config.seeds,
            }
            group = f"{name}/{zipf:g}"
            if ways := config.ways_of(name):
                steps = world.pretraining
                before = pretrained(name, zipf)
                stages.append(_stage(before, "pretraining", own, steps, config.replicates, group))
                many = len(ARMS) * len(steps.steps)
                for way in ways:
                    stages.append(
                        _stage(
                            finetuned(name, zipf, way),
                            "finetuning",
                            own,
                            config.finetuning[way],
                            config.replicates * many,
                            group,
                            {"pretrained": f"{before}:models.safetensors"},
                        )
                    )
            for label, training in config.along.items():
                stages.append(_stage(along(name, zipf, label), "looking", own, training, config.replicates, group))
    return Plan(stages)


def _stage(
    name: str,
    work: str,
    own: Mapping[str, Any],
    steps: Steps,
    times: int,
    group: str,
    inputs: Mapping[str, str] | None = None,
) -> Stage:
    return Stage(
        name,
        f"{_WORK}:{work}",
        settings={**own, "training": steps.model_dump(mode="json")},
        inputs=inputs or {},
        cost=float(times * steps.steps[-1] * steps.batch),
        memory=_MEMORY,
        device=True,
        group=group,
    )
