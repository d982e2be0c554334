"""Studies of several relations: splits, styles and scorers as factors, and facts without a subject."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

import subjattn as sa
from subjattn.errors import BadInput, SubjattnError
from subjattn.facts import draw, load_facts
from subjattn.facts.distance import relation_distances
from subjattn.measures.embeddings import prompt_embeddings
from subjattn.measures.record import measure_of
from subjattn.models import LoadedModel, identity
from subjattn.prompts import make_prompts
from subjattn.study.checking import check_study
from subjattn.study.files import Run
from subjattn.study.plan import plan_study
from subjattn.study.read import load_study, parse_study
from subjattn.study.run import run_study


EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<a>\n"
QUICK = {
    "measures": {
        "answer_logprob": {},
        "attention_to_subject": {},
        "knockout": {"by": "layer", "facts": 1},
        "patching": {"pairs": 1},
        "token_attention": {"facts": 1},
    },
    "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory, cities: pd.DataFrame) -> Path:
    """Four relations of sixty subjects each, two or three answers a relation, a subject in two relations."""
    rng = np.random.default_rng(0)
    names = draw(cities, 240, 5)["subject"].tolist()
    rows = []
    for r, (relation, answers) in enumerate(
        {
            "father": ["Adam", "Abel"],
            "mother": ["Eve", "Ada"],
            "sport": ["go", "golf", "judo"],
            "color": ["red", "blue"],
        }.items()
    ):
        for i in range(60):
            subject = names[0] if i == 0 else names[60 * r + i]
            answer = answers[int(rng.integers(len(answers)))]
            question = f"Of {relation} and {{subject}}, what is known?"
            rows.append((f"{relation}-{i:02d}", subject, relation, question, answer, int(rng.integers(1, 1000))))
    path = tmp_path_factory.mktemp("facts") / "people.csv"
    columns = ["fact_id", "subject", "relation", "question", "answer", "popularity"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def chatty(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(tiny_folders["llama"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def study(people: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "s",
        "model": str(model),
        "facts": {
            "source": str(people),
            "n_train": 24,
            "n_test": 12,
            "split": {"within": ["relation"], "match": ["relation"]},
        },
        "styles": {"question": "Q: {question}\nA:"},
        "arms": {"base": {}, "top": {"train": "top"}},
        **QUICK,
    } | changes


@pytest.mark.slow
def test_styles_and_splits_as_factors(people: Path, chatty: Path, tmp_path: Path) -> None:
    """Few shots of known and unknown facts, a chain of thought, a chat, a prefix; a relation far from the others."""
    plain = "Q: {question}\nA:"
    shots = {"template": plain, "shots": 2}
    raw = study(
        people,
        chatty,
        styles={
            "question": plain,
            "known": shots | {"demonstrations": "known"},
            "elsewhere": shots | {"demonstrations": "unknown", "relation": "other"},
            "thinking": {"template": plain, "chain_of_thought": True},
            "chat": {"template": "{question}", "chat": True},
            "padded": {"template": plain, "prefix": 5},
        },
        arms={
            "base": {},
            "top": {"train": "top"},
            "mixed": {"train": "mixed-25%"},
            "instruct": {"model": str(chatty), "train": "unknown-in:sport"},
        },
        contrasts=[["mixed", "top"]],
    )
    raw["measures"] |= {"accuracy": {"scorer": "containment"}}
    raw["facts"]["split"]["held_out"] = {"farthest": 1, "n_test": 6}
    summary = run_study(parse_study(raw, "s"), tmp_path)
    run = sa.open_run(tmp_path)
    facts = run.facts
    (outside,) = facts["relation"][facts["out_of_distribution"]].unique()
    trained = facts[[name for name in facts if name.startswith("train_")]]
    assert facts["out_of_distribution"].sum() == 6 and not trained[facts["relation"] == outside].any().any()
    used = {
        part: set(facts["subject"][facts[part]]) for part in ("test", "demonstration", "train_top", "train_mixed-25%")
    }
    assert not used["test"] & (used["train_top"] | used["train_mixed-25%"])
    shown = facts[facts["demonstration"]]
    assert not shown["test"].any() and not trained[facts["demonstration"]].any().any()
    assert (shown.groupby(["relation", "third"]).size() >= 3).all() and len(shown) <= 4 * 3 * 15
    thirds = facts[facts["train_mixed-25%"]]["third"].value_counts()
    assert thirds["bottom"] == 6 and thirds["top"] == 18
    accuracy = run.measure("accuracy", "top", "known")["accuracy"]
    assert accuracy.attrs["scorer"] == "containment" and accuracy.sizes["fact"] == 18
    assert summary["arms"]["base"]["n_test"] == 12 and summary["out_of_distribution"]["top"]["n_test"] == 6
    attention = run.measure("attention_to_subject", "top", "known")["attention_to_subject"]
    inside = ~facts.set_index("fact_id")["out_of_distribution"].reindex(attention["fact"].values).to_numpy()
    expected = float(attention[inside].mean())
    assert summary["arms"]["top"]["styles"]["known"]["attention_to_subject"] == pytest.approx(expected)
    report = (tmp_path / "report.html").read_text()
    assert "Out of distribution" in report and "shots: 2" in report and "chain of thought: True" in report
    losses = json.loads((tmp_path / "arms/mixed/draw0-seed0/adapter/training.json").read_text())["losses"]
    assert len(losses) == 2, "steps, not epochs"
    unseen = set(facts["fact_id"][facts["out_of_distribution"]])
    nothing_unseen_is_drawn(run, unseen)
    own_reasoning_is_not_compared(run, summary, report)


def nothing_unseen_is_drawn(run: Run, unseen: set[str]) -> None:
    """Facts of relations held out are in no pair, example, by-layer draw or figure."""
    for style in ("question", "known", "padded"):
        chosen = json.loads((run.folder / "chosen" / style / "chosen.json").read_text())
        pairs = {fact for pair in chosen["pairs"] for fact in pair}
        assert not unseen & {*chosen["order"], *chosen["known"], *pairs} and len(chosen["order"]) == 12
        for measure, variable in (
            ("attention_to_subject", "attention_to_subject"),
            ("knockout", "knockout_drop_by_layer"),
            ("patching", "patch_effect"),
            ("token_attention", "token_attention"),
        ):
            array = run.array(measure, variable, style)
            dim = "few_fact" if "few_fact" in array.dims else "fact"
            assert array.sizes[dim] and not unseen & set(array[dim].values)
    assert unseen <= set(run.values["fact"][run.values["out_of_distribution"]])


def own_reasoning_is_not_compared(run: Run, summary: dict[str, Any], report: str) -> None:
    """Each arm reads its own thought, which may repeat the subject: only its accuracy is measured."""
    reason = summary["not_defined"]["knockout_drop_total"]["thinking"]
    assert "each arm reads its own reasoning" in reason and reason in report
    assert set(summary["not_defined"]["answer_logprob"]) == {"thinking"} and "accuracy" not in summary["not_defined"]
    thought = [row for row in summary["contrasts"] if row["style"] == "thinking" and row["estimate"] is not None]
    assert {row["measure"] for row in thought} == {"accuracy"}
    thoughts = pd.read_parquet(run.folder / "arms/top/draw0-seed0/prompts/thinking/prompts.parquet")
    assert all(thought in text for thought, text in zip(thoughts["reasoning"], thoughts["text"], strict=True))
    with pytest.raises(BadInput, match="knockout is not defined in style 'thinking': each arm reads"):
        run.measure("knockout", "top", "thinking")


def test_the_farthest_relation_is_that_of_plain_arithmetic(people: Path, tiny: LoadedModel) -> None:
    facts = load_facts(str(people))
    prompts = make_prompts(facts, tiny.tokenizer, "Q: {question}\nA:")
    vectors = prompt_embeddings(tiny, prompts)
    table = tiny.model.get_input_embeddings().weight
    for i in (0, 100):
        own = np.mean([table[token].numpy() for token in prompts[i].ids[: prompts[i].prediction + 1]], axis=0)
        np.testing.assert_allclose(vectors.values[i], own, rtol=1e-4, atol=1e-6)
    found = relation_distances(facts, vectors.values)
    means = {r: vectors.values[(facts["relation"] == r).to_numpy()].mean(0) for r in facts["relation"].unique()}
    for relation, distance in found.items():
        others = np.mean([mean for other, mean in means.items() if other != relation], axis=0)
        cosine = means[relation] @ others / np.linalg.norm(means[relation]) / np.linalg.norm(others)
        assert distance == pytest.approx(1 - cosine, abs=1e-5)
    assert found.is_monotonic_decreasing
    shuffled = np.random.default_rng(1).permutation(len(facts))
    pd.testing.assert_series_equal(relation_distances(facts.iloc[shuffled], vectors.values[shuffled]), found, rtol=1e-4)
    with pytest.raises(BadInput, match="there is one relation"):
        relation_distances(facts[facts["relation"] == "sport"], vectors.values[:60])


def test_a_study_by_knowledge(people: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    facts = load_facts(str(people))
    labels = facts[["fact_id", "subject", "relation", "answers"]].assign(
        p_greedy=0.0,
        p_sampled=0.0,
        confidence=0.5,
        answer_logprob=-1.0,
        answer_logprob_template="Q: {question}\nA:",
        model=str(tiny_folders["llama"]),
        model_identity=identity(str(tiny_folders["llama"])),
        adapter=None,
    )
    labels["category"] = np.where(facts["popularity"] > 500, "MaybeKnown", "Unknown")
    raw = study(
        people, tiny_folders["llama"], arms={"base": {}, "known": {"train": "known"}, "unknown": {"train": "Unknown"}}
    )
    raw["facts"] |= {"knowledge": str(tmp_path / "knowledge.parquet"), "split": {"by": "category", "match": []}}
    with pytest.raises(SubjattnError, match="no such file"):
        run_study(parse_study(raw, "s"), tmp_path / "run")
    labels.to_parquet(tmp_path / "knowledge.parquet")
    run_study(parse_study(raw, "s"), tmp_path / "run")
    used = sa.open_run(tmp_path / "run").facts
    report = (tmp_path / "run" / "report.html").read_text()
    assert "by SliCK label" in report and "<th>known (6)</th>" in report and "<th>top (6)</th>" not in report
    assert (used["category"][used["train_known"]] == "MaybeKnown").all()
    assert (used["category"][used["train_Unknown"]] == "Unknown").all()
    for changed, message in [
        (labels.assign(fact_id=labels["fact_id"] + "x"), "labels none of these facts"),
        (
            labels.assign(fact_id=labels["fact_id"].to_numpy()[::-1]),
            "labels another fact as .*: the source has changed",
        ),
        (labels.assign(model="another", model_identity="x"), "says what 'another' knows"),
        (labels.assign(adapter="tuned"), "knows with the adapter 'tuned'"),
        (pd.concat([labels, labels]), "labels a fact twice"),
        (labels.drop(columns="category"), "has no column 'category'"),
    ]:
        changed.to_parquet(tmp_path / "knowledge.parquet")
        with pytest.raises(SubjattnError, match=message):
            run_study(parse_study(raw, "s"), tmp_path / "run", replace=True)
    (tmp_path / "knowledge.parquet").write_text("fact_id\n")
    with pytest.raises(SubjattnError, match="cannot be read as parquet"):
        run_study(parse_study(raw, "s"), tmp_path / "run", replace=True)


def test_mmlu_has_accuracy_and_loss_and_nothing_of_a_subject(
    tiny_folders: dict[str, Path], tiny_models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    lines = [f"What is {i} + {i}?,{i},{2 * i},{3 * i},{i + 1},{'ABCD'[rng.integers(4)]}" for i in range(2, 62)]
    (tmp_path / "elementary_mathematics_test.csv").write_text("\n".join(lines))
    claim = {"id": "c", "statement": "s", "arms": ["bottom", "top"], "direction": "decrease", "smallest_effect": 0.1}
    raw = {
        "name": "m",
        "model": str(tiny_folders["llama"]),
        "facts": {
            "source": f"mmlu:{tmp_path}",
            "n_train": None,
            "n_test": 24,
            "split": {"by": "answer_logprob", "within": [], "match": []},
        },
        "styles": {"choices": "{question}\n{choices}\nAnswer:"},
        "arms": {"base": {}, "top": {"train": "top"}, "bottom": {"train": "bottom"}},
        "contrasts": [["bottom", "top"]],
        "claims": [claim | {"measure": "accuracy"}, claim | {"id": "d", "measure": "attention_to_subject"}],
        **QUICK,
    }
    raw["measures"] = QUICK["measures"] | {"accuracy": {"scorer": "letters"}}
    out = tmp_path / "run"
    summary = run_study(parse_study(raw, "m"), out)
    of_a_subject = ("attention_to_subject", "knockout", "patching")
    missing = [quantity.name for name in of_a_subject for quantity in measure_of(name).quantities]
    assert {"attention_to_subject", "knockout_drop", "direct_share", "subject_recovery"} <= set(missing)
    assert summary["not_defined"] == {name: {"choices": "the facts have no subject"} for name in missing}
    assert summary["arms"]["base"]["attention_to_subject"] is None
    assert [claim["verdict"] for claim in summary["claims"]] == [summary["claims"][0]["verdict"], "not defined"]
    assert summary["claims"][0]["estimate"] is not None
    assert summary["claims"][1]["reason"] == "the facts have no subject"
    assert "Reason: the facts have no subject" in (out / "report.html").read_text()
    facts = sa.open_run(out).facts
    assert facts["answer_logprob"][facts["train_top"]].min() > facts["answer_logprob"][facts["train_bottom"]].max()
    predictions = sa.open_run(out).predictions()
    base = predictions[predictions["arm"] == "base"].set_index("fact_id")
    values = sa.open_run(out).values.query("arm == 'base' and quantity == 'answer_logprob'").set_index("fact")["value"]
    model = tiny_models["llama"]
    for fact in facts[facts["test"]].to_dict("records"):
        text = (
            f"{fact['question']}\n"
            + "\n".join(f"{x}. {y}" for x, y in zip("ABCD", fact["choices"], strict=True))
            + "\nAnswer:"
        )
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model.model(ids).logits[0, -1]
        letters = [model.tokenizer(f"{text} {letter}")["input_ids"][-1] for letter in "ABCD"]
        assert base["prediction"][fact["fact_id"]] == "ABCD"[int(logits[letters].argmax())]
        loss = float(logits.float().log_softmax(-1)[letters["ABCD".index(fact["answers"][0])]])
        assert values[fact["fact_id"]] == pytest.approx(loss, abs=1e-4)
    accuracy = float((base["prediction"] == facts.set_index("fact_id")["answers"].str[0].reindex(base.index)).mean())
    assert summary["arms"]["base"]["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "study_file",
    sorted(path for path in EXPERIMENTS.glob("*.yaml") if not path.stem.startswith("theory_")),
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize("model", ["meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.3", "smollm2-135m"])
def test_every_experiment_is_valid_without_its_model(study_file: Path, model: str) -> None:
    config = load_study(study_file, [f"model={model}"])
    assert check_study(config)[-1].endswith("the study is valid")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the fact data of ../shared/data is absent")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("popqa", [f"facts.source=popqa:{SHARED}/popqa/popQA.sample.tsv"]),
        ("popqa-controlled", [f"facts.source=popqa:{SHARED}/popqa/popQA.sample.tsv", "facts.relations=[occupation]"]),
        (
            "entityquestions",
            [
                f"facts.source=entityquestions:{SHARED}/entityquestions/dev",
                "facts.relations=[P17, P131]",
                "facts.n_train=16",
                f"facts.popularity.path={SHARED}/world_models/world_place.csv",
            ],
        ),
        ("mmlu-history", [f"facts.source=mmlu-history:{SHARED}/mmlu/canonical/val", "facts.relations=[prehistory]"]),
    ],
)
def test_experiments_run_in_small_on_the_real_rows(
    name: str, settings: list[str], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """With a random model here, for its speed; the same settings run on SmolLM2."""
    small = ["facts.n_test=12", "training.steps=1", "dtype=float32"]
    config = load_study(EXPERIMENTS / f"{name}.yaml", [f"model={tiny_folders['llama']}", *small, *settings])
    check_study(config)
    summary = run_study(config, tmp_path)
    assert set(summary["arms"]) == set(config.arms) and (tmp_path / "report.html").is_file()
    facts = sa.open_run(tmp_path).facts
    arms = {spec: facts[facts[f"train_{spec}"]] for spec in config.trained.values()}
    assert all(len(arm) for arm in arms.values())
    if name == "popqa-controlled":
        taught = {answer for arm in arms.values() for answer in arm["answer"]}
        assert len(taught) == 1 and not taught & set(facts["answer"][facts["test"]])
    if "top" in arms:
        by = config.facts.split.by
        assert arms["top"][by].median() > arms["bottom"][by].median()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts.split.by": "p_greedy"}, "needs 'facts.knowledge'"),
        ({"facts.relations": ["aunt"]}, "no relation 'aunt'; there are color, father, mother, sport"),
        ({"facts.split.held_out": {"farthest": 9, "n_test": 3}}, "farthest=9 leaves none of the 4 relations"),
        ({"styles": {"a": {"template": "late", "shots": 1}}}, "trained in styles without shots"),
        ({"facts.split.held_out": {"n_test": 3}}, "needs either 'relations' or 'farthest'"),
        ({"styles": {"a": "{question}\n{choices}"}}, "is not multiple choice"),
        ({"arms": {"base": {}}, "facts.split.controlled": True}, "and no arm is trained"),
        (
            {"styles": {"plain": "{question}", "many": {"template": "{question}", "shots": 50}}},
            "50 demonstrations .* are wanted",
        ),
    ],
)
def test_studies_that_cannot_be(
    people: Path, tiny_folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    raw = study(people, tiny_folders["llama"])
    for key, value in changes.items():
        *path, last = key.split(".")
        target = raw
        for part in path:
            target = target[part]
        target[last] = value
    with pytest.raises(SubjattnError, match=message):
        run_study(parse_study(raw, "s"), tmp_path / "run")


def test_check_finds_what_would_fail_after_training(people: Path, tiny_folders: dict[str, Path]) -> None:
    raw = study(people, tiny_folders["llama"])
    with pytest.raises(BadInput, match="'letters' is for multiple choice"):
        check_study(parse_study(raw | {"measures": {"accuracy": {"scorer": "letters"}}}, "s"))
    unknown = people.with_name("odd.csv")
    unknown.write_text("subject,answer,relation,question\nKenya,Nairobi,seat,Seat of {subject}?\n")
    raw["facts"]["source"] = str(unknown)
    thinking = {"template": "{question}", "shots": 1, "chain_of_thought": True}
    raw["styles"] = {"plain": "{question}", "thinking": thinking}
    with pytest.raises(BadInput, match="style 'thinking': .* the relation 'seat' has no built-in template 'cloze'"):
        check_study(parse_study(raw, "s"))


def test_stages_depend_on_what_they_are_made_from(people: Path, tiny_folders: dict[str, Path]) -> None:
    """A ranking by the model's own numbers depends on its precision; the check on training facts on its own style."""

    def recipes(**changes: Any) -> dict[str, str]:
        plan = plan_study(parse_study(study(people, tiny_folders["llama"], **changes), "s"))
        return {stage.name: stage.recipe(1) for stage in plan}

    facts = study(people, tiny_folders["llama"])["facts"]
    by_loss = {"facts": facts | {"split": {"by": "answer_logprob", "within": [], "match": []}}}
    assert recipes(**by_loss)["facts/scores/0"] != recipes(**by_loss, dtype="bfloat16")["facts/scores/0"]
    plain, rounded = recipes(), recipes(dtype="bfloat16")
    assert {name for name in plain if plain[name] == rounded[name]} >= {"facts/pool", "facts/split", "prompts/question"}
    shots = {"template": "{question}", "shots": 1}
    more = {"a": "{question}", "b": shots | {"shots": 9}}
    assert recipes(styles={"a": "{question}", "b": shots})["facts/split"] != recipes(styles=more)["facts/split"]
    known = parse_study(study(people, tiny_folders["llama"], styles={"a": shots, "b": "{question}"}), "s")
    assert plan_study(known)["before/top-draw0"].settings["style"]["template"] == "{question}"


def test_scores_are_a_stage_of_their_own(people: Path, tiny_models: dict[str, LoadedModel], tmp_path: Path) -> None:
    """In shares that are kept; what they say is `answer_logprob`, and only of the pool."""
    model = tiny_models["llama"]
    raw = study(people, Path(model.name), measures={})
    raw["facts"] |= {"pool": 100, "n_train": 8, "n_test": 6}
    raw["facts"]["split"] = {"by": "answer_logprob", "within": ["relation"], "match": []}
    run_study(parse_study(raw, "s"), tmp_path)
    pool = pd.read_parquet(tmp_path / "facts/pool/facts.parquet")
    shares = [pd.read_parquet(path) for path in sorted(tmp_path.glob("facts/scores/*/scores.parquet"))]
    scores = pd.concat(shares).set_index("fact_id")["answer_logprob"]
    assert len(pool) == len(scores) == 100 and len(shares) == 8
    prompts = make_prompts(pool, model.tokenizer, "Q: {question}\nA:")
    np.testing.assert_allclose(scores.reindex(pool["fact_id"]), sa.answer_logprob(model, prompts).values, atol=1e-4)
    facts = sa.open_run(tmp_path).facts
    assert set(facts["answer_logprob_template"].dropna()) == {"Q: {question}\nA:"}


def test_check_makes_the_split_that_the_study_makes(people: Path, tiny_folders: dict[str, Path]) -> None:
    raw = study(people, tiny_folders["llama"])
    assert "240 in 4 relations, split as asked" in check_study(parse_study(raw, "s"))[1]
    raw["facts"]["n_test"] = 500
    with pytest.raises(BadInput, match="n_test=500 is not between 1 and"):
        check_study(parse_study(raw, "s"))
    raw["facts"] |= {"n_test": 12, "n_train": 900}
    with pytest.raises(BadInput, match="900"):
        check_study(parse_study(raw, "s"))


def test_what_a_model_was_tuned_on_can_be_left_out(people: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    facts = load_facts(str(people))
    learnt = tmp_path / "learnt.csv"
    facts.head(30).assign(answer="x")[["subject", "answer"]].drop_duplicates("subject").to_csv(learnt, index=False)
    raw = study(people, tiny_folders["llama"], arms={"base": {}}, measures={})
    raw["facts"] |= {"n_test": 180, "trained_on": str(learnt)}
    run_study(parse_study(raw, "s"), tmp_path / "run")
    asked = sa.open_run(tmp_path / "run").facts
    assert not set(asked["subject"]) & set(facts.head(30)["subject"]) and len(asked) == 180
