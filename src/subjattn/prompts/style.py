"""A style: how facts are asked. A template, and what stands around it: neutral words, demonstrations, a chat."""

from __future__ import annotations

import string
import zlib
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, model_validator

from subjattn.errors import BadInput
from subjattn.facts.names import broken, plain_name
from subjattn.facts.own import is_own
from subjattn.facts.templates import TEMPLATES
from subjattn.prompts.spacing import answered
from subjattn.worlds.sentences import WORDINGS


REASONING = "Let's think step by step."
"""What asks for a chain of thought (Kojima et al. 2022)."""
CONCLUSION = "So the answer is"
CHAT_DATE = date(2024, 7, 26)
"""Today in chat templates that name the date, the default of Llama 3.1's."""
_FIELDS = ({"subject"}, {"question"}, {"question", "choices"})


class Style(BaseModel):
    """How facts are asked.

    A style is given as a template, as the name of a built-in one (`question`, `paraphrase`, `cloze`, `late`: see
    `subjattn.facts.templates`), or as a mapping of these fields.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str = Field(
        description="a text with {subject}, or with {question} and, for multiple choice, {choices}; "
        "or the name of a built-in template, looked up by relation"
    )
    prefix: NonNegativeInt = Field(0, description="tokens of neutral text at the very beginning")
    shots: NonNegativeInt = Field(0, description="demonstrations before the question, the same for all of a relation")
    demonstrations: Literal["any", "known", "unknown"] = Field(
        "any", description="facts of which third by the ranking of the split: the upper, the lower"
    )
    relation: Literal["same", "other"] = Field("same", description="relation of the demonstrations")
    seed: NonNegativeInt = Field(0, description="of the draw of demonstrations")
    chat: bool = Field(False, description="in the chat template of an instruct model")
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="arguments of the chat template itself, such as {enable_thinking: false}"
    )
    chat_date: date = Field(
        CHAT_DATE, description="today, for chat templates that name the date: prompts must not change overnight"
    )
    chain_of_thought: bool = Field(False, description="let the model reason before it answers")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"template": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "{" in self.template:
            check_template(self.template)
        elif not any(self.template in styles for styles in TEMPLATES.values()):
            names = sorted({name for styles in TEMPLATES.values() for name in styles})
            raise ValueError(
                f"template {self.template!r} must contain {{subject}} or {{question}}, or be one of {', '.join(names)}"
            )
        if self.chat and self.prefix:
            raise ValueError("a chat puts its own text before the question: leave 'prefix' out")
        if not self.chat and (self.chat_template_kwargs or self.chat_date != CHAT_DATE):
            raise ValueError("'chat_template_kwargs' and 'chat_date' are for a chat: give 'chat: true' too")
        if not self.shots and (self.demonstrations, self.relation) != ("any", "same"):
            raise ValueError("'demonstrations' and 'relation' say which facts are shown: give 'shots' too")
        return self

    @classmethod
    def of(cls, style: str | Self) -> Self:
        """The style itself, or the one that a text stands for; BadInput where it is none."""
        if isinstance(style, cls):
            return style
        try:
            return cls.model_validate(style)
        except ValueError as error:
            message = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
            raise BadInput(message.removeprefix("Value error, ")) from None

    def __str__(self) -> str:
        around = self.model_dump(mode="json", exclude_defaults=True, exclude={"template"})
        return self.template + (f" {around}" if around else "")

    def body(self, fact: Mapping[str, Any]) -> tuple[str, int | None]:
        """The fact asked by the template alone, and the character its subject begins at.

        Raises:
            BadInput: the template has no form for this fact; the message names it.
        """
        template = self.template if "{" in self.template else _built_in(self.template, fact)
        subject, fields = fact["subject"], template_fields(template)
        if "subject" in fields:
            if subject is None:
                raise BadInput(f"fact {fact['fact_id']} has no subject: ask it with {{question}}")
            return template.format(subject=subject), len(text_before(template))
        question = fact.get("question")
        if question is None:
            raise BadInput(f"fact {fact['fact_id']} has no question of its own: ask it with {{subject}}")
        choices = fact.get("choices")
        has_choices = choices is not None
        if has_choices != ("choices" in fields):
            raise BadInput(
                f"fact {fact['fact_id']} is {'' if has_choices else 'not '}multiple choice, and the template "
                f"{template!r} {'lacks' if has_choices else 'has'} {{choices}}"
            )
        asked = question.format(subject=subject)
        start = None if subject is None else len(text_before(template)) + len(text_before(question))
        options = [] if choices is None else list(choices)
        listed = "\n".join(f"{string.ascii_uppercase[i]}. {text}" for i, text in enumerate(options))
        return template.format(question=asked, choices=listed), start

    def demonstration(self, fact: Mapping[str, Any]) -> tuple[str, str]:
        """A fact as it is shown: what is asked, and the whole answer, reasoning included."""
        answer = fact["answers"][0]
        if not self.chain_of_thought:
            return self.body(fact)[0], answer
        recalled = _built_in("cloze", fact).format(subject=fact["subject"])
        return self.body(fact)[0], f"{REASONING} {answered(recalled, answer)}. {answered(CONCLUSION, answer)}"


def default_styles(facts: pd.DataFrame) -> dict[str, str]:
    """How to ask these facts without being told: the questions of a user's own table, else two built-in ways.

    Published facts whose relations have no built-in way in common are asked by their own questions too.

    Raises:
        BadInput: the facts bring neither.
    """
    if facts["choices"].notna().any() if "choices" in facts else False:
        return {"choices": "{question}\n{choices}\nAnswer:"}
    relations = sorted(facts["relation"].unique())
    questions = "question" in facts and facts["question"].notna().all()
    if questions and "source" in facts and is_own(facts):
        return {"question": "{question}"}
    built_in = [TEMPLATES.get(relation, {}) for relation in relations]
    if common := [name for name in built_in[0] if all(name in styles for styles in built_in)][:2]:
        return {name: built_in[0][name] if len(built_in) == 1 else name for name in common}
    if questions:
        return {"question": "{question}"}
    unknown = ", ".join(repr(name) for name in relations if name not in TEMPLATES) or "all of them together"
    known = ", ".join(sorted(name for name in TEMPLATES if not name[1:].isdigit()))
    these = "these facts" if relations == ["unnamed"] else f"relation {unknown[:200]}"
    raise BadInput(
        f"no template is known for {these}: give a template (--template in a shell), such as "
        f"'The capital of {{subject}} is', or a column 'question', or a column 'relation' with one of {known}"
    )


def template_fields(template: str) -> set[str]:
    """Names of the fields in a template."""
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def check_template(template: str) -> str:
    """The template itself, if it can be asked; BadInput otherwise."""
    if found := broken(template):
        raise BadInput(f"template {template!r} holds {found}")
    try:
        parsed = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise BadInput(f"template {template!r} cannot be read ({error}): write a literal brace as '{{{{'") from None
    names = [name for name, _, _ in parsed]
    plain = all(not spec and conversion is None for _, spec, conversion in parsed)
    if set(names) not in _FIELDS or len(set(names)) < len(names) or not plain:
        raise BadInput(
            f"template {template!r} must contain {{subject}} exactly once, or {{question}} (and {{choices}}), and no "
            "other field"
        )
    if template != template.rstrip():
        raise BadInput(f"template {template!r} ends in white space: leave it out, the answer brings its own space")
    return template


def demonstrations_of(style: Style, relation: str, pool: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Facts that a relation's prompts may show: as many as there are shots, and one to spare.

    The spare stands in where a prompt asks about one of the others. They depend on the seed and on the pool's fact
    ids, not on the order of rows.

    Raises:
        BadInput: no pool, or too few facts in it; the message says how many there are.
    """
    if pool is None:
        raise BadInput(f"the style {str(style)!r} shows demonstrations: give the facts they are drawn from")
    fitting = pool[(pool["relation"] == relation) == (style.relation == "same")]
    if style.demonstrations != "any":
        if "third" not in pool:
            raise BadInput("known and unknown demonstrations need facts with a column 'third' (see split)")
        fitting = fitting[fitting["third"] == {"known": "top", "unknown": "bottom"}[style.demonstrations]]
    fitting = fitting.sort_values("fact_id")
    records: list[dict[str, Any]] = fitting.to_dict("records")  # type: ignore[assignment]
    asked = pd.Series([_asked_about(fact) for fact in records], fitting.index)
    fitting = fitting[~asked.duplicated()]
    if len(fitting) < style.shots + 1:
        raise BadInput(
            f"{style.shots} demonstrations (and one to spare) of the {style.relation} relation as {relation!r}, "
            f"{style.demonstrations}, are wanted, and there are {len(fitting)} such facts"
        )
    rng = np.random.default_rng([style.seed, zlib.crc32(relation.encode())])
    chosen = rng.choice(len(fitting), style.shots + 1, replace=False)
    return fitting.iloc[chosen].to_dict("records")  # type: ignore[return-value]


def shown_to(fact: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], shots: int) -> list[Mapping[str, Any]]:
    """The demonstrations of one prompt, none of them of the fact or subject that is asked."""
    own = _asked_about(fact)
    return [shown for shown in candidates if shown["fact_id"] != fact["fact_id"] and _asked_about(shown) != own][:shots]


def _asked_about(fact: Mapping[str, Any]) -> str:
    """What a fact asks about, as names are compared: its subject, else its question and choices."""
    subject = fact["subject"]
    if isinstance(subject, str):
        return plain_name(subject)
    choices = fact.get("choices")
    return plain_name(" ".join([str(fact.get("question")), *([] if choices is None else map(str, choices))]))


def _built_in(name: str, fact: Mapping[str, Any]) -> str:
    relation = fact.get("relation", "")
    styles = TEMPLATES.get(relation) or WORDINGS.get(relation, {})
    if name not in styles:
        own = fact.get("question")
        if name == "question" and own is not None and fact["subject"] is not None:
            return str(own)
        raise BadInput(
            f"fact {fact['fact_id']}: the relation {fact.get('relation')!r} has no built-in template {name!r}: "
            "give a template with {subject}"
        )
    return styles[name]


def text_before(template: str) -> str:
    """The text before a template's subject or question."""
    before = ""
    for literal, field, _, _ in string.Formatter().parse(template):
        before += literal
        if field in ("subject", "question"):
            break
    return before
