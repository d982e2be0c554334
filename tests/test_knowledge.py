"""SliCK: sampling against plain passes, categories by hand, resuming, and the definitions' agreement."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.knowledge import sampling, slick
from subjattn.knowledge.labels import DEFINITIONS, agreement, join_labels, with_popularity_ranks
from subjattn.knowledge.run import know
from subjattn.knowledge.sampling import Sampler
from subjattn.knowledge.slick import Budget, category, cost
from subjattn.measures.answers import answer_logprob
from subjattn.measures.scoring import SCORERS, exact_match, no_exact_match
from subjattn.models import LoadedModel, identity, load_model
from subjattn.prompts import Prompt, Style, make_prompts


NONE: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def shots(tokenizer: Any, cities: pd.DataFrame) -> list[Prompt]:
    """Prompts of several lengths behind the same three demonstrations."""
    style = Style(template="Q: {question}\nA:", shots=3)
    return list(make_prompts(draw(cities, 30, 1), tokenizer, style, demonstrations=draw(cities, 20, 2)))


def seeds(prompts: list[Prompt]) -> list[list[int]]:
    return [[7, i] for i in range(len(prompts))]


def plain_next(model: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Logits behind some tokens, by one whole pass of the model alone."""
    with torch.inference_mode():
        return model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def test_greedy_answers_and_their_confidence_are_plain_argmax(tiny: LoadedModel, shots: list[Prompt]) -> None:
    drawn = Sampler(tiny.model, NONE, NONE, 0, 0.5).draw(shots, seeds(shots), [4] * len(shots))
    for prompt, found in list(zip(shots, drawn, strict=True))[::5]:
        ids, logprob = list(prompt.ids[: prompt.prediction + 1]), 0.0
        for _ in range(4):
            logits = plain_next(tiny, ids)
            ids.append(int(logits.argmax()))
            logprob += float(logits.log_softmax(-1)[ids[-1]])
        assert found.greedy == tuple(ids[prompt.prediction + 1 :])
        assert found.confidence == pytest.approx(np.exp(logprob), rel=1e-3)
        assert not found.samples


def test_samples_follow_the_models_distribution(tiny: LoadedModel, shots: list[Prompt]) -> None:
    """Two tokens of 20,000 samples against probabilities of whole passes; the first is checked with padding."""
    n, temperature = 20_000, 0.5
    some = shots[:3]
    drawn = Sampler(tiny.model, NONE, NONE, n, temperature).draw(some, seeds(some), [2] * len(some))
    for prompt, found in zip(some, drawn, strict=True):
        assert sum(found.samples.values()) == n
        ids = list(prompt.ids[: prompt.prediction + 1])
        expected = (plain_next(tiny, ids) / temperature).softmax(-1).double().numpy()
        first = np.bincount([t[0] for t, c in found.samples.items() for _ in range(c)], minlength=len(expected))
        common = expected * n > 20
        spread = np.sqrt(n * expected * (1 - expected))
        assert common.sum() >= 5
        assert (np.abs(first - n * expected)[common] < 5 * spread[common]).all()
        top = int(first.argmax())
        behind = (plain_next(tiny, [*ids, top]) / temperature).softmax(-1).double().numpy()
        second = np.zeros(len(behind))
        for (a, b), count in found.samples.items():
            second[b] += count * (a == top)
        spread = np.sqrt(first[top] * behind * (1 - behind))
        common = behind * first[top] > 20
        assert (np.abs(second - first[top] * behind)[common] < 5 * spread[common]).all()


@pytest.mark.parametrize("held", [64, 400, 16_384])
def test_sharing_and_batching_change_nothing(
    tiny: LoadedModel, shots: list[Prompt], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [
        Sampler(tiny.model, NONE, NONE, 16, 0.5).draw([p], [s], [3])[0]
        for p, s in zip(shots, seeds(shots), strict=True)
    ]
    monkeypatch.setattr(sampling, "CACHED_TOKENS", held)
    for share in (True, False):
        together = Sampler(tiny.model, NONE, NONE, 16, 0.5).draw(shots, seeds(shots), [3] * len(shots), share=share)
        assert [found.greedy for found in together] == [found.greedy for found in alone]
        pairs = zip(
            map(Counter, (of.samples for of in together)), map(Counter, (of.samples for of in alone)), strict=True
        )
        other = sum((a - b).total() for a, b in pairs)
        assert other <= 1, "at a boundary between two tokens rounding decides, in one of 480 samples at most"


def test_the_shared_beginning_is_computed_once(
    tiny: LoadedModel, shots: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    run = Sampler._run
    monkeypatch.setattr(Sampler, "_run", lambda s, ids, c, p: sizes.append(tuple(ids.shape)) or run(s, ids, c, p))
    Sampler(tiny.model, NONE, NONE, 0, 0.5).draw(shots, seeds(shots), [1] * len(shots))
    whole = sum(prompt.prediction + 1 for prompt in shots)
    assert sizes[0][0] == 1 and sum(a * b for a, b in sizes) < whole / 3


def test_draws_behind_token_zero_are_their_own(tiny: LoadedModel, shots: list[Prompt]) -> None:
    """NumPy pads a list of seeds with zeros: the root and the branch of token 0 would draw the same numbers."""
    sampler = Sampler(tiny.model, NONE, NONE, 64, 1.0)
    sampler._seeds = [[7]]
    even = torch.zeros(1, 512)
    root, zero, zeros = (
        sampler._sample([sampling._Branch(0, tokens, 64, False, 0.0)], even)[0] for tokens in ((), (0,), (0, 0))
    )
    assert root != zero != zeros != root


def test_answers_end_where_their_line_or_text_ends(tiny: LoadedModel, shots: list[Prompt]) -> None:
    free = Sampler(tiny.model, NONE, NONE, 8, 1.0).draw(shots[:4], seeds(shots), [5] * 4)
    ending = next(token for token in free[0].greedy[1:])
    ends = Sampler(tiny.model, NONE, frozenset({ending}), 8, 1.0).draw(shots[:4], seeds(shots), [5] * 4)
    assert ends[0].greedy == free[0].greedy[: free[0].greedy.index(ending, 1) + 1]
    first = free[1].greedy[0]
    assert len(Sampler(tiny.model, NONE, frozenset({first}), 0, 1.0).draw(shots[1:2], [[0]], [5])[0].greedy) > 1
    assert Sampler(tiny.model, frozenset({first}), NONE, 0, 1.0).draw(shots[1:2], [[0]], [5])[0].greedy == (first,)


WORDS = st.text(st.sampled_from("aAnNtThHeE  .-'éßœ가각́̂oY\u1100\u1161"), max_size=12)


@settings(max_examples=1500, deadline=None)
@given(text=WORDS, answers=st.lists(WORDS, min_size=1, max_size=2), same=st.booleans(), cut=st.integers(0, 12))
@example("the Netherlands", ["Netherlands"], False, 2)
@example("e\u0301", ["\u00e9"], False, 1)
def test_what_is_given_up_could_not_have_matched(text: str, answers: list[str], same: bool, cut: int) -> None:
    """Whatever begins hopelessly ends wrong; planted: a text that is an answer but for case and articles."""
    if same:
        text = f"The {answers[0].upper()}."
    if exact_match(text, answers):
        assert not no_exact_match(text[:cut], answers)


def test_hopeless_beginnings() -> None:
    assert exact_match("The The", ["The The"]) and not exact_match("Roof", ["The The"])
    assert not no_exact_match("The T", ["The The"]) and no_exact_match("The Roof", ["The The"])
    assert no_exact_match("Germ", ["France"])
    assert no_exact_match("France andy", ["France"])
    assert not no_exact_match("the Uni", ["United States"])
    assert no_exact_match("United K", ["United States"]) is False, "the last letter may still change"
    assert no_exact_match("United Ki", ["United States"])


def test_giving_up_changes_no_label(
    smollm2: LoadedModel, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, budget = draw(cities, 12, 3), Budget(n_prompts=1, n_samples=8, new_tokens=6)
    labels = slick.slick(smollm2, facts, cities, budget)
    rule = SCORERS["exact_match"]
    patient = type(rule)(rule.definition, rule.new_tokens, rule.one_line, rule.correct)
    monkeypatch.setitem(slick.SCORERS, "exact_match", patient)  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(labels, slick.slick(smollm2, facts, cities, budget))
    assert set(labels["category"]) >= {"Unknown"}


@pytest.mark.parametrize(
    ("p_greedy", "p_sampled", "expected"),
    [
        (1.0, 0.4, "HighlyKnown"),
        (0.9, 1.0, "MaybeKnown"),
        (0.1, 0.0, "MaybeKnown"),
        (0.0, 0.01, "WeaklyKnown"),
        (0.0, 0.0, "Unknown"),
    ],
)
def test_categories(p_greedy: float, p_sampled: float, expected: str) -> None:
    assert category(p_greedy, p_sampled) == expected


def test_labels_are_counts_of_right_answers(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    """P(T=0) and P(T>0) of facts whose answers are made to be what the model says, against draws done here."""
    facts, budget = draw(cities, 8, 1), Budget(n_prompts=3, shots=2, n_samples=5, new_tokens=3)
    pool = cities.iloc[:200]
    said = slick.slick(tiny, facts, pool, budget)
    facts = facts.assign(answers=[[text or "none"] for text in said["greedy"]])
    found = slick.slick(tiny, facts, pool, budget).set_index("fact_id")
    for fact_id, row in found.iterrows():
        right_greedy, right_sampled = [], 0
        for index in range(3):
            for group in slick.answer_groups(facts, pool, tiny.tokenizer, budget, index):
                numbers = [i for i, prompt in enumerate(group) if prompt.fact_id == fact_id]
                for i in numbers:
                    seed = [0, index, slick.zlib.crc32(str(fact_id).encode())]  # type: ignore[attr-defined]
                    drawn = Sampler(tiny.model, NONE, NONE, 5, 0.5).draw([group[i]], [seed], [3])[0]

                    def text(tokens: tuple[int, ...]) -> str:
                        lines = tiny.tokenizer.decode(list(tokens), skip_special_tokens=True).strip().splitlines()
                        return lines[0].strip() if lines else ""

                    right_greedy.append(exact_match(text(drawn.greedy), group[i].answers))
                    for tokens, count in drawn.samples.items():
                        right_sampled += count * exact_match(text(tokens), group[i].answers)
        assert row["p_greedy"] == pytest.approx(np.mean(right_greedy))
        assert row["p_sampled"] == pytest.approx(right_sampled / 15)
    assert (found["p_greedy"] > 0).any()
    assert (found["n_greedy"] == 3).all() and (found["n_sampled"] == 15).all()


def test_no_fact_is_shown_to_itself(tokenizer: Any, cities: pd.DataFrame) -> None:
    facts = cities.iloc[:6]
    for index in range(5):
        groups = slick.answer_groups(facts, facts, tokenizer, Budget(shots=4), index)
        assert sum(map(len, groups)) == 6
        for prompt in (prompt for group in groups for prompt in group):
            assert prompt.text.count("Q:") == 5
            assert prompt.text.count(f" {prompt.subject}?") == 1, "the question's own, in no demonstration"


def test_a_stopped_run_goes_on(
    tiny: LoadedModel, cities: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, budget = draw(cities, 6, 1), Budget(n_prompts=3, shots=2, n_samples=2, new_tokens=2)
    asked: list[int] = []
    ask = slick._ask

    def counting(*args: Any) -> pd.DataFrame:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(args[-1])
        return ask(*args)

    whole = slick.slick(tiny, facts, cities, budget)
    monkeypatch.setattr(slick, "_ask", counting)
    with pytest.raises(KeyboardInterrupt):
        slick.slick(tiny, facts, cities, budget, folder=tmp_path)
    monkeypatch.setattr(slick, "_ask", lambda *args: asked.append(args[-1]) or ask(*args))
    pd.testing.assert_frame_equal(slick.slick(tiny, facts, cities, budget, folder=tmp_path), whole)
    assert asked == [0, 1, 2]
    slick.slick(replace(tiny, name="another"), facts, cities, budget, folder=tmp_path)
    assert asked == [0, 1, 2, 0, 1, 2], "another model's answers are asked anew"


def test_cost_is_what_is_computed(tiny: LoadedModel, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, budget = draw(cities, 40, 1), Budget(n_prompts=1, shots=2, n_samples=16, new_tokens=1)
    stated = cost(facts, cities, tiny.tokenizer, budget)
    tokens: Counter[str] = Counter()
    run = Sampler._run

    def counting(self: Sampler, ids: Any, cache: Any, pads: Any) -> Any:
        tokens["computed"] += ids.numel() - int(pads.sum())
        return run(self, ids, cache, pads)

    monkeypatch.setattr(Sampler, "_run", counting)
    slick.slick(tiny, facts, cities, budget)
    assert stated["computed_prompt_tokens"] == tokens["computed"] < stated["prompt_tokens"] / 2
    assert stated["answers"] == 40 * 17


def test_multiple_choice_is_refused(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    facts = draw(cities, 3).assign(choices=[["a", "b"]] * 3)
    with pytest.raises(BadInput, match="base-model loss instead"):
        slick.slick(tiny, facts, cities)


def test_agreement_of_definitions() -> None:
    n = 40
    labels = pd.DataFrame(
        {
            "relation": "r",
            "answers": [["a"]] * n,
            "popularity": np.arange(n, dtype=float),
            "p_greedy": np.arange(n) / n,
            "p_sampled": 0.5,
            "confidence": -np.arange(n, dtype=float),
            "answer_logprob": np.nan,
            "category": ["Unknown"] * 20 + ["MaybeKnown"] * 20,
        }
    )
    found = agreement(with_popularity_ranks(labels))
    assert found["spearman"]["popularity"]["p_greedy"] == pytest.approx(1)
    assert found["spearman"]["confidence"]["p_greedy"] == pytest.approx(-1)
    assert found["spearman"]["p_sampled"]["p_greedy"] is None, "the same everywhere"
    assert "answer_logprob" not in found["definitions"]
    assert found["known"]["popularity"] == {"n": 40, "agreement": 1.0, "kappa": pytest.approx(1)}
    assert found["known"]["confidence"]["agreement"] == 0
    assert found["categories"] == {"Unknown": 20, "MaybeKnown": 20}


def test_ranks_within_relation_and_answer() -> None:
    facts = pd.DataFrame(
        {"relation": ["r", "r", "r", "s"], "answers": [["a"], ["a"], ["b"], ["a"]], "popularity": [3.0, 1.0, 2.0, 9.0]}
    )
    ranked = with_popularity_ranks(facts)
    assert ranked["popularity_in_relation"].tolist() == pytest.approx([1, 1 / 3, 2 / 3, np.nan], nan_ok=True)
    assert ranked["popularity_in_answer"].isna().all(), "a rank among two means nothing"


def test_kappa_by_hand() -> None:
    """20 and 15 facts on which both say the same of 50, halves of 25: 0.7 observed, 0.5 by chance."""
    half = [1.0] * 25 + [0.0] * 25
    category = ["MaybeKnown"] * 20 + ["Unknown"] * 5 + ["MaybeKnown"] * 10 + ["Unknown"] * 15
    labels = pd.DataFrame({"category": category, "confidence": half, "popularity": 1.0})
    known = agreement(labels)["known"]
    assert known["confidence"] == {"n": 50, "agreement": pytest.approx(0.7), "kappa": pytest.approx(0.4)}
    assert known["popularity"]["kappa"] is None, "the same everywhere has no halves"


LITTLE = Budget(n_prompts=3, shots=2, n_samples=2, new_tokens=2)


def test_a_plain_hugging_face_model_can_be_asked(tiny: LoadedModel, cities: pd.DataFrame, tmp_path: Path) -> None:
    facts, plain = draw(cities, 6, 1), tiny.model
    expected = slick.slick(tiny, facts, cities, LITTLE)
    found = slick.slick(plain, facts, cities, LITTLE, tokenizer=tiny.tokenizer, folder=tmp_path)
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(BadInput, match="brings no tokenizer"):
        slick.slick(plain, facts, cities, LITTLE)


def test_a_plain_model_is_known_by_its_weights(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, facts, asked = load_model(str(tiny_folders["llama"])), draw(cities, 6, 1), []
    ask = slick._ask
    monkeypatch.setattr(slick, "_ask", lambda *args: asked.append(args[-1]) or ask(*args))
    for _ in range(2):
        slick.slick(model.model, facts, cities, LITTLE, tokenizer=model.tokenizer, folder=tmp_path)
    assert asked == [0, 1, 2]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[0, 0] += 1
    slick.slick(model.model, facts, cities, LITTLE, tokenizer=model.tokenizer, folder=tmp_path)
    assert asked == [0, 1, 2, 0, 1, 2]


def test_work_found_finished_is_no_work_done(
    tiny: LoadedModel, cities: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, told = draw(cities, 6, 1), {"done": 0.0, "reused": 0.0}

    def count(what: str, share: float) -> None:
        told[what] += share

    ask = slick._ask
    monkeypatch.setattr(slick, "_ask", lambda *args: ask(*args) if args[-1] < 2 else (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        slick.slick(tiny, facts, cities, LITTLE, folder=tmp_path, advance=lambda s: count("done", s))
    assert told == pytest.approx({"done": 2 / 3, "reused": 0})
    monkeypatch.setattr(slick, "_ask", ask)
    told = {"done": 0.0, "reused": 0.0}
    callbacks = {"advance": lambda s: count("done", s), "on_reused": lambda s: count("reused", s)}
    slick.slick(tiny, facts, cities, LITTLE, folder=tmp_path, **callbacks)
    assert told == pytest.approx({"done": 1 / 3, "reused": 2 / 3})


def test_the_time_estimate_leaves_out_what_was_found(
    tiny: LoadedModel, cities: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped: list[float] = []
    monkeypatch.setattr("subjattn.progress.Progress.skip", lambda self, units: skipped.append(units))
    facts = draw(cities, 6, 1)
    for _ in range(2):
        stated = know(tiny, facts, cities, tmp_path, LITTLE, Console(file=io.StringIO()))["cost"]
    assert sum(skipped) == pytest.approx(stated["computed_prompt_tokens"])


@pytest.fixture(scope="module")
def labelled(
    tiny_folders: dict[str, Path], adapter: Path, cities: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a small model knows of six cities, and what it knows with an adapter."""
    out, name = tmp_path_factory.mktemp("labelled"), str(tiny_folders["llama"])
    for where, own in (("base", None), ("tuned", adapter)):
        know(
            load_model(name, adapter=own), draw(cities, 6, 1), cities, out / where, LITTLE, Console(file=io.StringIO())
        )
    return out


def test_labels_name_whose_they_are(
    labelled: Path, tiny_folders: dict[str, Path], adapter: Path, cities: pd.DataFrame
) -> None:
    base, tuned = (pd.read_parquet(labelled / where / "knowledge.parquet") for where in ("base", "tuned"))
    for table in (base, tuned):
        assert set(table["model_identity"]) == {identity(str(tiny_folders["llama"]))}
        assert set(table["answer_logprob_template"]) == {"Q: {question}\nA:"}
    assert base["adapter_identity"].isna().all() and set(tuned["adapter_identity"]) == {identity(str(adapter))}
    found = json.loads((labelled / "tuned" / "agreement.json").read_text())
    assert found["adapter_identity"] == identity(str(adapter))
    assert "answer_logprob_template" in DEFINITIONS["answer_logprob"]
    loaded = load_model(str(tiny_folders["llama"]))
    asked = make_prompts(draw(cities, 6, 1), loaded.tokenizer, str(base["answer_logprob_template"][0]))
    again = answer_logprob(loaded, asked).to_series()
    np.testing.assert_allclose(base.set_index("fact_id")["answer_logprob"], again.loc[base["fact_id"]], atol=1e-5)


def test_labels_join_their_model_only(
    labelled: Path, tiny_folders: dict[str, Path], cities: pd.DataFrame, tmp_path: Path
) -> None:
    """Planted: those of an adapted model, whose column `model` is the base's, and of a base changed since."""
    path, name = str(labelled / "base" / "knowledge.parquet"), str(tiny_folders["llama"])
    facts = draw(cities, 6, 1)
    labels = pd.read_parquet(path).set_index("fact_id")
    joined = join_labels(pd.concat([facts, draw(cities, 1, 9).assign(fact_id="new")]), path, name)
    assert joined["category"].tolist()[:6] == labels["category"].loc[facts["fact_id"]].tolist()
    assert joined["category"].isna().tolist() == [False] * 6 + [True]
    with pytest.raises(BadInput, match="knows with the adapter '.*', and '.*llama' has none") as caught:
        join_labels(facts, str(labelled / "tuned" / "knowledge.parquet"), name)
    assert "\n" not in str(caught.value)
    for model, message in ((str(tiny_folders["gpt2"]), "says what '.*llama' knows"), ("smollm2-135m", "llama' knows")):
        with pytest.raises(BadInput, match=message):
            join_labels(facts, path, model)
    changed = tmp_path / "changed.parquet"
    pd.read_parquet(path).assign(model_identity="before").to_parquet(changed)
    with pytest.raises(BadInput, match="says what an earlier state of it knows"):
        join_labels(facts, str(changed), name)
    pd.read_parquet(path).assign(model="its old folder").to_parquet(changed)
    assert join_labels(facts, str(changed), name)["category"].notna().all(), "the same model under another name"
    pd.read_parquet(path).drop(columns="model_identity").to_parquet(changed)
    with pytest.raises(BadInput, match="has no column 'model_identity': it is not from"):
        join_labels(facts, str(changed), name)
