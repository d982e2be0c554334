"""Run a study: facts, arms, measures, contrasts, claims, report; finished stages are reused.

| under the run's folder | what |
|---|---|
| facts/facts.parquet | facts, their split, thirds and lengths |
| arms/ARM/adapter/ | what was trained |
| arms/ARM/styles/STYLE/ | measures of one arm in one style |
| training_facts/ | what the reference arm answers to facts the others learn |
| measures.nc, patching-STYLE.nc, tokens-STYLE.nc, predictions.parquet | measures of all arms |
| summary.json, manifest.json, study.yaml, report.html | results |

A summary stands for all that lies beside it: it is taken away before any stage is made anew, and comes
back last.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.finetune.lora import train_adapter
from subjattn.measures.answers import predict, reason
from subjattn.models import (
    LoadedModel,
    identity,
    load_model,
    load_tokenizer,
    model_shape,
    resolve_adapter,
    resolve_model,
)
from subjattn.plots import report
from subjattn.progress import Progress
from subjattn.prompts import Prompt, PromptSet, Style, make_prompts
from subjattn.stages import alone, finished, key_of, writing
from subjattn.study import measuring, summary
from subjattn.study.choosing import choose, identity_of
from subjattn.study.config import Arm, StudyConfig


TRAINING_ROWS = 4.0
"""Cost of training on a fact once in forward passes of a prompt, for time estimates."""
BASE_CHECK_FACTS = 150
"""Training facts per arm on which the reference arm's accuracy is shown."""
SCHEMA = 2
"""Raised when a stage's files change meaning, so that older ones are made anew."""


def run_study(config: StudyConfig, out: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Run a study into a folder and return its summary; what is finished there already is reused.

    Raises:
        SubjattnError: something about the study cannot be right; finished stages stay.
    """
    out = Path(out)
    with alone(out), Progress(console) as progress:
        Runner(config, out, progress).run()
        progress.stage("contrasts, claims and report")
        result = summary.write(config, out)
        report.write(out)
    return result


@dataclass
class Runner:
    """One run of a study into a folder."""

    config: StudyConfig
    out: Path
    progress: Progress

    def run(self) -> None:
        """All stages in order, after a look that every arm's model and adapter are there."""
        self.progress.stage("looking for models")
        for arm in self.config.arms.values():
            resolve_model(arm.model or self.config.model)
            if arm.adapter is not None:
                resolve_adapter(arm.adapter)
        facts = self.facts_stage()
        training = sum(self._training_cost(self._n_train(facts, spec)) for spec in self.config.trained.values())
        measuring_cost = len(self.config.arms) * len(self.config.styles) * self._measuring_cost
        self.progress.plan(training + self._training_facts_cost + measuring_cost)
        for name, split_name in self.config.trained.items():
            self.training_stage(name, split_name, facts)
        for name in self.config.arms:
            self.measuring_stages(name, facts)
        if self.config.trained:
            self.training_facts_stage(facts)

    def writing(self, folder: Path, key: str) -> AbstractContextManager[Path]:
        """A stage to be made anew; the summary of what was there before no longer stands."""
        (self.out / "summary.json").unlink(missing_ok=True)
        return writing(folder, key)

    @cached_property
    def facts_key(self) -> str:
        config = self.config
        return key_of(
            schema=SCHEMA,
            source=identity_of(config.facts),
            n_test=config.facts.n_test,
            split=config.facts.split.model_dump(),
            n_train=config.facts.n_train if config.trained else None,
            splits=self._splits,
            shots=max(style.shots for style in config.styles.values()),
            model=identity(config.model),
            style=self._first_style.model_dump(),
            dtype=config.dtype if config.facts.split.needs_model else None,
            seed=config.seed,
        )

    @property
    def _splits(self) -> list[str]:
        return list(dict.fromkeys(self.config.trained.values()))

    @property
    def _first_style(self) -> Style:
        return next(iter(self.config.styles.values()))

    def facts_stage(self) -> pd.DataFrame:
        """Facts with their split, one row each, as `facts/facts.parquet`."""
        folder, config = self.out / "facts", self.config
        if not finished(folder, self.facts_key):
            self.progress.stage("facts and splits")
            table = choose(config, lambda: load_model(config.model, dtype=config.dtype))
            with self.writing(folder, self.facts_key) as temporary:
                table.to_parquet(temporary / "facts.parquet", index=False)
        return pd.read_parquet(folder / "facts.parquet")

    def training_key(self, name: str) -> str:
        config = self.config
        return key_of(
            facts=self.facts_key,
            model=identity(config.model),
            split=config.arms[name].train,
            own_model=config.arms[name].model and identity(config.arms[name].model or ""),
            styles=[(style, found.model_dump()) for style, found in config.training_styles.items()],
            training=config.training.model_dump(),
            dtype=config.dtype,
            seed=config.seed,
        )

    def training_stage(self, name: str, split_name: str, facts: pd.DataFrame) -> None:
        """The arm's adapter, as `arms/ARM/adapter`."""
        folder, key, config = self.out / "arms" / name / "adapter", self.training_key(name), self.config
        own = facts[facts[f"train_{split_name}"]]
        units = self._training_cost(len(own))
        if finished(folder, key):
            self.progress.skip(units)
            return
        self.progress.stage(f"train {name}")
        base = load_model(config.arms[name].model or config.model, dtype=config.dtype)
        n_steps = config.training.n_steps(len(own))
        prompts = self._training_prompts(own, base)
        with self.writing(folder, key) as temporary:
            train_adapter(
                base,
                prompts,
                config.training,
                temporary,
                seed=config.seed,
                on_step=lambda: self.progress.advance(units / n_steps),
            )

    def _training_cost(self, n_facts: int) -> float:
        return self.config.training.n_steps(n_facts) * min(self.config.training.batch_size, n_facts) * TRAINING_ROWS

    @staticmethod
    def _n_train(facts: pd.DataFrame, spec: str) -> int:
        return int(facts[f"train_{spec}"].sum())

    def _training_prompts(self, facts: pd.DataFrame, base: LoadedModel) -> list[Prompt]:
        """One prompt per fact, the styles taking turns."""
        styles = [make_prompts(facts, base.tokenizer, style) for style in self.config.training_styles.values()]
        return [styles[i % len(styles)][i] for i in range(len(facts))]

    def measuring_key(self, name: str, style: str) -> str:
        config, arm = self.config, self.config.arms[name]
        return key_of(
            facts=self.facts_key,
            model=identity(arm.model or config.model),
            adapter=self.training_key(name) if arm.train else arm.adapter and identity(arm.adapter),
            style=config.styles[style].model_dump(),
            scorer=config.scorer,
            measures=config.measures.model_dump(),
            dtype=config.dtype,
            reference=None if name == config.reference else self.measuring_key(config.reference, style),
        )

    def measuring_stages(self, name: str, facts: pd.DataFrame) -> None:
        """The arm's measures in every style, as `arms/ARM/STYLE`."""
        config, model = self.config, None
        for style in config.styles:
            folder, key = self._style_folder(name, style), self.measuring_key(name, style)
            if finished(folder, key):
                self.progress.skip(self._measuring_cost)
                continue
            self.progress.stage(f"measure {name} ({style})")
            if model is None:
                model = self.load_arm(name)
                self._check_shape(name, model)
            prompts = self._prompts(name, model, facts, config.styles[style])
            with self.writing(folder, key) as temporary:
                measuring.measure(
                    model,
                    prompts,
                    config.measures,
                    temporary,
                    scorer=config.scorer,
                    own_prompts=config.styles[style].chain_of_thought,
                    known=self._known_to_reference(name, style),
                    seed=config.seed,
                    advance=self.progress.advance,
                )

    def _style_folder(self, name: str, style: str) -> Path:
        return summary.style_folder(self.out, name, style)

    def _known_to_reference(self, name: str, style: str) -> set[str] | None:
        if name == self.config.reference:
            return None
        predictions = pd.read_parquet(self._style_folder(self.config.reference, style) / "predictions.parquet")
        return set(predictions["fact_id"][predictions["correct"]])

    def training_facts_stage(self, facts: pd.DataFrame) -> None:
        """The reference arm's answers to some of each arm's training facts, as `training_facts/`."""
        config, folder = self.config, self.out / "training_facts"
        key = key_of(measured=self.measuring_key(config.reference, config.training_style), n=BASE_CHECK_FACTS)
        if finished(folder, key):
            self.progress.skip(self._training_facts_cost)
            return
        self.progress.stage(f"{config.reference} on training facts")
        model, tables = self.load_arm(config.reference), []
        for split_name in self._splits:
            own = facts[facts[f"train_{split_name}"]]
            some = draw(own, min(BASE_CHECK_FACTS, len(own)), config.seed)
            predictions = predict(
                model,
                self._asked(some, model, config.styles[config.training_style]),
                config.scorer,
            )
            tables.append(predictions.assign(split=split_name))
            self.progress.advance(self._training_facts_cost / len(self._splits))
        with self.writing(folder, key) as temporary:
            pd.concat(tables).to_parquet(temporary / "predictions.parquet", index=False)

    @property
    def _training_facts_cost(self) -> float:
        n_facts = min(BASE_CHECK_FACTS, self.config.facts.n_train or BASE_CHECK_FACTS)
        return len(self._splits) * n_facts * measuring.ROWS_TO_PREDICT

    @cached_property
    def _measuring_cost(self) -> float:
        n_layers = model_shape(self.config.model)[0]
        return measuring.cost(self.config.facts.n_test, self.config.measures, n_layers)

    def load_arm(self, name: str) -> LoadedModel:
        """The arm's model: the study's, the trained adapter on it, or what the user brought."""
        arm: Arm = self.config.arms[name]
        adapter = str(self.out / "arms" / name / "adapter") if arm.train else arm.adapter
        return load_model(arm.model or self.config.model, adapter=adapter, dtype=self.config.dtype)

    def _check_shape(self, name: str, model: LoadedModel) -> None:
        config = model.model.config.get_text_config()
        shape, expected = (config.num_hidden_layers, config.num_attention_heads), model_shape(self.config.model)
        if shape != expected:
            raise BadInput(
                f"arm {name!r} has {shape[0]} layers of {shape[1]} heads, the study's model {expected[0]} of "
                f"{expected[1]}: only models of one architecture can be compared head by head"
            )

    def _asked(
        self, asked: pd.DataFrame, model: LoadedModel, style: Style, shown: pd.DataFrame | None = None
    ) -> PromptSet:
        """Facts asked in a style, behind what the model thought where the style lets it think."""
        prompts = make_prompts(asked, model.tokenizer, style, demonstrations=shown)
        if not style.chain_of_thought:
            return prompts
        thoughts = reason(model, prompts)
        return make_prompts(asked, model.tokenizer, style, demonstrations=shown, reasoning=thoughts)

    def _prompts(self, name: str, model: LoadedModel, facts: pd.DataFrame, style: Style) -> PromptSet:
        """The arm's prompts of the test facts, which must have the same tokens as the study model's."""
        asked, shown = facts[facts["test"]], facts[facts["demonstration"]]
        if self.config.arms[name].model is not None:
            own, other = (
                make_prompts(asked, tokenizer, style, demonstrations=shown)
                for tokenizer in (model.tokenizer, load_tokenizer(self.config.model))
            )
            for a, b in zip(own, other, strict=True):
                if a.ids != b.ids:
                    raise BadInput(
                        f"arm {name!r} reads {a.text!r} as other tokens than the study's model does, so their numbers "
                        "are of different prompts: save the same tokenizer with both"
                    )
        return self._asked(asked, model, style, shown)
