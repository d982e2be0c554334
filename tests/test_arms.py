"""Runs are known by prompt and arm: two arms of one prompt never share a base run, a control or a patch's source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import pytest
import torch

from subjattn.backends import BACKENDS, BackendName, open_backend
from subjattn.engine import cones, interventions, prefix
from subjattn.engine.interventions import Block, Output, Patch, Row, Run, controls
from subjattn.errors import UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.metrics import METRICS, measure_rows
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, Style, make_prompts


ARMS = ("base", "tuned")


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 3, seed=3), tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms are carried instead of refused, and one arm's base run is moved, as another model's would be."""
    monkeypatch.setattr(interventions, "check_arms", lambda rows: None)
    run = cones.run_shared

    def moved(model: Any, runs: list[Run], *rest: Any) -> Any:
        base = run(model, runs, *rest)
        with torch.inference_mode():
            for i, one in enumerate(runs):
                if one.arm == "tuned":
                    for stream in base.streams:
                        stream[i] += torch.linspace(-1, 1, stream.shape[-1])
                    base.logits_of(one)[:] += torch.linspace(-1, 1, base.logits.shape[-1])
        return base

    monkeypatch.setattr(cones, "run_shared", moved)


def rows_of(prompts: Iterable[Prompt], arms: Iterable[str]) -> list[Row]:
    first, second, *_ = prompts
    rows = []
    for arm in arms:
        block = Block.between(first.predicting, first.subject_positions, (1,))
        at = (first.prediction,)
        contrast = (5, 6)
        rows += [Row(prompt, contrast=contrast, arm=arm) for prompt in (first, second)]
        rows += [Row(first, block, contrast=contrast, arm=arm)]
        rows += [Row(first, patches=(Patch(1, at, second),), contrast=contrast, arm=arm)]
        rows += [Row(first, patches=(Patch(2, at, Run(second, arm), "mlp_out"),), contrast=contrast, arm=arm)]
    return rows


def logits_of(outputs: Iterable[Output]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for output in outputs:
        split = output.logits.split([len(row.prompt.predicting) for row in output.rows])
        found |= zip(output.index, split, strict=True)
        for j, row in enumerate(output.rows):
            if not row.plain:
                assert output.control is not None
                assert output.control.rows[output.control_of[j]].run == row.run
    return found


@pytest.mark.usefixtures("carried")
def test_arms_in_one_batch_are_those_by_themselves(llama: LoadedModel, prompts: PromptSet) -> None:
    rows = rows_of(prompts, ARMS)
    together = logits_of(cones.forward(llama.model, rows))
    half = len(rows) // 2
    for number, arm in enumerate(ARMS):
        for i, logits in logits_of(cones.forward(llama.model, rows_of(prompts, [arm]))).items():
            torch.testing.assert_close(together[number * half + i], logits, atol=1e-4, rtol=0)
    assert all((together[i] - together[half + i]).abs().max() > 0.1 for i in (0, 2, 3))
    found = measure_rows(cones.forward(llama.model, rows), rows, dict.fromkeys(METRICS))
    for number, arm in enumerate(ARMS):
        own = rows_of(prompts, [arm])
        alone = measure_rows(cones.forward(llama.model, own), own, dict.fromkeys(METRICS))
        for metric in METRICS:
            part = slice(number * half, (number + 1) * half)
            torch.testing.assert_close(
                torch.tensor(found.values[metric][part]), torch.tensor(alone.values[metric]), atol=2e-4, rtol=0
            )
            if metric != "kl":
                torch.testing.assert_close(
                    torch.tensor(found.control[metric][part]), torch.tensor(alone.control[metric]), atol=2e-4, rtol=0
                )


@pytest.mark.usefixtures("carried")
def test_a_patch_takes_its_values_from_the_run_that_it_names(llama: LoadedModel, prompts: PromptSet) -> None:
    """A prompt stands for its run under the row's arm; a run of the other arm is another source."""
    first, second, _ = prompts
    at = (first.prediction,)
    sources = second, Run(second, "base"), Run(second, "tuned")
    rows = [Row(first, patches=(Patch(1, at, source),), arm="base") for source in sources]
    own, same, crossed = logits_of(cones.forward(llama.model, rows)).values()
    torch.testing.assert_close(own, same, atol=1e-5, rtol=0)
    assert (own - crossed).abs().max() > 0.1


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_a_control_of_each_arm(llama: LoadedModel, prompts: PromptSet, backend: BackendName) -> None:
    rows = rows_of(prompts, ARMS)
    assert sorted(logits_of(open_backend(backend, llama.model).forward(rows))) == list(range(len(rows)))


def test_controls_are_one_for_every_run_and_contrast(prompts: PromptSet) -> None:
    rows = [row for row in rows_of(prompts, ARMS) if not row.plain]
    beside, of = controls(rows)
    assert [(row.run, row.contrast) for row in beside] == [(Run(prompts[0], arm), (5, 6)) for arm in ARMS]
    assert of == [0, 0, 0, 1, 1, 1]


def test_arms_share_no_beginning(
    llama: LoadedModel, tokenizer: Any, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot prompts begin alike, but not under two models."""
    style = Style(template=TEMPLATES["country"]["list"], shots=2)
    few = make_prompts(draw(cities, 4, seed=3), tokenizer, style, demonstrations=draw(cities, 9, seed=4))
    whole: list[int] = []
    run = prefix.run_base
    monkeypatch.setattr(prefix, "run_base", lambda m, runs, parts: whole.append(len(runs)) or run(m, runs, parts))
    for arms in (("base",), ARMS):
        prefix.run_shared(llama.model, [Run(prompt, arm) for prompt in few for arm in arms], (), cones.Budget())
    assert whole == [1, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_arm_that_the_model_has_not_is_refused(llama: LoadedModel, prompts: PromptSet, backend: BackendName) -> None:
    opened = open_backend(backend, llama.model)
    at = (prompts[0].prediction,)
    for row in (Row(prompts[0], arm="tuned"), Row(prompts[0], patches=(Patch(1, at, Run(prompts[1], "tuned")),))):
        with pytest.raises(UnsupportedModel, match="a row of arm 'tuned' was asked of a single model"):
            list(opened.forward([row]))
