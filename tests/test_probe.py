"""Probes against plain scikit-learn on `output_hidden_states`, and whether they find what was planted and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier, RidgeClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import probing
from subjattn.measures.activations import Stream
from subjattn.measures.alone import measure
from subjattn.measures.probe import random_twin
from subjattn.measures.record import VALUE_COLUMNS, measure_of, values_of
from subjattn.models import LoadedModel
from subjattn.models.arms import Arms
from subjattn.prompts import Prompt, PromptSet, make_prompts
from subjattn.study.read import load_study, parse_study
from subjattn.study.run import run_study


EXPERIMENTS = Path(__file__).parent.parent / "experiments"
Plant = Callable[[Callable[[PromptSet, int], np.ndarray]], None]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    """Cities of a few large countries."""
    large = cities[cities["answers"].map(lambda answers: answers[0] in ("India", "China", "Brazil"))]
    return make_prompts(draw(large, 120, seed=3), tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Gives states of one's own, `[fact, d_model]` by layer, in the place of the model's at every role."""

    def with_states(states: Callable[[PromptSet, int], np.ndarray]) -> None:
        def in_memory(stream: Stream) -> xr.Dataset:
            layers = [np.stack([states(stream.prompts, layer)] * len(stream.roles), 1) for layer in stream.layers]
            return stream.labels({stream.sites[0]: np.stack(layers, 1)}).copy(
                data={stream.sites[0]: np.stack(layers, 1).astype(np.float32)}
            )

        monkeypatch.setattr(Stream, "in_memory", in_memory)

    return with_states


def two_labels(prompts: PromptSet, seed: int = 0) -> pd.Series:
    """Labels that nothing but themselves knows of."""
    values = np.random.default_rng(seed).permutation(np.arange(len(prompts)) % 2)
    return pd.Series([("no", "yes")[i] for i in values], [prompt.fact_id for prompt in prompts], name="colour")


@torch.no_grad()
def hidden(model: LoadedModel, prompts: PromptSet, layer: int, role: str) -> np.ndarray:
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
        states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[layer][0]
        rows.append(states[prompt.role(role)[0]].numpy())
    return np.stack(rows).astype(float)


def splits(prompts: PromptSet, labels: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    subjects = [prompt.subject for prompt in prompts]
    yield from StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, subjects)


def test_ridge_is_a_plain_pipeline_on_hidden_states(tiny: LoadedModel, prompts: PromptSet) -> None:
    """Of single facts per subject, where scikit-learn's own leave-one-out chooses the penalty."""
    found = sa.probe(tiny, prompts, seed=1)
    labels = np.array([prompt.answers[0] for prompt in prompts])
    for layer in (0, 2):
        for role in ("subject_last", "prediction"):
            states = hidden(tiny, prompts, layer, role)
            here = found.sel(layer=layer, role=role)
            for train, test in splits(prompts, labels, 1):
                plain = RidgeClassifierCV(probing.PENALTIES * len(train))
                pipeline = make_pipeline(StandardScaler(), plain).fit(states[train], labels[train])
                expected = pipeline.predict(states[test])
                given = np.array(found.attrs["classes"])[here["predicted"].values[test]]
                assert list(given) == list(expected)
                assert list(here["correct"].values[test]) == list(expected == labels[test])
                scores = pipeline.decision_function(states[test])
                areas = [
                    (roc_auc_score(labels[test] == name, scores[:, i]), name) for i, name in enumerate(plain.classes_)
                ]
                weighted = sum(area * (labels[test] == name).mean() for area, name in areas)
                assert float(here["ranked"][test].mean()) == pytest.approx(weighted, abs=1e-6)


def test_ridge_is_a_plain_pipeline_of_two_labels(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    labels = two_labels(prompts)
    found = sa.probe(tiny_models["llama"], prompts, labels, layers=[1], roles="subject_last")
    states, of = hidden(tiny_models["llama"], prompts, 1, "subject_last"), labels.to_numpy()
    for train, test in splits(prompts, of, 0):
        plain = make_pipeline(StandardScaler(), RidgeClassifierCV(probing.PENALTIES * len(train)))
        right = plain.fit(states[train], of[train]).predict(states[test]) == of[test]
        assert list(found["correct"].values[test, 0, 0]) == list(right)


def test_logistic_is_a_plain_pipeline(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    found = sa.probe(tiny_models["llama"], prompts, layers=[1], roles="subject_last", method="logistic")
    states = hidden(tiny_models["llama"], prompts, 1, "subject_last")
    labels = np.array([prompt.answers[0] for prompt in prompts])
    subjects = np.unique([prompt.subject for prompt in prompts], return_inverse=True)[1]

    def plain(penalty: float, rows: np.ndarray) -> Any:
        model = LogisticRegression(C=1 / (penalty * len(rows)), max_iter=2000)
        return make_pipeline(StandardScaler(), model).fit(states[rows], labels[rows])

    for train, test in splits(prompts, labels, 0):
        order = np.random.default_rng(0).permutation(np.unique(subjects[train]))
        held = np.isin(subjects[train], order[: len(order) // 4])
        shares = {
            penalty: plain(penalty, train[~held]).score(states[train[held]], labels[train[held]])
            for penalty in probing.LOGISTIC_PENALTIES
        }
        best = max(penalty for penalty, share in shares.items() if share == max(shares.values()))
        assert list(found["correct"].values[test, 0, 0]) == list(
            plain(best, train).predict(states[test]) == labels[test]
        )


@pytest.mark.parametrize("width", [6, 60])
def test_the_penalty_errs_least_of_subjects_left_out(width: int) -> None:
    """By refitting without each subject; more facts than features, and fewer."""
    rng = np.random.default_rng(0)
    subjects = np.array([0, 0, 0, 1, 1, 2, 3, 3, *range(4, 30)])
    labels = rng.integers(3, size=len(subjects))
    states = rng.normal(size=(len(subjects), width)) + 0.5 * np.eye(3, width)[labels]
    scaled, targets = StandardScaler().fit_transform(states), 2.0 * np.eye(3)[labels] - 1
    errors = []
    for alpha in probing.PENALTIES * len(subjects):
        left_out = [
            ((Ridge(alpha).fit(scaled[train], targets[train]).predict(scaled[test]) - targets[test]) ** 2).sum()
            for train, test in LeaveOneGroupOut().split(scaled, groups=subjects)
        ]
        errors.append(sum(left_out))
    alpha = float(probing.PENALTIES[int(np.argmin(errors))] * len(subjects))
    found = probing.Ridge(states, subjects).probe(labels, 3)
    assert found.penalty == alpha
    expected = RidgeClassifier(alpha).fit(scaled, labels).decision_function(scaled)
    np.testing.assert_allclose(found.scores(states), expected, atol=1e-8)


def test_what_is_planted_in_a_layer_is_found_there(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, plant: Plant
) -> None:
    labels = two_labels(prompts)

    def states(some: PromptSet, layer: int) -> np.ndarray:
        noise = np.random.default_rng(layer).normal(size=(len(some), 32))
        signs = np.where(labels[[prompt.fact_id for prompt in some]] == "yes", 3.0, -3.0)
        return noise + (layer == 1) * signs[:, None] * np.linspace(-1, 1, 32)

    plant(states)
    found = sa.probe(tiny_models["llama"], prompts, labels, roles="subject_last")
    accuracy, control = (found[name].isel(role=0).mean("fact").values for name in ("correct", "control"))
    assert accuracy[1] > 0.97
    assert all(abs(accuracy[[0, 2]] - 0.5) < 0.17)
    assert all(abs(control - 0.5) < 0.17)
    assert float(found["selectivity"].sel(layer=1).mean()) > 0.3
    assert float(found["ranked"].sel(layer=1).mean()) > 0.99
    assert abs(float(found["characters"].mean()) - 0.5) < 0.17
    assert float(found["majority"].mean()) == pytest.approx(0.5, abs=0.1)


def test_a_label_of_the_name_token_is_exposed(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, plant: Plant
) -> None:
    """States that know the name's last token and no more: the control is told as well as the label."""
    table = np.random.default_rng(1).normal(size=(512, 400))

    def last(prompt: Prompt) -> int:
        return prompt.ids[prompt.subject_span[1] - 1]

    plant(lambda some, _: np.stack([table[last(prompt)] for prompt in some]))
    labels = {prompt.fact_id: last(prompt) % 2 for prompt in prompts}
    found = sa.probe(tiny_models["llama"], prompts, labels, layers=[1], roles="subject_last")
    known = found["control"].notnull()
    assert 30 < int(known.sum()) < len(prompts)
    assert float(found["correct"].where(known).mean()) > 0.95
    assert float(found["control"].mean()) > 0.95
    assert abs(float(found["selectivity"].mean())) < 0.05
    assert float(found["correct"].where(~known).mean()) < 0.8


def test_a_label_of_the_names_length_is_exposed(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, plant: Plant
) -> None:
    """States that say how many tokens a name has, as every model's do: a probe is right, and knows nothing."""

    def counted(some: PromptSet, layer: int) -> np.ndarray:
        noise = 0.1 * np.random.default_rng(layer).normal(size=(len(some), 32))
        return noise + np.eye(32)[[min(len(prompt.subject_positions), 31) for prompt in some]]

    plant(counted)
    middle = np.median([len(prompt.subject_positions) for prompt in prompts])
    long = pd.Series({prompt.fact_id: len(prompt.subject_positions) > middle for prompt in prompts})
    found = sa.probe(tiny_models["llama"], prompts, long, roles="subject_last")
    assert float(found["correct"].mean()) > 0.9
    assert float(found["length"].mean()) > 0.97
    means = sa.probe_scores(found)["length"]
    np.testing.assert_allclose(means, float(found["length"].mean()))


def test_a_label_of_the_names_letters_is_exposed(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, plant: Plant
) -> None:
    plant(lambda some, layer: np.random.default_rng(layer).normal(size=(len(some), 32)))
    ends = pd.Series({prompt.fact_id: prompt.subject[-1] in "aeiou" for prompt in prompts})
    found = sa.probe(tiny_models["llama"], prompts, ends, roles="subject_last")
    assert float(found["characters"].mean()) > 0.8
    assert float(found["correct"].mean()) < 0.7


def test_controls_recur_by_token_and_folds_part_subjects(prompts: PromptSet) -> None:
    twice = [*prompts, *(replace(prompt, fact_id=f"{prompt.fact_id}-b") for prompt in prompts[:40])]
    task = probing.task_of(twice, {prompt.fact_id: prompt.answers[0] for prompt in twice}, 5, 0)
    for labels in task.controls:
        assert len({(token, label) for token, label in zip(task.tokens, labels, strict=True)}) == len(set(task.tokens))
    assert len({(subject, fold) for subject, fold in zip(task.subjects, task.fold, strict=True)}) == len(
        set(task.subjects)
    )
    there = np.ones(len(twice), bool)
    expected = [
        any(task.tokens[j] == token and task.fold[j] != task.fold[i] for j in range(len(twice)))
        for i, token in enumerate(task.tokens)
    ]
    assert list(probing.recurring(task, there)) == expected


def test_moved_and_erased_are_told_apart(
    tuned: Callable[[str], tuple[Arms, dict[str, LoadedModel]]], prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tuned model holds the label in another direction, the other nowhere."""
    arms, labels = tuned("llama")[0], two_labels(prompts)
    signs = np.where(labels.to_numpy() == "yes", 4.0, -4.0)[:, None]
    where = {"base": np.eye(32)[3], "one": np.eye(32)[20], "two": np.zeros(32)}
    names = {arms.arm(name): name for name in where}

    def in_memory(stream: Stream) -> xr.Dataset:
        noise = np.random.default_rng(5).normal(size=(len(prompts), 1, 1, 32))
        states = (noise + (signs * where[names[stream.arm]])[:, None, None]).astype(np.float32)
        return stream.labels({"resid_pre": states}).copy(data={"resid_pre": states})

    monkeypatch.setattr(Stream, "in_memory", in_memory)
    options: dict[str, Any] = {"layers": [1], "roles": "prediction"}
    found = sa.probe_across(arms, prompts, labels, between=list(where), **options)
    shares = found["correct"].mean(["fact", "layer", "role"])
    right = {(a, b): float(shares.sel(trained_on=a, tested_on=b)) for a in where for b in where}
    assert right["base", "base"] > 0.97 and right["one", "one"] > 0.97
    assert all(value < 0.75 for (a, b), value in right.items() if a != b or a == "two")
    alone = sa.probe(arms, prompts, labels, arm="one", **options)
    for name in ("correct", "ranked", "control", "predicted"):
        own = found[name].sel(trained_on="one", tested_on="one", drop=True)
        np.testing.assert_array_equal(own.values, alone[name].values)


def test_heads_are_probed_one_by_one(tiny: LoadedModel, prompts: PromptSet) -> None:
    found = sa.probe(tiny, prompts, site="z", layers=[2])
    assert found["correct"].dims == ("fact", "layer", "role", "head")
    states = sa.activations(tiny, prompts, "z", layers=[2])["z"].sel(layer=2, role="prediction", head=1).values
    task = probing.task_of(prompts, {prompt.fact_id: prompt.answers[0] for prompt in prompts}, 5, 0)
    scores = probing.out_of_fold(states, [states], task, task.labels[None], "ridge")[0, 0]
    expected = probing.right(scores, task.labels)
    np.testing.assert_array_equal(found["correct"].sel(layer=2, role="prediction", head=1), expected)


def test_a_twin_has_the_shape_alone(tiny: LoadedModel, prompts: PromptSet) -> None:
    before = torch.get_rng_state()
    twin = random_twin(tiny.model, 3)
    assert torch.equal(before, torch.get_rng_state())
    ours, theirs = (dict(model.named_parameters()) for model in (tiny.model, twin))
    assert {name: one.shape for name, one in ours.items()} == {name: one.shape for name, one in theirs.items()}
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    found = sa.probe(tiny, prompts, twin=True, seed=3, layers=[1])
    expected = sa.probe(twin, prompts, seed=3, layers=[1])["correct"]
    np.testing.assert_array_equal(found["twin"], expected)


def test_facts_outside_are_not_defined(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    """A label of a single member, a fact without a label, and one that lacks the role."""
    llama, labels = tiny_models["llama"], two_labels(prompts).astype(object)
    short = replace(prompts[5], span=(prompts[5].subject_span[1] - 1, prompts[5].subject_span[1]))
    prompts = PromptSet(prompts.style, (*prompts[:5], short, *prompts[6:]))
    labels.iloc[0], labels.iloc[1] = "alone", None
    found = sa.probe(llama, prompts, labels, roles=("subject_first", "prediction"), layers=[1])
    assert found.attrs["left_out"] == 2
    assert found.attrs["classes"] == ["no", "yes"]
    assert found["label"].values[:2].tolist() == ["", ""]
    defined = found["correct"].notnull().sel(layer=1)
    assert not defined[:2].any()
    assert defined.sel(role="prediction")[2:].all()
    has = [len(prompt.role("subject_first")) > 0 for prompt in prompts]
    assert not all(has)
    assert defined.sel(role="subject_first").values[2:].tolist() == has[2:]
    assert ((found["predicted"] == -1) == found["correct"].isnull()).all()


def test_what_cannot_be_probed_is_refused(tiny: LoadedModel, prompts: PromptSet) -> None:
    one = {prompt.fact_id: "same" for prompt in prompts}
    for given, message in (
        ({"target": one}, "needs two labels of 5 subjects or more each, and of 120 facts with a label 1 has"),
        ({"target": {prompt.fact_id: prompt.fact_id for prompt in prompts}}, "with a label 0 has: .*; ask more facts"),
        ({"target": "relation"}, r"target 'relation': give 'answer', or labels by fact id, .*\['relation'\]"),
        ({"target": {"elsewhere": 1}}, "none of the prompts' facts has one: index them by fact_id"),
        ({"target": pd.Series(["a", "b"], ["x", "x"])}, "a fact id stands there twice"),
        ({"method": "svm"}, "method 'svm' is not one of ridge, logistic"),
        ({"folds": 1}, "folds is 1: give 2 or more"),
        ({"site": ["z", "resid_pre"]}, "a probe is of one site"),
        ({"site": "pattern"}, "site 'pattern' is not one of"),
    ):
        with pytest.raises(BadInput, match=message):
            sa.probe(tiny, prompts, **given)
    with pytest.raises(BadInput, match="of 1 facts with a label 0 has"):
        sa.probe(tiny, prompts[:1])
    with pytest.raises(BadInput, match="has no subject: measures of the subject are not defined for it"):
        sa.probe(tiny, [*prompts[1:], replace(prompts[0], span=None)], roles="prediction")
    with pytest.raises(BadInput, match="give what sa.load_arms"):
        sa.probe_across(tiny, prompts)


def test_the_measure_gives_what_the_function_does(tiny: LoadedModel, prompts: PromptSet) -> None:
    settings = {"roles": "subject_last,prediction", "seed": 1}
    found = measure("probe", tiny, prompts, settings)
    expected = sa.probe(tiny, prompts, seed=1)
    rows = pd.DataFrame(values_of(measure_of("probe"), found), columns=VALUE_COLUMNS)
    means = rows.groupby("quantity")["value"].mean()
    at_last = expected.sel(role="subject_last")
    assert means["probe_accuracy"] == pytest.approx(float(at_last["correct"].mean()))
    assert means["probe_auroc"] == pytest.approx(float(at_last["ranked"].mean()))
    over = at_last["correct"].mean("layer") - expected["characters"]
    assert means["probe_over_characters"] == pytest.approx(float(over.mean()))
    with pytest.raises(BadInput, match="probe: roles: 'subject' is not one of"):
        measure("probe", tiny, prompts, {"roles": "subject"})
    with pytest.raises(BadInput, match="needs two labels"):
        measure("probe", tiny, prompts, {"target": "known"})


def test_relations_are_read_from_the_facts(tiny_models: dict[str, LoadedModel], cities: pd.DataFrame) -> None:
    facts = draw(cities, 60, seed=0)
    facts["relation"] = ["country", "land"] * 30
    llama = tiny_models["llama"]
    prompts = make_prompts(facts, llama.tokenizer, TEMPLATES["country"]["list"])
    found = measure("probe", llama, prompts, {"target": "relation"}, facts=facts)
    expected = sa.probe(llama, prompts, facts.set_index("fact_id")["relation"])
    np.testing.assert_array_equal(found["probe_correct"], expected["correct"])
    with pytest.raises(BadInput, match=r"relations are not known: give facts=…"):
        measure("probe", llama, prompts, {"target": "relation"})


def test_the_measure_across_is_what_the_function_gives(
    tuned: Callable[[str], tuple[Arms, dict[str, LoadedModel]]], prompts: PromptSet
) -> None:
    several = tuned("llama")[0]
    with pytest.raises(BadInput, match=r"there are several arms, one, two, other: load one beside its base"):
        measure("probe_across", several, prompts)
    arms = Arms(several.base, {"one": several.sources["one"]})
    found = measure("probe_across", arms, prompts)
    rows = pd.DataFrame(values_of(measure_of("probe_across"), found), columns=VALUE_COLUMNS)
    means = rows.groupby("quantity")["value"].mean()
    shares = sa.probe_across(arms, prompts)["correct"].sel(role="subject_last")
    pairs = product(("base", "one"), repeat=2)
    right = {(a, b): float(shares.sel(trained_on=a, tested_on=b).mean()) for a, b in pairs}
    assert means["probe_erased"] == pytest.approx(right["base", "base"] - right["one", "one"])
    assert means["probe_moved"] == pytest.approx(right["one", "one"] - right["base", "one"])
    (erased,) = [one for one in measure_of("probe_across").quantities if one.name == "probe_erased"]
    assert "definition" not in erased.per_fact(found).attrs


def test_the_study_of_probes_runs_in_small(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """With a random model, and facts of one arm and draw in every control and fold."""
    small = [f"model={tiny_folders['llama']}", "facts.pool=700", "facts.n_train=24", "facts.n_test=120"]
    small += ["training.steps=1", "replicates.draws=2"]
    config = load_study(EXPERIMENTS / "probing.yaml", small)
    claims = config.model_dump(mode="json")["claims"]
    for claim in claims:
        claim["where"] = {**claim["where"], **({"layer": "1-2"} if "layer" in claim["where"] else {})}
    summary = run_study(parse_study(config.model_dump(mode="json") | {"claims": claims}, "test"), tmp_path)
    run = sa.open_run(tmp_path)
    arrays = {arm: run.measure("probe", arm, "list") for arm in ("base", "known", "unknown")}
    assert all((one["fold"] == arrays["base"]["fold"]).all() for one in arrays.values())
    assert all(
        (one["probe_control"].isnull() == arrays["base"]["probe_control"].isnull()).all() for one in arrays.values()
    )
    base = arrays["base"]["probe_selectivity"].sel(role="subject_last", layer=[1, 2]).mean("layer")
    estimates = {claim["id"]: claim["styles"]["list"]["estimate"] for claim in summary["claims"]}
    assert estimates["more-than-the-token"] == pytest.approx(float(base.mean()))
    assert all(estimates[name] is not None for name in ("erased", "not-fetched", "moved"))
    assert len(sa.probe_scores(arrays["known"])) == 6
    assert "What linear probes read of the label" in (tmp_path / "report.html").read_text()
