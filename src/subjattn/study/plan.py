"""From a study to its plan: the only place that knows which stage needs what of which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from subjattn.facts.splits import facts_of, parse_arm
from subjattn.measures.accuracy import PREDICTING
from subjattn.measures.record import Measure
from subjattn.run.plan import Plan, Stage
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.files import Replicate
from subjattn.study.plan_facts import FactStages
from subjattn.study.planning import USUAL_POOL, WORK
from subjattn.study.stages.mixing import WEIGHTS
from subjattn.study.stages.prompts import THINKING
from subjattn.study.stages.train import step_cost


def plan_study(config: StudyConfig) -> Plan:
    """The stages of a study, once every model and adapter is seen to be there.

    Raises:
        BadInput: a model or adapter cannot be found, or an arm has another shape than the study's model.
    """
    return Plan(list(_Builder(config).stages()), config.threads)


class _Builder(FactStages):
    """Stages of one study, in order."""

    def stages(self) -> Iterator[Stage]:
        """All of them; inputs come first."""
        yield from self.fact_stages()
        for style in self.config.styles:
            if not self._own_prompts(style):
                yield self.shared_prompts(style)
        yield from self._grids()
        reference = self.config.untrained
        for arm, replicate in self._arms():
            yield from self._arm(arm, replicate, reference)
        for spec in dict.fromkeys(map(facts_of, self.config.trained.values())):
            if parse_arm(spec).kind != "nothing":
                yield self.before(spec, 0)  # of the first draw, which the report describes

    def _arms(self) -> Iterator[tuple[str, Replicate | None]]:
        """Arms with their replicates, the reference first."""
        order = sorted(self.config.arms, key=lambda name: name != self.config.untrained)
        for name in order:
            for replicate in self.config.replicates_of(name):
                yield name, replicate

    def _own_prompts(self, style: str) -> bool:
        return self.config.styles[style].chain_of_thought

    def _arm(self, name: str, replicate: Replicate | None, reference: str) -> Iterator[Stage]:
        """One arm: its training, its prompts where they are its own, its measures."""
        config, source = self.config, self.config.source(name)
        arm = config.arms[source]
        model = {"model": arm.model or config.model, "dtype": config.dtype, "adapter": arm.adapter}
        weights: dict[str, str] = {}
        group = files.arm_folder(name, replicate)
        if arm.train and replicate is not None:
            weights = {"adapter": files.adapter(source, replicate)}
            if source == name:
                yield self._training(name, replicate)
        if source != name:
            model |= self._made(name)
            if (mix := config.arms[name].mix) is not None and mix.weight is None:
                yield self._mixing(name, replicate, model, weights)
                weights = weights | {"mixing": f"{files.mixing(name, replicate)}:mixing.json"}
        for style in config.styles_of(name):
            prompts = files.shared_prompts(style)
            if own := self._own_prompts(style):
                prompts = files.own_prompts(name, replicate, style)
                settings = model | {"style": config.styles[style].model_dump(mode="json")}
                inputs = weights | {"test": files.TEST, "shown": files.SHOWN}
                cost = self.shape.n_facts * THINKING
                yield self.computing(prompts, "prompts", settings, inputs, cost, group, "reasoned")
            for measure in sorted(config.measured, key=lambda one: one.name != "accuracy"):
                if replicate not in config.replicates_of(name, measure.name):
                    continue
                inputs = weights | {"prompts": f"{prompts}:prompts.parquet"}
                inputs |= self._further_inputs(name, replicate, style, measure)
                about = model | {"own_prompts": own} | self._beside_base(name, measure)
                if config.facts.where == "correct" and measure.name != "accuracy":
                    about["where"] = "correct"
                measured = self._measuring(name, replicate, style, measure, about, inputs)
                yield measured
                is_first = replicate is None or replicate == (0, 0)
                if measure.name == "accuracy" and name == reference and is_first:
                    yield self._choosing(style, prompts, files.measured(name, replicate, style, "accuracy"))
                if measure.name in config.measured_over_training(name, style):
                    over = files.over_training(name, replicate, style, measure.name)
                    yield self._over_training(name, measured, over)

    def _further_inputs(self, name: str, replicate: Replicate | None, style: str, measure: Measure) -> dict[str, str]:
        """What a measure of an arm is made from besides its weights and prompts."""
        config, reference = self.config, self.config.untrained
        inputs: dict[str, str] = {}
        if (mix := config.arms[name].mix) is not None and mix.base_style:
            inputs["shown"] = f"{files.shared_prompts(mix.base_style)}:prompts.parquet"
        if measure.name != "accuracy":
            inputs["chosen"] = f"{files.chosen(style)}:chosen.json"
        if "reference" in measure.needs and name != reference:
            first = config.replicates_of(reference, measure.name)[0]
            inputs["reference"] = files.measured(reference, first, style, measure.name)
        if "known_elsewhere" in measure.needs and name != reference and (other := self._other_style(style)):
            inputs["chosen_elsewhere"] = f"{files.chosen(other)}:chosen.json"
        if "facts" in measure.needs:
            inputs["pool"] = f"{files.POOL}:facts.parquet"
            if (source := config.source(name)) in config.trained and replicate is not None:
                inputs["training"] = files.training_facts(config.trained[source], replicate[0])
        return inputs

    def _other_style(self, style: str) -> str | None:
        """The next style that the reference is asked in, after the last the first; None where there is none."""
        asked = self.config.styles_of(self.config.untrained)
        others = asked[asked.index(style) + 1 :] + asked[: asked.index(style)] if style in asked else asked
        return next(iter(others), None)

    def _made(self, name: str) -> dict[str, Any]:
        """What an arm that is made of another is."""
        own, source = self.config.arms[name], self.config.arms[self.config.source(name)]
        derived = own.restore or own.mix
        kind = "restore" if own.restore else "mix"
        said = {"derived": {kind: derived.model_dump(mode="json") if derived else {}}, "seed": self.config.seed}
        return said | (
            {"base_model": self.config.model} if source.model and not (source.train or source.adapter) else {}
        )

    def _mixing(
        self, name: str, replicate: Replicate | None, model: Mapping[str, Any], weights: Mapping[str, str]
    ) -> Stage:
        """The choice of a mixture's share on validation facts, and what all shares give."""
        config, mix = self.config, self.config.arms[name].mix
        styles = config.training_styles(config.source(name))
        style = next(iter(styles.values())).model_dump(mode="json")
        shown = mix and mix.base_style and config.styles[mix.base_style].model_dump(mode="json")
        settings = {**model, "style": style, "base_style": shown, "scorer": config.scorer}
        inputs = {**weights, "validation": files.VALIDATION, "test": files.TEST, "shown": files.SHOWN}
        cost = 2 * PREDICTING * len(WEIGHTS) * (config.facts.n_validation + config.facts.n_test)
        return self.computing(
            files.mixing(name, replicate), "mixing", settings, inputs, cost, files.arm_folder(name, replicate)
        )

    def _beside_base(self, name: str, measure: Measure) -> dict[str, Any]:
        """Whether an arm is a tuned model, and of what, for measures that compare it with its base."""
        arm, base = self.config.arms[self.config.source(name)], self.config.model
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
            f"{WORK}.choose:work",
            settings={"seed": self.config.seed},
            inputs={
                "test": files.TEST,
                "prompts": f"{prompts}:prompts.parquet",
                "accuracy": f"{accuracy}:array.nc",
            },
        )

    def _grids(self) -> Iterator[Stage]:
        """Every combination of settings that is tried, and the choice for each arm, or for all together."""
        shared: dict[str, dict[str, str]] = {}
        for name in self.config.trained:
            training = self.config.training_of(name)
            if training.grid is None or parse_arm(self.config.trained[name]).kind == "nothing":
                continue
            scores = {}
            for number, point in enumerate(training.grid.points(training.settings)):
                plain = self._training(name, (0, 0))
                inputs = {role: of for role, of in plain.inputs.items() if role != "chosen"}
                yield replace(
                    plain,
                    name=files.tried(name, number),
                    work=f"{WORK}.trying:work",
                    settings={
                        **plain.settings,
                        "settings": point.model_dump(mode="json"),
                        "scorer": self.config.scorer,
                    },
                    inputs=inputs | {"validation": files.VALIDATION},
                    group=files.tried(name, number),
                )
                scores[f"{number}/{name}"] = f"{files.tried(name, number)}:score.json"
            if training.grid.select == "shared":
                shared.setdefault(files.settled(name, training), {}).update(scores)
            else:
                yield Stage(files.settled(name, training), f"{WORK}.trying:choose", inputs=scores)
        for stage, scores in shared.items():
            yield Stage(stage, f"{WORK}.trying:choose", inputs=scores)

    def _training(self, name: str, replicate: Replicate) -> Stage:
        config, training = self.config, self.config.training_of(name)
        spec, method = str(config.arms[name].train), training.record
        n_steps = self._n_steps(name)
        inputs = {"facts": files.training_facts(spec, replicate[0])}
        if "known" in method.needs:
            inputs["known"] = files.training_facts("known", replicate[0])
        if training.settings.stop == "validation":
            inputs["validation"] = files.VALIDATION
        if training.grid is not None and parse_arm(spec).kind != "nothing":
            inputs["chosen"] = f"{files.settled(name, training)}:chosen.json"
        settings = {
            "model": config.arms[name].model or config.model,
            "dtype": config.dtype,
            "method": training.method,
            "method_version": method.version,
            "settings": training.settings.model_dump(mode="json"),
            "styles": [style.model_dump(mode="json") for style in config.training_styles(name).values()],
            "seed": training_seed(config.seed, replicate),
        }
        return self.computing(
            files.adapter(name, replicate),
            "train",
            settings,
            inputs,
            n_steps * step_cost(method.effort(training.settings), training.settings),
            files.arm_folder(name, replicate),
        )

    def _over_training(self, name: str, measured: Stage, over: str) -> Stage:
        """A measure of the weights of every step that is kept, of the model before the first, and of the last."""
        kept = self.config.training_of(name).settings.kept(self._n_steps(name))
        cost = measured.cost * (len(kept) + 2)
        return replace(measured, name=over, work=f"{WORK}.measure:over_training", cost=cost)

    def _n_steps(self, name: str) -> int:
        """Optimiser steps of a trained arm, at most."""
        n_facts = self.config.facts.n_train or USUAL_POOL // 10
        return self.config.training_of(name).settings.n_steps(n_facts * parse_arm(self.config.trained[name]).times)

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
        return self.computing(
            files.measured(name, replicate, style, measure.name),
            "measure",
            {**model, "measure": measure.name, "settings": settings.model_dump(mode="json")},
            inputs,
            measure.cost(self.shape, settings) if model.get("tuned", True) else 0.0,
            files.arm_folder(name, replicate),
            version=measure.version,
        )


def training_seed(seed: int, replicate: Replicate) -> int:
    """The seed of a replicate's training, the same for all arms; the study's own for the first."""
    if replicate == (0, 0):
        return seed
    return int(np.random.SeedSequence([seed, *replicate]).generate_state(1)[0])
