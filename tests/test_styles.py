"""Styles: the exact text of each, and where the asked subject and the answer stand in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import TRICKY
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from subjattn.errors import BadInput, SpanNotFound
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import shortened
from subjattn.measures.knockout import same_edges
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, Style, ablate, make_prompts, subject_spans, swap_subjects


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def fact(subject: str | None, answer: str, relation: str = "capital", **more: Any) -> dict[str, Any]:
    question = None if subject is None else TEMPLATES[relation]["question"]
    return {
        "fact_id": f"{subject}-{relation}",
        "subject": subject,
        "relation": relation,
        "question": question,
        "answers": [answer],
        "choices": None,
    } | more


FACTS = pd.DataFrame([fact("Kenya", "Nairobi"), fact("Peru", "Lima")])
POOL = pd.DataFrame(
    [
        fact("France", "Paris", third="top"),
        fact("Chad", "N'Djamena", third="bottom"),
        fact("Nauru", "Yaren", third="bottom"),
        fact("Kenya", "Nairobi", third="top"),
        fact("Peru", "Lima", third="top"),
        fact("Ada", "Byron", "father", third="top"),
        fact("Zeus", "Cronus", "father", third="bottom"),
    ]
)


def subject_text(tokenizer: Any, prompt: Prompt) -> str:
    return str(tokenizer.decode(list(prompt.ids[slice(*prompt.subject_span)]))).strip()


def check_place(tokenizer: Any, prompt: Prompt, before: str) -> None:
    """The span lies right behind `before`, and the prompt's tokens are its text."""
    assert subject_text(tokenizer, prompt) == prompt.subject
    assert tokenizer.decode(prompt.ids[: prompt.subject_span[0]]).rstrip(" ") == before.rstrip(" ")
    assert tokenizer.decode(prompt.ids[: prompt.prediction + 1]) == prompt.text


def test_built_in_templates_by_relation(smollm2: LoadedModel) -> None:
    facts = pd.DataFrame([fact("Kenya", "Nairobi"), fact("Ada Lovelace", "Lord Byron", "father")])
    late = make_prompts(facts, smollm2.tokenizer, "late")
    assert [prompt.text for prompt in late] == [
        "The city that serves as the capital of Kenya is the city called",
        "The man who is the father of Ada Lovelace is the man named",
    ]
    for prompt in late:
        check_place(smollm2.tokenizer, prompt, prompt.text.partition(prompt.subject)[0])
        assert prompt.subject_span[0] >= 5, "late means behind other words"
        assert prompt.prediction >= prompt.subject_span[1] + 2, "three tokens follow"
    (question, _) = make_prompts(facts, smollm2.tokenizer, "Q: {question}\nA:")
    assert question.text == "Q: What is the capital of Kenya?\nA:"
    check_place(smollm2.tokenizer, question, "Q: What is the capital of")


def test_a_late_subject_can_be_reached_in_two_ways(smollm2: LoadedModel) -> None:
    """Planted: behind "The capital of Kenya is" one position follows, and what is blocked is the same."""
    names = [fact("Kenya", "Nairobi", relation) for relation in TEMPLATES]
    late = make_prompts(pd.DataFrame(names), smollm2.tokenizer, "late")
    for prompt in late:
        assert prompt.prediction - prompt.subject_span[1] + 1 >= 3, prompt.text
    assert not same_edges(late).any()
    assert not same_edges([shortened(prompt) for prompt in late]).any()
    bare = make_prompts(pd.DataFrame(names), smollm2.tokenizer, "The capital of {subject} is")
    assert same_edges([shortened(prompt) for prompt in bare]).all()


def test_every_built_in_template_can_be_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(TEMPLATES) == 41
    for relation, styles in TEMPLATES.items():
        assert {"question", "paraphrase", "cloze", "late"} <= set(styles)
        for name, template in styles.items():
            Style(template=template)
            before, after = template.split("{subject}")
            if name == "late":
                assert len(before.split()) >= 5 and 3 <= len(after.split()) <= 7, (relation, template)
            if name == "cloze":
                assert before == ""


def test_few_shot_text_and_span(smollm2: LoadedModel) -> None:
    style = Style(template="Q: {question}\nA:", shots=2, demonstrations="known", seed=1)
    kenya, peru = make_prompts(FACTS, smollm2.tokenizer, style, demonstrations=POOL)
    for prompt, other in ((kenya, "Peru"), (peru, "Kenya")):
        answer = {"Peru": "Lima", "Kenya": "Nairobi"}[other]
        shown = {
            f"Q: What is the capital of France?\nA: Paris\n\nQ: What is the capital of {other}?\nA: {answer}\n\n",
            f"Q: What is the capital of {other}?\nA: {answer}\n\nQ: What is the capital of France?\nA: Paris\n\n",
        }
        asked = f"Q: What is the capital of {prompt.subject}?\nA:"
        assert prompt.text.removesuffix(asked) in shown, "known demonstrations, the asked fact never among them"
        check_place(smollm2.tokenizer, prompt, prompt.text.removesuffix(f" {prompt.subject}?\nA:"))


def test_the_asked_subject_counts_not_the_one_in_a_demonstration(smollm2: LoadedModel) -> None:
    """The father's demonstration names Kenya, whose capital is asked."""
    pool = pd.DataFrame([fact("Ada", "Kenya", "father"), fact("Zeus", "Kenya", "father")])
    style = Style(template="{question}", shots=1, relation="other")
    (prompt,) = make_prompts(FACTS[:1], smollm2.tokenizer, style, demonstrations=pool)
    assert prompt.text.count("Kenya") == 2
    start, stop = prompt.subject_span
    assert smollm2.tokenizer.decode(prompt.ids[stop : prompt.prediction + 1]) == "?"
    assert "capital of" in smollm2.tokenizer.decode(prompt.ids[:start])


def test_demonstrations_depend_on_the_seed_alone(tokenizer: PreTrainedTokenizerFast, cities: pd.DataFrame) -> None:
    asked, pool = draw(cities, 5, 1), draw(cities, 60, 2)
    texts = {}
    for seed in (0, 1):
        style = Style(template="list", shots=4, seed=seed)
        made = [
            [prompt.text for prompt in make_prompts(asked, tokenizer, style, demonstrations=some)]
            for some in (pool, pool.sample(frac=1, random_state=3))
        ]
        assert made[0] == made[1]
        beginnings = {text[: text.rindex("City:")] for text in made[0]}
        assert len(beginnings) == 1, "all prompts of a relation share their demonstrations"
        texts[seed] = beginnings
    assert texts[0] != texts[1]


def test_chain_of_thought(smollm2: LoadedModel) -> None:
    style = Style(template="Q: {question}\nA:", shots=1, demonstrations="unknown", chain_of_thought=True)
    (begun,) = make_prompts(FACTS[:1], smollm2.tokenizer, style, demonstrations=POOL)
    cloze = TEMPLATES["capital"]["cloze"]
    subject, answer = ("Chad", "N'Djamena") if "Chad" in begun.text else ("Nauru", "Yaren")
    assert begun.text == (
        f"Q: What is the capital of {subject}?\nA: Let's think step by step. {cloze.format(subject=subject)} {answer}. "
        f"So the answer is {answer}\n\nQ: What is the capital of Kenya?\nA: Let's think step by step."
    )
    thought = {"Kenya-capital": " Kenya is a country in Africa. "}
    (ended,) = make_prompts(FACTS[:1], smollm2.tokenizer, style, demonstrations=POOL, reasoning=thought)
    assert ended.text == f"{begun.text} Kenya is a country in Africa. So the answer is"
    for prompt in (begun, ended):
        check_place(smollm2.tokenizer, prompt, prompt.text[: prompt.text.index(" Kenya?")])
    with pytest.raises(BadInput, match="fact Peru-capital: there is no reasoning"):
        make_prompts(FACTS, smollm2.tokenizer, style, demonstrations=POOL, reasoning=thought)


def test_chat_template(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    (prompt,) = make_prompts(FACTS[:1], tokenizer, Style(template="{question}", chat=True))
    messages = [{"role": "user", "content": "What is the capital of Kenya?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(prompt.ids[: prompt.prediction + 1]) == ids
    assert prompt.text.endswith("<|im_start|>user\nWhat is the capital of Kenya?<|im_end|>\n<|im_start|>assistant\n")
    assert subject_text(tokenizer, prompt) == "Kenya"
    assert tokenizer.decode(prompt.answer_ids) == "Nairobi", "no space behind the new line"


def test_demonstrations_are_turns_of_a_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT)
    style = Style(template="{question}", chat=True, shots=1, relation="other", demonstrations="known")
    pool = pd.concat([POOL, pd.DataFrame([fact("Eve", "Adam", "father", third="top")])])
    (prompt,) = make_prompts(FACTS[:1], tokenizer, style, demonstrations=pool)
    name, answer = ("Ada", "Byron") if "Ada?" in prompt.text else ("Eve", "Adam")
    assert prompt.text == (
        f"<|user|>\nWho is the father of {name}?</s>\n<|assistant|>\n{answer}</s>\n"
        "<|user|>\nWhat is the capital of Kenya?</s>\n<|assistant|>\n"
    )
    assert subject_text(tokenizer, prompt) == "Kenya"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT.replace("m['content']", "m['content'] | upper"), "changes the question's text"),
        (None, "has no chat template"),
    ],
)
def test_chats_that_cannot_be_told_apart(
    tokenizer: PreTrainedTokenizerFast, template: str | None, message: str
) -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    with pytest.raises((SpanNotFound, BadInput), match=message):
        make_prompts(FACTS, own, Style(template="{question}", chat=True))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 150))
def test_a_prefix_has_its_length(smollm2: LoadedModel, n: int) -> None:
    plain = make_prompts(FACTS, smollm2.tokenizer, "late")
    for prompt, bare in zip(
        make_prompts(FACTS, smollm2.tokenizer, Style(template="late", prefix=n)), plain, strict=True
    ):
        assert prompt.subject_span[0] == bare.subject_span[0] + n
        assert prompt.ids[n:] == bare.ids
        assert prompt.text.endswith("\n" + bare.text)


MMLU = {"question": "What is 1 + 1?", "choices": ["0", "1", "2", "3"]}


def test_multiple_choice(smollm2: LoadedModel) -> None:
    facts = pd.DataFrame([fact(None, "C", "arithmetic", **MMLU)])
    (prompt,) = make_prompts(facts, smollm2.tokenizer, "{question}\n{choices}\nAnswer:")
    assert prompt.text == "What is 1 + 1?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    assert [smollm2.tokenizer.decode([letter]) for letter in prompt.choice_ids] == [" A", " B", " C", " D"]
    assert prompt.answer_ids == prompt.choice_ids[2:3]
    with pytest.raises(BadInput, match="has no subject: measures of the subject are not defined"):
        _ = prompt.subject_span


def test_a_question_without_a_subject_is_not_shown_to_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = [{"fact_id": f"q{i}", "question": f"What is {i} + {i}?", "choices": MMLU["choices"]} for i in range(3)]
    facts = pd.DataFrame([fact(None, "C", "arithmetic") | row for row in questions])
    style = Style(template="{question}\n{choices}\nAnswer:", shots=2)
    for prompt, row in zip(make_prompts(facts, tokenizer, style, demonstrations=facts), questions, strict=True):
        assert prompt.text.count("Answer:") == 3 and prompt.text.count(row["question"]) == 1


@pytest.mark.parametrize(
    ("row", "style", "message"),
    [
        (fact(None, "C", "x", **MMLU), "{question}", "is multiple choice, and the template .* lacks"),
        (fact("Kenya", "Nairobi"), "{question}\n{choices}", "is not multiple choice"),
        (fact(None, "C", "x", **MMLU), "{subject} is", "has no subject: ask it with {question}"),
        (fact("Kenya", "Nairobi", question=None), "{question}", "has no question of its own"),
        (fact("Kenya", "Nairobi", relation="capital") | {"relation": "colour"}, "late", "no built-in template 'late'"),
        (fact("Kenya", "Nairobi"), Style(template="late", shots=1), "give the facts they are drawn from"),
    ],
)
def test_styles_that_do_not_fit(tokenizer: PreTrainedTokenizerFast, row: dict, style: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_prompts(pd.DataFrame([row]), tokenizer, style)


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("latest", "must contain {subject} or {question}, or be one of"),
        ({"template": "late", "demonstrations": "known"}, "give 'shots' too"),
        ({"template": "late", "shot": 1}, "Extra inputs"),
        ({"template": "late", "chat": True, "prefix": 3}, "leave 'prefix' out"),
        ("{question} {subject}", "no other field"),
    ],
)
def test_styles_that_cannot_be(style: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Style.of(style)


def test_too_few_demonstrations(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadInput, match="3 demonstrations .* known, are wanted, and there are 3 such facts"):
        style = Style(template="late", shots=3, demonstrations="known")
        make_prompts(FACTS, tokenizer, style, demonstrations=POOL)


def test_ablations_keep_the_tokens_that_stay(smollm2: LoadedModel) -> None:
    facts = pd.DataFrame([fact("Burkina Faso", "Ouagadougou")])
    (prompt,) = make_prompts(facts, smollm2.tokenizer, "late")
    start, stop = prompt.subject_span
    end = prompt.prediction + 1
    masked = ablate(prompt, "masked", smollm2.tokenizer)
    assert len(masked) == len(prompt) and masked.span == prompt.span
    assert {smollm2.tokenizer.decode([token]) for token in masked.ids[start:stop]} == {"_"}
    assert masked.ids[:start] + masked.ids[stop:] == prompt.ids[:start] + prompt.ids[stop:]
    relation = ablate(prompt, "relation_only", smollm2.tokenizer)
    assert relation.ids == prompt.ids[:start] + prompt.ids[stop:] and relation.span is None
    alone = ablate(prompt, "subject_only", smollm2.tokenizer)
    assert alone.ids == prompt.ids[start:stop] + prompt.ids[end:]
    assert alone.text == " Burkina Faso"
    for made in (masked, relation, alone):
        assert made.answer_ids == prompt.answer_ids


def test_swaps_stay_within_what_is_asked(smollm2: LoadedModel) -> None:
    """Subjects of the same length in two relations: only those of one relation swap."""
    facts = pd.DataFrame([fact("Kenya", "Nairobi"), fact("Peru", "Lima"), fact("Ada", "Byron", "father")])
    pairs = swap_subjects(make_prompts(facts, smollm2.tokenizer, "late"), np.random.default_rng(0))
    assert {(clean.subject, corrupt.subject) for clean, corrupt in pairs} == {("Kenya", "Peru"), ("Peru", "Kenya")}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_spans_in_every_kind_of_tokenizer(kinds: dict[str, Any], kind: str, cities: pd.DataFrame) -> None:
    tokenizer = kinds[kind]
    names = [*TRICKY, *draw(cities, 300, seed=9)["subject"]]
    facts = pd.DataFrame([fact(name, "Kenya", "country") for name in names]).assign(fact_id=range(len(names)))
    for template in ("In what country is {subject}?", "{subject} is in", 'Of "{subject}" (town):'):
        spans = subject_spans(facts, tokenizer, template)
        prompts = make_prompts(facts, tokenizer, template)
        for prompt, start, stop, edge in zip(prompts, spans["start"], spans["stop"], spans["shared_edge"], strict=True):
            assert prompt.span == (start, stop) and prompt.shared_edge == edge
            found = subject_text(tokenizer, prompt)
            unknown = "<unk>" in found
            assert unknown or (prompt.subject in found if edge else found == prompt.subject), (template, found)
            assert prompt.subject not in tokenizer.decode(prompt.ids[:start])
            rest = tokenizer.decode(prompt.ids[stop : prompt.prediction + 1]).strip()
            assert "<unk>" in rest or template.partition("{subject}")[2].strip().endswith(rest)
