"""From a study to its plan: the only place that knows which stage needs what of which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from subjattn.errors import BadInput
from subjattn.facts import SOURCES, identity_of_source
from subjattn.facts.splits import facts_of, parse_arm
from subjattn.measures.accuracy import PREDICTING
from subjattn.measures.record import Measure, Shape
from subjattn.models import check_adapter, fingerprint, identity, model_shape, resolve_adapter, resolve_model
from subjattn.prompts import Style
from subjattn.run.plan import Plan, Stage
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.files import Replicate
from subjattn.study.stages.before import CHECKED
from subjattn.study.stages.prompts import THINKING
from subjattn.study.stages.train import step_cost


SHARDS = 8
"""Shares in which the pool is scored: each is kept when a run stops, and any number of workers take turns."""
USUAL_POOL = 30_000
"""Facts of a pool whose size is not known before it is read, for time estimates."""
_WORK = "subjattn.study.stages"


def plan_study(config: StudyConfig) -> Plan:
    """The stages of a study, once every model and adapter is seen to be there.

    Raises:
        BadInput: a model or adapter cannot be found, or an arm has another shape than the study's model.
    """
    return Plan(list(_Builder(config).stages()), config.threads)


class _Builder:
    """Stages of one study, in order."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.models = {name: identity(name) for name in self._model_names()}
        self.adapters = {
            arm.adapter: identity(resolve_adapter(arm.adapter)) for arm in config.arms.values() if arm.adapter
        }
        n_layers, n_heads = model_shape(config.model)
        for name, arm in config.arms.items():
            if arm.model and model_shape(arm.model) != (n_layers, n_heads):
                raise BadInput(
                    f"arm {name!r} has {model_shape(arm.model)[0]} layers of {model_shape(arm.model)[1]} heads, the "
                    f"study's model {n_layers} of {n_heads}: only models of one architecture can be compared head by "
                    "head"
                )
        for arm in config.arms.values():
            if arm.adapter:
                check_adapter(arm.model or config.model, arm.adapter)
        held_out = config.facts.split.held_out
        self.shape = Shape(config.facts.n_test + (held_out.n_test if held_out else 0), n_layers, n_heads)
        self.memory = {name: weight_bytes(name, config.dtype) for name in self.models}

    def stages(self) -> Iterator[Stage]:
        """All of them; inputs come first."""
        yield from self._facts()
        for style in self.config.styles:
            if not self._own_prompts(style):
                yield self._shared_prompts(style)
        reference = self.config.untrained
        for arm, replicate in self._arms():
            yield from self._arm(arm, replicate, reference)
        for spec in dict.fromkeys(map(facts_of, self.config.trained.values())):
            if parse_arm(spec).kind != "nothing":
                yield self._before(spec, 0)  # of the first draw, which the report describes

    def _model_names(self) -> list[str]:
        names = [self.config.model, *(arm.model for arm in self.config.arms.values() if arm.model)]
        for name in names:
            resolve_model(name)
        return list(dict.fromkeys(names))

    def _arms(self) -> Iterator[tuple[str, Replicate | None]]:
        """Arms with their replicates, the reference first."""
        order = sorted(self.config.arms, key=lambda name: name != self.config.untrained)
        for name in order:
            for replicate in self.config.replicates_of(name):
                yield name, replicate

    def _own_prompts(self, style: str) -> bool:
        return self.config.styles[style].chain_of_thought

    def _first_style(self) -> Style:
        return next(iter(self.config.styles.values()))

    def _facts(self) -> Iterator[Stage]:
        config, asked = self.config, self.config.facts
        base = {"model": config.model, "dtype": config.dtype}
        plain = Style(template=self._first_style().template).model_dump(mode="json")
        yield Stage(
            files.POOL,
            f"{_WORK}.pool:work",
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
                yield self._computing(files.scores(shard), "score", settings, pool, share, "base")
        held_out = asked.split.held_out
        relations = {}
        if held_out and held_out.farthest:
            relations = {"relations": f"{files.RELATIONS}:distances.json"}
            settings = base | {"style": plain}
            pool = {"pool": f"{files.POOL}:facts.parquet"}
            yield self._computing(files.RELATIONS, "relations", settings, pool, 1.0, "base")
        yield Stage(
            files.SPLIT,
            f"{_WORK}.split:work",
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
                found[role] = fingerprint(file)
        return found

    def _shared_prompts(self, style: str) -> Stage:
        others = {name: arm.model for name, arm in self.config.arms.items() if arm.model}
        external = {"model": self.models[self.config.model]} | {
            f"model of {name}": self.models[model] for name, model in others.items()
        }
        return Stage(
            files.shared_prompts(style),
            f"{_WORK}.prompts:work",
            settings={"style": self.config.styles[style].model_dump(mode="json")},
            inputs={"test": files.TEST, "shown": files.SHOWN},
            external=external,
            where={"model": self.config.model, "others": others},
        )

    def _arm(self, name: str, replicate: Replicate | None, reference: str) -> Iterator[Stage]:
        """One arm: its training, its prompts where they are its own, its measures."""
        config, arm = self.config, self.config.arms[name]
        model = {"model": arm.model or config.model, "dtype": config.dtype, "adapter": arm.adapter}
        weights: dict[str, str] = {}
        group = files.arm_folder(name, replicate)
        if arm.train and replicate is not None:
            weights = {"adapter": files.adapter(name, replicate)}
            yield self._training(name, replicate)
        for style in config.styles:
            prompts = files.shared_prompts(style)
            if own := self._own_prompts(style):
                prompts = files.own_prompts(name, replicate, style)
                settings = model | {"style": config.styles[style].model_dump(mode="json")}
                inputs = weights | {"test": files.TEST, "shown": files.SHOWN}
                cost = self.shape.n_facts * THINKING
                yield self._computing(prompts, "prompts", settings, inputs, cost, group, "reasoned")
            for measure in sorted(config.measured, key=lambda one: one.name != "accuracy"):
                if replicate not in config.replicates_of(name, measure.name):
                    continue
                inputs = weights | {"prompts": f"{prompts}:prompts.parquet"}
                if measure.name != "accuracy":
                    inputs["chosen"] = f"{files.chosen(style)}:chosen.json"
                if "facts" in measure.needs:
                    inputs["pool"] = f"{files.POOL}:facts.parquet"
                    if arm.train and replicate is not None:
                        inputs["training"] = files.training_facts(config.trained[name], replicate[0])
                about = model | {"own_prompts": own} | self._beside_base(name, measure)
                if config.facts.where == "correct" and measure.name != "accuracy":
                    about["where"] = "correct"
                yield self._measuring(name, replicate, style, measure, about, inputs)
                is_first = replicate is None or replicate == (0, 0)
                if measure.name == "accuracy" and name == reference and is_first:
                    yield self._choosing(style, prompts, files.measured(name, replicate, style, "accuracy"))

    def _beside_base(self, name: str, measure: Measure) -> dict[str, Any]:
        """Whether an arm is a tuned model, and of what, for measures that compare it with its base."""
        arm, base = self.config.arms[name], self.config.model
        if not measure.needs & {"base", "trained"}:
            return {}
        if arm.train and parse_arm(arm.train).kind == "nothing":
            return {"taught_nothing": True}
        if "base" not in measure.needs:
            return {}
        checkpoint = self.config.is_tuned(name) and not (arm.train or arm.adapter)
        return {"tuned": self.config.is_tuned(name)} | ({"base_model": base} if checkpoint else {})

    def _choosing(self, style: str, prompts: str, accuracy: str) -> Stage:
        return Stage(
            files.chosen(style),
            f"{_WORK}.choose:work",
            settings={"seed": self.config.seed},
            inputs={
                "test": files.TEST,
                "prompts": f"{prompts}:prompts.parquet",
                "accuracy": f"{accuracy}:array.nc",
            },
        )

    def _training(self, name: str, replicate: Replicate) -> Stage:
        config, training = self.config, self.config.training_of(name)
        spec, method = str(config.arms[name].train), training.record
        n_steps = training.settings.n_steps(config.facts.n_train or USUAL_POOL // 10)
        inputs = {"facts": files.training_facts(spec, replicate[0])}
        if "known" in method.needs:
            inputs["known"] = files.training_facts("known", replicate[0])
        if training.settings.stop == "validation":
            inputs["validation"] = files.VALIDATION
        settings = {
            "model": config.arms[name].model or config.model,
            "dtype": config.dtype,
            "method": training.method,
            "method_version": method.version,
            "settings": training.settings.model_dump(mode="json"),
            "styles": [style.model_dump(mode="json") for style in config.training_styles(name).values()],
            "seed": training_seed(config.seed, replicate),
        }
        return self._computing(
            files.adapter(name, replicate),
            "train",
            settings,
            inputs,
            n_steps * step_cost(method.effort(training.settings), training.settings),
            files.arm_folder(name, replicate),
        )

    def _measuring(
        self,
        name: str,
        replicate: Replicate | None,
        style: str,
        measure: Measure,
        model: Mapping[str, Any],
        inputs: Mapping[str, str],
    ) -> Stage:
        settings = self.config.measures[measure.name]
        return self._computing(
            files.measured(name, replicate, style, measure.name),
            "measure",
            {**model, "measure": measure.name, "settings": settings.model_dump(mode="json")},
            inputs,
            measure.cost(self.shape, settings) if model.get("tuned", True) else 0.0,
            files.arm_folder(name, replicate),
            version=measure.version,
        )

    def _before(self, spec: str, draw: int) -> Stage:
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
        return self._computing(files.before(spec, draw), "before", settings, facts, cost, "base")

    def _computing(
        self,
        name: str,
        module: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        cost: float,
        group: str,
        function: str = "work",
        version: int = 1,
    ) -> Stage:
        """A stage that runs a model."""
        external, model, adapter = {}, str(settings["model"]), settings.get("adapter")
        external["model"] = self.models[model]
        if adapter:
            external["adapter"] = self.adapters[adapter]
        where: dict[str, Any] = {"model": model, "adapter": adapter}
        if base := settings.get("base_model"):
            external["base"], where["base_model"] = self.models[base], base
        return Stage(
            name,
            f"{_WORK}.{module}:{function}",
            version=version,
            settings={name: of for name, of in settings.items() if name not in ("model", "adapter", "base_model")},
            inputs=inputs,
            external=external,
            where=where | {"identity": list(external.values())},
            cost=cost,
            memory=self.memory[model] + (self.memory[base] if base else 0.0),
            device=True,
            group=group,
        )


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


def training_seed(seed: int, replicate: Replicate) -> int:
    """The seed of a replicate's training, the same for all arms; the study's own for the first."""
    if replicate == (0, 0):
        return seed
    return int(np.random.SeedSequence([seed, *replicate]).generate_state(1)[0])


@cache
def weight_bytes(name: str, dtype: str) -> float:
    """Bytes that a model's weights take, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from subjattn.models import quiet

    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_model(name)))
    return float(sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize)
