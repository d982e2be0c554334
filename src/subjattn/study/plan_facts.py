"""The stages of a study that make its facts and prompts, before any arm is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subjattn.facts import SOURCES, identity_of_source
from subjattn.measures.accuracy import PREDICTING
from subjattn.models import fingerprint
from subjattn.prompts import Style
from subjattn.run.plan import Stage
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.planning import USUAL_POOL, WORK, Planner
from subjattn.study.stages.before import CHECKED
from subjattn.worlds import is_world


SHARDS = 8
"""Shares in which the pool is scored: each is kept when a run stops, and any number of workers take turns."""


class FactStages(Planner):
    """Stages of the pool, its ranking, its split and its prompts."""

    def fact_stages(self) -> Iterator[Stage]:
        config, asked = self.config, self.config.facts
        base = {"model": config.model, "dtype": config.dtype}
        plain = Style(template=self._first_style().template).model_dump(mode="json")
        yield Stage(
            files.POOL,
            f"{WORK}.pool:work",
            settings={
                "facts": asked.model_dump(mode="json", include={"columns", "relations", "pool"})
                | ({"leave_out_given": True} if asked.leave_out_given else {})
                | ({"where": asked.where} if asked.where not in (None, "correct") else {}),
                "popularity": asked.popularity and [asked.popularity.subject, asked.popularity.popularity],
                "source": asked.source.partition(":")[0] if _published(asked.source) else Path(asked.source).name,
                "letters": config.scorer == "letters",
                "style": self._first_style().model_dump(mode="json"),
                "seed": config.seed,
            },
            external=self._sources() | {"model": self.models[config.model]},
            where={
                "facts": asked.model_dump(mode="json", exclude={"n_train", "n_test", "split"}),
                "model": config.model,
            },
        )
        scored: dict[str, str] = {}
        if asked.scored:
            share = (asked.pool or USUAL_POOL) / SHARDS
            for shard in range(SHARDS):
                scored[f"scores{shard}"] = f"{files.scores(shard)}:scores.parquet"
                settings = base | {"style": plain, "shard": shard, "shards": SHARDS}
                pool = {"pool": f"{files.POOL}:facts.parquet"}
                yield self.computing(files.scores(shard), "score", settings, pool, share, "base")
        held_out = asked.split.held_out
        relations = {}
        if held_out and held_out.farthest:
            relations = {"relations": f"{files.RELATIONS}:distances.json"}
            settings = base | {"style": plain}
            pool = {"pool": f"{files.POOL}:facts.parquet"}
            yield self.computing(files.RELATIONS, "relations", settings, pool, 1.0, "base")
        yield Stage(
            files.SPLIT,
            f"{WORK}.split:work",
            settings=split_settings(config),
            inputs={"pool": f"{files.POOL}:facts.parquet"} | scored | relations,
        )

    def _sources(self) -> dict[str, str]:
        """What the facts are read from: digests of files, and the version of the package of cities."""
        asked = self.config.facts
        found = {"source": identity_of_source(asked.source)}
        popularity = asked.popularity and asked.popularity.path
        if asked.trained_on:
            found["trained_on"] = identity_of_source(asked.trained_on)
        for role, file in (("knowledge", asked.knowledge), ("popularity", popularity)):
            if file:
                found[role] = identity_of_source(file) if is_world(file) else fingerprint(file)
        return found

    def shared_prompts(self, style: str) -> Stage:
        others = {name: arm.model for name, arm in self.config.arms.items() if arm.model}
        external = {"model": self.models[self.config.model]} | {
            f"model of {name}": self.models[model] for name, model in others.items()
        }
        return Stage(
            files.shared_prompts(style),
            f"{WORK}.prompts:work",
            settings={"style": self.config.styles[style].model_dump(mode="json")},
            inputs={"test": files.TEST, "shown": files.SHOWN},
            external=external,
            where={"model": self.config.model, "others": others},
        )

    def before(self, spec: str, draw: int) -> Stage:
        config = self.config
        settings = {
            "model": config.model,
            "dtype": config.dtype,
            "style": next(iter(config.training_styles().values())).model_dump(mode="json"),
            "scorer": config.scorer,
            "seed": config.seed,
        }
        cost = PREDICTING * min(CHECKED, config.facts.n_train or CHECKED)
        facts = {"facts": files.training_facts(spec, draw)}
        return self.computing(files.before(spec, draw), "before", settings, facts, cost, "base")

    def _first_style(self) -> Style:
        return next(iter(self.config.styles.values()))


def _published(source: str) -> bool:
    """Whether a source has a reader of its own; one file may be read by several."""
    return source.partition(":")[0].partition("@")[0] in SOURCES


def split_settings(config: StudyConfig) -> dict[str, Any]:
    """What the stage `split` goes by."""
    return {
        "split": config.facts.split.model_dump(mode="json"),
        "specs": config.specs,
        "n_train": config.facts.n_train if config.trained else None,
        "n_test": config.facts.n_test,
        "n_validation": config.facts.n_validation,
        "shots": max(style.shots for style in config.styles.values()),
        "draws": config.replicates.draws,
        "seed": config.seed,
    }
