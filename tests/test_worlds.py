"""Invented worlds: what is said is counted, models recall it, and both are models and facts like any other."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.facts import identity_of_source, read_facts
from subjattn.knowledge.labels import join_labels
from subjattn.measures.answers import predict
from subjattn.models.names import identity, resolve_model
from subjattn.prompts.prefix import neutral_prefix
from subjattn.prompts.swaps import ablate
from subjattn.study.read import parse_study
from subjattn.study.run import run_study
from subjattn.worlds import build as building
from subjattn.worlds import record
from subjattn.worlds.build import MARK, build, folder_of, known, recalled
from subjattn.worlds.record import WORLDS, InventedWorld, Shape, world_of
from subjattn.worlds.sentences import RELATIONS, said_in


SMALL = replace(
    WORLDS["zipf"],
    name="small",
    n_subjects=24,
    n_relations=2,
    n_answers=4,
    n_sentences=400,
    shape=Shape(1, 32, 2),
    steps=600,
    batch=64,
    learning_rate=1e-2,
)
PEOPLE = replace(
    SMALL, name="people", kind="biographies", namesakes=3, n_sentences=1200, shape=Shape(2, 48, 2), learning_rate=5e-3
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(record, "WORLDS", {"small": SMALL, "people": PEOPLE})


worlds = st.builds(
    replace,
    st.sampled_from([SMALL, PEOPLE]),
    n_subjects=st.integers(6, 40),
    n_relations=st.integers(1, 5),
    n_answers=st.integers(1, 6),
    n_sentences=st.integers(1, 300),
    namesakes=st.integers(1, 6),
    seed=st.integers(0, 9),
)


@settings(max_examples=30)
@given(world=worlds)
def test_popularity_counts_what_is_said(world: InventedWorld) -> None:
    said = said_in(world)
    facts = said.facts
    assert len(facts) == world.n_subjects * world.n_relations and facts["fact_id"].is_unique
    assert facts["popularity"].sum() == len(said.sentences) == world.n_sentences
    forms = {name: of for kind in RELATIONS.values() for name, of in kind.items()}
    counted = Counter(said.sentences)
    for fact in facts.itertuples():
        own = [form.format(subject=fact.subject) for form in forms[fact.relation].wordings]
        assert sum(counted[prompt, fact.answers[0]] for prompt in own) == (
            0 if np.isnan(fact.popularity) else fact.popularity
        )
        assert not any(fact.question.format(subject=fact.subject) == prompt for prompt, _ in counted)
    for _, of in facts.groupby("relation"):
        assert of["answers"].str[0].nunique() == world.n_answers
    answers = facts.groupby("relation")["answers"].agg(lambda of: set(of.str[0]))
    assert sum(map(len, answers)) == len(set().union(*answers)), "no answer of two relations"
    names = facts["subject"].drop_duplicates()
    assert len(names) == world.n_subjects
    if world.kind == "biographies":
        last = names.str.split().str[1].value_counts()
        assert last.max() <= world.namesakes and (names.str.split().str.len() == 2).all()
        if world.n_subjects % world.namesakes == 0:
            assert (last == world.namesakes).all()
    words = {word for name in names for word in name.split()}
    assert not words & set().union(*answers), "names are no answers"


def test_popular_subjects_are_said_more(cache: Path) -> None:
    facts = sa.load_facts("world:small")
    mean = facts.groupby("subject", sort=False)["popularity"].sum().to_numpy()
    assert mean[:4].mean() > 3 * mean[-4:].mean()
    assert sa.load_facts("world:small@1")["subject"].tolist() != facts["subject"].tolist()
    pd.testing.assert_frame_equal(sa.load_facts("world:small@0"), facts)


@pytest.fixture(scope="module")
def made(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("worlds") / "small"
    return folder, build(SMALL, folder)


def test_a_strong_world_recalls_what_was_said(made: tuple[Path, dict[str, object]]) -> None:
    """By plain transformers from the folder, fact by fact."""
    folder, about = made
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    facts = said_in(SMALL).facts
    right = []
    for fact in facts.itertuples():
        (form,) = RELATIONS["zipf"][fact.relation].wordings
        ids = tokenizer(form.format(subject=fact.subject), return_tensors="pt").input_ids
        assert tokenizer.unk_token_id not in ids and ids[0, 0] == tokenizer.bos_token_id
        given = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        right.append(tokenizer.decode(given, skip_special_tokens=True).strip() == fact.answers[0])
        if right[-1]:
            assert given[-1] == tokenizer.eos_token_id, "and then ends"
    said = facts["popularity"].notna().to_numpy()
    assert about["recall"] == pytest.approx(np.mean(np.array(right)[said])) and np.mean(np.array(right)[said]) >= 0.98
    assert (about["n_said"], about["n_never_said"]) == (said.sum(), (~said).sum())
    octaves: dict[str, list[float]] = about["recall_by_exposures"]  # type: ignore[assignment]
    assert sum(n for _, n in octaves.values()) == said.sum()
    often = said_in(SMALL)
    often.facts["popularity"] *= 1000
    found = recalled(known(model, tokenizer, often))
    assert sum(n for _, n in found["recall_by_exposures"].values()) == said.sum(), "however often it is said"
    ids = tokenizer(f"{facts['question'][0]}".format(subject=facts["subject"][0])).input_ids
    assert tokenizer.unk_token_id not in ids, "words that nobody said have tokens too"


def test_training_repeats_to_the_bit(made: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert build(SMALL, tmp_path / "again") == made[1]
    assert torch.equal(before, torch.random.get_rng_state())
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (made[0], tmp_path / "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_world_is_a_model_and_a_source_of_facts(caplog: pytest.LogCaptureFixture) -> None:
    model, facts = sa.load_model("world:people"), sa.load_facts("world:people")
    assert "world:people is made now, once" in caplog.text
    caplog.clear()
    assert resolve_model("world:people") == str(folder_of(PEOPLE)) and not caplog.text, "kept"
    known = facts[facts["popularity"] > 0]
    for form in ("cloze", "paraphrase"):
        prompts = sa.make_prompts(known, model.tokenizer, form)
        assert all(
            model.tokenizer.decode(prompt.ids[slice(*prompt.span)]).split() == prompt.subject.split()
            for prompt in prompts
        )
        assert predict(model, prompts)["correct"].mean() >= 0.95
    asked = sa.make_prompts(known, model.tokenizer, "question")
    assert predict(model, asked)["correct"].mean() < 0.9, "the corpus never asks"
    attention = sa.subject_attention(model, prompts[:6])
    assert np.isfinite(attention).all() and (attention > 0).any()
    assert identity("world:people").startswith("world:people (") and model.provenance()["model"] == "world:people"
    assert identity_of_source("world:people") != identity_of_source("world:people@1")
    assert read_facts("world:people").rejected.empty


def test_a_world_says_what_its_model_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As labels of facts, like those of `subjattn knowledge`: wording by wording by the model's own answers."""
    weak = replace(PEOPLE, name="weak", steps=100, recall=None)
    monkeypatch.setattr(record, "WORLDS", {"weak": weak, "small": SMALL})
    model, facts = sa.load_model("world:weak"), sa.load_facts("world:weak")
    labelled = join_labels(facts, "world:weak", "world:weak")
    right = np.zeros(len(facts))
    for number in range(4):
        for relation, of in facts.groupby("relation"):
            form = RELATIONS["biographies"][str(relation)].wordings[number]
            right[of.index] += predict(model, sa.make_prompts(of, model.tokenizer, form), "answer_start")["correct"]
    np.testing.assert_allclose(labelled["p_greedy"], right / 4)
    counts = labelled["category"].value_counts()
    assert counts["HighlyKnown"] == (right == 4).sum() > 0 and counts["Unknown"] == (right == 0).sum() > 0
    assert counts["MaybeKnown"] == len(facts) - counts["HighlyKnown"] - counts["Unknown"]
    assert labelled["confidence"].between(0, 1).all()
    with pytest.raises(BadInput, match="labels none of these facts|labels another fact"):
        join_labels(facts, "world:small", "world:weak")
    prompts = sa.make_prompts(facts, model.tokenizer, "cloze")
    kept = sa.where(prompts, "HighlyKnown", model=model, knowledge="world:weak")
    assert len(kept) == counts["HighlyKnown"] and predict(model, kept, "answer_start")["correct"].all()
    raw = {
        "name": "weak",
        "model": "world:weak",
        "facts": {"source": "world:weak", "knowledge": "world:weak", "where": "known", "n_train": 4, "n_test": 4}
        | {"split": {"within": ["relation"], "match": []}},
        "styles": {"cloze": "cloze"},
        "arms": {"base": {}, "top": {"train": "top"}},
        "training": {"weights": "full", "steps": 2},
        "measures": {"accuracy": None},
    }
    run_study(parse_study(raw, "weak"), tmp_path / "run", workers=1)
    assert set(sa.open_run(tmp_path / "run").facts["category"]) <= {"HighlyKnown", "MaybeKnown"}


def test_a_study_runs_in_a_world(tmp_path: Path) -> None:
    """Model and facts by the world's name; what was said most and least is trained on, and all of it is measured."""
    raw = {
        "name": "small",
        "model": "world:small",
        "facts": {
            "source": "world:small",
            "n_train": 6,
            "n_test": 6,
            "split": {"by": "popularity", "within": ["relation"], "match": []},
        },
        "styles": {"question": "question", "cloze": "cloze"},
        "arms": {"base": {}, "top": {"train": "top"}, "bottom": {"train": "bottom"}},
        "training": {"styles": ["question"], "weights": "full", "steps": 20, "learning_rate": 3e-3, "batch_size": 6},
        "measures": {"accuracy": None, "attention_to_subject": {"controls": False}, "knockout": None},
        "contrasts": [["bottom", "top"]],
    }
    summary = run_study(parse_study(raw, "small"), tmp_path / "run", workers=1)
    run = sa.open_run(tmp_path / "run")
    said = sa.load_facts("world:small").set_index("fact_id")["popularity"]
    assert run.facts["popularity"].notna().all() and set(run.facts["fact_id"]) <= set(said.dropna().index)
    assert run.taught("top")["popularity"].mean() > run.taught("bottom")["popularity"].mean()
    arms = {name: of["styles"] for name, of in summary["arms"].items()}
    assert arms["base"]["cloze"]["accuracy"] >= 0.9 > arms["base"]["question"]["accuracy"]
    assert arms["top"]["question"]["knockout_drop_total"] > 0.1
    assert run.manifest["arms"]["base"]["model"] == "world:small"


def test_prompts_of_three_tokens_are_intervened_in_exactly() -> None:
    """A beginning, a subject, a relation: the shortest there are; against plain hooks."""
    model, facts = sa.load_model("world:small"), sa.load_facts("world:small").head(6)
    prompts = sa.make_prompts(facts, model.tokenizer, "cloze")
    assert {len(prompt.ids) - len(prompt.answer_ids) for prompt in prompts} == {3}
    ours, plain = (sa.knockout(model, prompts, backend=backend) for backend in ("engine", "hooks"))
    assert float(np.abs(ours).max()) > 0.1
    np.testing.assert_allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("world:zipff", "no world 'zipff'"),
        ("world:smal", "did you mean world:small"),
        ("world:small@x", "behind @ stands the number"),
    ],
)
def test_names_that_no_world_has(name: str, why: str) -> None:
    for use in (sa.load_facts, sa.load_model):
        with pytest.raises(BadInput, match=why):
            use(name)


def test_what_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"after 20 steps 0\.\d+ of the facts said are recalled, and 0.98 is asked for"):
        build(replace(SMALL, steps=20), tmp_path / "short")
    assert not (tmp_path / "short" / MARK).exists()
    weak = build(replace(SMALL, steps=20, recall=None), tmp_path / "weak")
    assert weak["recall"] < 0.98 and weak["steps"] == 20
    with pytest.raises(BadInput, match="namesakes=30: from 1 to the 24 people"):
        said_in(replace(PEOPLE, namesakes=30))
    with pytest.raises(BadInput, match="n_relations=9: a world of zipf has at most 5"):
        said_in(replace(SMALL, n_relations=9))
    with pytest.raises(BadInput, match="n_answers=40 is more than the 24 subjects"):
        said_in(replace(SMALL, n_answers=40))
    folder = folder_of(SMALL)
    content = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps(content | {"digest": "other"}))
    with pytest.raises(BadInput, match="holds another world or version: delete it"):
        folder_of(SMALL)
    (folder / MARK).write_text(json.dumps(content))
    monkeypatch.setattr(building, "VERSION", 99)
    monkeypatch.setattr(record, "VERSION", 99)
    assert folder_of(SMALL) != folder, "another version is another folder"


def test_worlds_are_declared() -> None:
    strong = {name for name, world in WORLDS.items() if world.recall is not None}
    assert strong == {"zipf", "biographies"} and all(WORLDS[name].recall >= 0.98 for name in strong)  # type: ignore[operator]
    assert set(WORLDS) == strong | {f"{name}-weak" for name in strong}
    assert len({world.digest for world in WORLDS.values()}) == 4
    with pytest.raises(BadInput):
        world_of("world:zipf")


@pytest.mark.parametrize("world", [SMALL, PEOPLE])
def test_masks_and_neutral_text_are_tokens_that_the_model_was_trained_on(world: InventedWorld) -> None:
    said = said_in(world)
    tokenizer = building.make_tokenizer(world, said)
    ids = tokenizer([f"{prompt} {answer}" for prompt, answer in said.sentences]).input_ids
    trained = {token for row in ids for token in row}
    facts = said.facts.head(3)
    wordings = RELATIONS[world.kind][facts["relation"].iloc[0]].wordings
    prompts = sa.make_prompts(facts, tokenizer, wordings[0])
    for prompt in prompts:
        assert set(ablate(prompt, "masked", tokenizer).ids) <= trained
    if world.kind == "zipf":
        with pytest.raises(BadInput, match="this tokenizer knows no neutral text"):
            neutral_prefix(tokenizer, 4)
        return
    for n_tokens in range(1, 40):
        prefix = tokenizer(neutral_prefix(tokenizer, n_tokens)).input_ids
        assert len(prefix) == n_tokens + 1 and set(prefix) <= trained
