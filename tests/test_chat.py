"""Prompts in chat templates: what stands before an answer, the template's own arguments, its clock."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

import pandas as pd
import pytest
from conftest import CITIES, SMALL
from test_styles import FACTS, MMLU, POOL, fact
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from subjattn.errors import BadInput
from subjattn.finetune.examples import end_of_answer
from subjattn.measures.answers import predict
from subjattn.prompts import PromptSet, Style, make_prompts
from subjattn.prompts.chat import _warn_once
from subjattn.prompts.make import with_answer
from subjattn.study.checking import check_study
from subjattn.study.plan import plan_study
from subjattn.study.read import load_study
from subjattn.study.stages.tables import load_prompts, save_prompts


TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "ASSISTANT</s>{% endif %}{% endfor %}{% if add_generation_prompt %}HEAD{% endif %}"
)
ASKED = Style(template="{question}", chat=True)
THINKING = TURNS.replace("ASSISTANT", "<|assistant|>{{ m['content'] }}").replace(
    "HEAD",
    "<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}",
)


@pytest.fixture(autouse=True)
def again() -> Iterator[None]:
    _warn_once.cache_clear()
    yield


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=template, bos_token="<s>", eos_token="</s>"
    )


def turns(before: str, head: str) -> str:
    return TURNS.replace("ASSISTANT", f"{before}{{{{ m['content'] }}}}").replace("HEAD", head)


@pytest.mark.parametrize(
    ("before", "head", "answer"),
    [
        ("<|assistant|>", "<|assistant|>", "Nairobi"),
        ("<|assistant|> ", "<|assistant|>", " Nairobi"),
        ("[/INST]", "[/INST]", "Nairobi"),
        ("[/INST] ", "[/INST]", " Nairobi"),
        ("<|assistant|>\n", "<|assistant|>\n", "Nairobi"),
        ("<|assistant|>\n", "<|assistant|>", "Nairobi"),
        ("<|assistant|>\n\n", "<|assistant|>", "Nairobi"),
        ("Assistant:", "Assistant:", "Nairobi"),
        ("Assistant: ", "Assistant:", " Nairobi"),
        (" ", "", " Nairobi"),
    ],
)
def test_an_answer_stands_where_the_template_puts_it(
    tokenizer: PreTrainedTokenizerFast, before: str, head: str, answer: str, tmp_path: Any
) -> None:
    own = with_template(tokenizer, turns(before, head))
    facts = pd.DataFrame([fact("Kenya", "Nairobi")])
    prompts = make_prompts(facts, own, ASKED)
    (prompt,) = prompts
    rendered = own.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Kenya?"}, {"role": "assistant", "content": "Nairobi"}],
        tokenize=False,
    )
    assert rendered.startswith(prompt.text + answer)
    assert own.decode(prompt.answer_ids) == answer
    assert tuple(own(rendered, add_special_tokens=False).input_ids[: len(prompt)]) == prompt.ids
    lima = own.decode(with_answer(own, prompt, "Lima").answer_ids)
    assert lima == answer.replace("Nairobi", "Lima")
    save_prompts(prompts, tmp_path / "prompts.parquet")
    (kept,) = load_prompts(tmp_path / "prompts.parquet")
    assert kept == prompt
    assert with_answer(own, kept, "Lima") == with_answer(own, prompt, "Lima")


def test_letters_stand_there_too(tokenizer: PreTrainedTokenizerFast) -> None:
    own = with_template(tokenizer, turns("[/INST]", "[/INST]"))
    style = Style(template="{question}\n{choices}", chat=True)
    (prompt,) = make_prompts(pd.DataFrame([fact(None, "C", "arithmetic", **MMLU)]), own, style)
    assert [own.decode([letter]) for letter in prompt.choice_ids] == ["A", "B", "C", "D"]


def test_a_thought_begins_where_an_answer_would(tokenizer: PreTrainedTokenizerFast) -> None:
    own = with_template(tokenizer, turns("[/INST]", "[/INST]"))
    style = Style(template="{question}", chat=True, chain_of_thought=True)
    (begun,) = make_prompts(FACTS[:1], own, style)
    assert begun.text.endswith("[/INST]Let's think step by step.")
    (ended,) = make_prompts(FACTS[:1], own, style, reasoning={"Kenya-capital": "It is in Africa."})
    assert ended.text.endswith("[/INST]Let's think step by step. It is in Africa. So the answer is")
    assert own.decode(ended.answer_ids) == " Nairobi"


def test_reasoning_is_warned_of_and_can_be_turned_off(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    own = with_template(tokenizer, THINKING)
    with caplog.at_level(logging.WARNING):
        make_prompts(FACTS, own, ASKED)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "ends its generation prompt in '<think>'" in said and "{enable_thinking: false}" in said
    caplog.clear()
    off = Style(template="{question}", chat=True, chat_template_kwargs={"enable_thinking": False})
    with caplog.at_level(logging.WARNING):
        (prompt, _) = make_prompts(FACTS, own, off)
    assert caplog.records == []
    assert prompt.text.endswith("<|assistant|><think>\n\n</think>\n\n") and own.decode(prompt.answer_ids) == "Nairobi"
    assert "enable_thinking" in str(off) and Style.model_validate(off.model_dump(mode="json")) == off


@pytest.mark.parametrize(
    ("before", "head", "said"),
    [
        ("<|assistant|><think>\n\n</think>\n\n", "<|assistant|>", "puts '<think>\\n\\n</think>' before an answer"),
        ("<|assistant|><|channel|>final<|message|>", "<|assistant|>", "puts '<|channel|>final<|message|>' before"),
        ("<|assistant|>", "<|assistant|><|START_THINKING|>", "ends its generation prompt in '<|START_THINKING|>'"),
        ("<|assistant|>[THINK]", "<|assistant|>[THINK]", "ends its generation prompt in '[THINK]'"),
        ("<|assistant|>", "<|bot|>Sure!", "ends its generation prompt in '<|bot|>Sure!', which"),
        (
            "{% if reasoning_content is defined %}{{ message.thought }}{% endif %}<|assistant|>",
            "<|assistant|>{% set thinking = thinking if thinking is defined else true %}",
            "reads 'thinking', which the style does not set",
        ),
        ("<|assistant|>{% if m.reasoning_content is defined %}{% endif %}", "<|assistant|>", None),
        ("<|assistant|>", "<|assistant|><think></think>", None),
        ("<|assistant|>", "<|assistant|><|START_THINKING|><|END_THINKING|>", None),
    ],
)
def test_an_answer_that_something_else_would_precede(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, before: str, head: str, said: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        make_prompts(FACTS, with_template(tokenizer, turns(before, head)), ASKED)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (said is not None) and all(said in one for one in found if said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, "does not read 'enable_thinkin'; it reads enable_thinking: leave it out"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is set by subjattn itself"),
        ({"strftime_now": "x"}, "'strftime_now' is set by subjattn itself"),
    ],
)
def test_arguments_that_do_nothing_are_refused(
    tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], message: str
) -> None:
    style = Style(template="{question}", chat=True, chat_template_kwargs=arguments)
    with pytest.raises(BadInput, match=message):
        make_prompts(FACTS, with_template(tokenizer, THINKING), style)


def test_a_conversation_that_the_template_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    own = with_template(tokenizer, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(BadInput, match=r"refuses this conversation \(System role not supported\)"):
        make_prompts(FACTS, own, ASKED)


@pytest.mark.parametrize("field", [{"chat_template_kwargs": {"a": 1}}, {"chat_date": "2025-01-01"}])
def test_arguments_without_a_chat(field: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="are for a chat"):
        Style.of({"template": "late", **field})  # type: ignore[arg-type]


CLOCKS = [
    "{{ strftime_now('%d %B %Y') }}",
    '{{ strftime_now("%Y-%m-%d %H:%M:%S %j %A") }}',
    "{% set form = '%a %-d %b %y' %}{{ strftime_now(form) }}",
    "{% if strftime_now is defined %}{% set today = strftime_now('%F') %}{{ today[:4] }}{% endif %}",
    "{% macro head() %}{{ strftime_now('%m/%d/%Y') }}{% endmacro %}{{ head() }}",
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
    "\n  {{ strftime_now('%D') }}\n",
]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("day", ["2024-07-26", "2025-01-02"])
def test_prompts_do_not_change_overnight(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, clock: str, day: str
) -> None:
    """The slow way: let transformers' own clock stand at the style's date."""
    own = with_template(tokenizer, clock + turns("<|assistant|>", "<|assistant|>"))
    style = Style(template="{question}", chat=True, chat_date=day)  # type: ignore[arg-type]
    (prompt, _) = make_prompts(FACTS, own, style)

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)
    messages = [{"role": "user", "content": "What is the capital of Kenya?"}]
    assert prompt.text == own.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ("chat_date" in str(style)) == (day != "2024-07-26")
    assert style.model_dump(mode="json")["chat_date"] == day


def test_what_ends_an_answer_reads_the_same_template(tokenizer: PreTrainedTokenizerFast) -> None:
    ended = turns("<a>", "<a>").replace("</s>", "{% if short %}</s>{% else %}!</s>{% endif %}")
    own = with_template(tokenizer, "{{ strftime_now('%Y') }}" + ended)
    assert own.decode(end_of_answer(own, ASKED)) == "!</s>"
    short = Style(template="{question}", chat=True, chat_template_kwargs={"short": True})
    assert own.decode(end_of_answer(own, short)) == "</s>"


def test_demonstrations_are_written_by_the_same_rule(smollm2: Any) -> None:
    facts = pd.DataFrame([fact(name, "日本", "country") for name in ("東京", "大阪", "京都", "名古屋")])
    style = Style(template="{subject}是哪个国家的城市？答案是：", shots=2)
    prompts = make_prompts(facts, smollm2.tokenizer, style, demonstrations=facts)
    assert isinstance(prompts, PromptSet)
    for prompt in prompts:
        assert prompt.text.count("答案是：日本\n\n") == 2 and "： " not in prompt.text
        assert smollm2.tokenizer.decode(prompt.answer_ids) == "日本"
    quoted = Style(template='The capital of {subject} is "', shots=1)
    for prompt in make_prompts(FACTS, smollm2.tokenizer, quoted, demonstrations=POOL):
        assert '" ' not in prompt.text and smollm2.tokenizer.decode(prompt.answer_ids) == prompt.answers[0]
    with_answer(smollm2.tokenizer, prompts[0], "中国")
    assert predict(smollm2, prompts[:1])["scorer"].tolist() == ["answer_start"]


@pytest.mark.parametrize(("end", "letters"), [("答案：", "ABCD"), ("Answer: (", "ABCD"), ("Answer:", None)])
def test_letters_by_the_same_rule(smollm2: Any, end: str, letters: str | None) -> None:
    facts = pd.DataFrame([fact(None, "C", "arithmetic", **MMLU)])
    (prompt,) = make_prompts(facts, smollm2.tokenizer, f"{{question}}\n{{choices}}\n{end}")
    found = [smollm2.tokenizer.decode([letter]) for letter in prompt.choice_ids]
    assert found == (list(letters) if letters else [" A", " B", " C", " D"])


def test_a_date_is_a_date() -> None:
    assert Style(template="late", chat=True, chat_date=date(2025, 1, 2)).model_dump(mode="json")["chat_date"]
    with pytest.raises(BadInput, match="valid date"):
        Style.of({"template": "late", "chat": True, "chat_date": "yesterday"})  # type: ignore[arg-type]


def test_a_study_tries_its_chats_before_it_runs(
    tiny_folders: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    with_template(tokenizer, THINKING).save_pretrained(tmp_path / "model")
    study = load_study(CITIES, [*SMALL, f"model={tmp_path / 'model'}", "styles.chat={template: question, chat: true}"])
    with caplog.at_level(logging.WARNING):
        assert "the study is valid" in check_study(study)[-1]
    assert any("begins to reason" in record.getMessage() for record in caplog.records)
    wrong = load_study(
        CITIES, [*SMALL, f"model={tiny_folders['llama']}", "styles.chat={template: question, chat: true}"]
    )
    with pytest.raises(BadInput, match="style 'chat': the tokenizer has no chat template") as caught:
        check_study(wrong)
    assert caught.value.field == "styles.chat"
    dated = load_study(
        CITIES,
        [*SMALL, f"model={tmp_path / 'model'}", "styles.chat={template: question, chat: true, chat_date: 2025-01-02}"],
    )
    settings = {stage.name: stage.settings for stage in plan_study(dated)}
    (kept,) = {str(own["style"]["chat_date"]) for own in settings.values() if own.get("style", {}).get("chat")}
    assert kept == "2025-01-02", "the date is part of what a stage is made from"
