"""SliCK: how well a model knows a fact, from many few-shot prompts (Gekhman et al. 2024, arXiv:2405.05904).

A fact is asked in `n_prompts` few-shot prompts with other demonstrations of its relation; each gives one greedy
answer and `n_samples` sampled ones. Of the greedy answers P(T=0) are right, of the sampled ones P(T>0):

| category | |
|---|---|
| HighlyKnown | P(T=0) = 1 |
| MaybeKnown | 0 < P(T=0) < 1 |
| WeaklyKnown | P(T=0) = 0 and P(T>0) > 0 |
| Unknown | neither ever |

The budget decides: with more samples some Unknown facts turn out WeaklyKnown, and where `new_tokens` is given, an
answer longer than that is never right. `subjattn knowledge` records it with the labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from subjattn.digest import digest_of
from subjattn.engine.prefix import shared_tokens
from subjattn.errors import BadInput
from subjattn.facts.splits import CATEGORIES
from subjattn.knowledge.sampling import Drawn, Sampler
from subjattn.measures import hf_model, tokenizer_of
from subjattn.measures.answers import ending_tokens, longest_answers, text_of
from subjattn.measures.scoring import SCORERS
from subjattn.models import LoadedModel, identity
from subjattn.models.provenance import weights_sha256
from subjattn.prompts import Prompt, Style, make_prompts
from subjattn.run.folder import Folder


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.measures import Model


Template = Annotated[str, AfterValidator(lambda text: Style.of(text).template)]


class Budget(BaseModel):
    """How much is asked; Gekhman et al.'s figures by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_prompts: PositiveInt = Field(10, description="few-shot prompts a fact is asked in")
    shots: PositiveInt = Field(4, description="demonstrations a prompt, of the fact's relation")
    n_samples: NonNegativeInt = Field(16, description="sampled answers a prompt, besides the greedy one")
    temperature: PositiveFloat = 0.5
    new_tokens: PositiveInt | None = Field(
        None, description="the longest answer; by default the scorer's, or the accepted answer's where that is longer"
    )
    scorer: Literal["exact_match", "answer_start", "containment"] = "exact_match"
    template: Template = "Q: {question}\nA:"
    seed: NonNegativeInt = 0

    def longest(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of the longest answer to each prompt."""
        if self.new_tokens is not None:
            return [self.new_tokens] * len(prompts)
        return longest_answers(SCORERS[self.scorer], tokenizer, prompts)

    def style(self, index: int) -> Style:
        """The few-shot style of the prompt with this number."""
        return Style(template=self.template, shots=self.shots, seed=self.seed * 1_000_003 + index)


def category(p_greedy: float, p_sampled: float) -> str:
    """The SliCK category of a fact from its shares of right answers."""
    if p_greedy >= 1:
        return CATEGORIES[0]
    if p_greedy > 0:
        return CATEGORIES[1]
    return CATEGORIES[2] if p_sampled > 0 else CATEGORIES[3]


def cost(facts: pd.DataFrame, pool: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, budget: Budget) -> dict[str, int]:
    """What labelling will take: answers drawn, tokens of all prompts, and those that are computed (the rest is shared).

    From the first of the prompts; the others differ in their demonstrations.
    """
    groups = answer_groups(facts, pool, tokenizer, budget, 0)
    tokens = sum(prompt.prediction + 1 for group in groups for prompt in group)
    saved = sum(shared_tokens(group) * (len(group) - 1) for group in groups)
    return {
        "answers": len(facts) * budget.n_prompts * (1 + budget.n_samples),
        "prompt_tokens": tokens * budget.n_prompts,
        "computed_prompt_tokens": (tokens - saved) * budget.n_prompts,
    }


def slick(
    model: Model,
    facts: pd.DataFrame,
    pool: pd.DataFrame,
    budget: Budget | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: Path | None = None,
    advance: Callable[[float], None] = lambda _: None,
    on_reused: Callable[[float], None] = lambda _: None,
) -> pd.DataFrame:
    """Label every fact.

    Args:
        model: whose knowledge is meant: a `LoadedModel`, or a plain Hugging Face causal model in eval mode.
        facts: the facts to label.
        pool: facts that demonstrations are drawn from; may hold the facts themselves, which are never shown to
            themselves.
        budget: how much to ask.
        tokenizer: of a plain model; a `LoadedModel` has its own.
        folder: where finished prompts are kept, so that a stopped run goes on; None keeps nothing.
        advance: told of the share of the work done just now.
        on_reused: told of the share of the work found finished in the folder.

    Returns:
        One row per fact: `fact_id`, `category`, `p_greedy` (share of right greedy answers), `p_sampled`,
        `confidence` (mean probability of the greedy answers), `greedy` (the most frequent greedy answer), `n_greedy`,
        `n_sampled`.

    Raises:
        BadInput: too few demonstrations in a relation, multiple-choice facts, or a plain model without a tokenizer.
    """
    budget = budget or Budget()
    asked_of = (
        model if isinstance(model, LoadedModel) else LoadedModel(hf_model(model), tokenizer_of(model, tokenizer), "")
    )
    if facts["choices"].notna().any():
        raise BadInput("SliCK asks for answers in words: rank multiple-choice facts by base-model loss instead")
    who = _who(asked_of) if folder is not None else []
    digests = [
        pd.util.hash_pandas_object(table.astype(str), index=False).to_numpy().tobytes().hex() for table in (facts, pool)
    ]
    parts, kept = [], None if folder is None else Folder(folder)
    for index in range(budget.n_prompts):
        name = f"prompt-{index:02d}"
        recipe = digest_of({"model": who, "tables": digests, "budget": budget.model_dump(), "index": index})
        if kept is not None and kept.holds(name, recipe):
            part = pd.read_parquet(kept.path(name) / "answers.parquet")
            on_reused(1 / budget.n_prompts)
        else:
            part = _ask(asked_of, facts, pool, budget, index)
            if kept is not None:
                with kept.writing(name, {"recipe": recipe, "inputs": {}}) as temporary:
                    part.to_parquet(temporary / "answers.parquet", index=False)
            advance(1 / budget.n_prompts)
        parts.append(part)
    asked = pd.concat(parts)
    groups = asked.groupby("fact_id", sort=False)
    found = pd.DataFrame(
        {
            "p_greedy": groups["greedy_correct"].mean(),
            "p_sampled": groups["n_correct"].sum() / (budget.n_prompts * budget.n_samples) if budget.n_samples else 0.0,
            "confidence": groups["confidence"].mean(),
            "greedy": groups["greedy"].agg(lambda texts: texts.mode().iloc[0]),
            "n_greedy": budget.n_prompts,
            "n_sampled": budget.n_prompts * budget.n_samples,
        }
    ).reindex(facts["fact_id"])
    labels = [category(*pair) for pair in zip(found["p_greedy"], found["p_sampled"], strict=True)]
    found.insert(0, "category", labels)
    return found.reset_index()


def _who(model: LoadedModel) -> list[str | None]:
    """What tells one model's answers from another's: identities, of a model without a name digests of its weights."""
    dtype = str(model.model.dtype)
    if not model.name:
        return [weights_sha256(model.model, adapter=False), weights_sha256(model.model, adapter=True), dtype]
    return [identity(model.name), model.adapter and identity(model.adapter), dtype]


def _ask(model: LoadedModel, facts: pd.DataFrame, pool: pd.DataFrame, budget: Budget, index: int) -> pd.DataFrame:
    """All facts in the few-shot prompt with one number: a row per fact."""
    sampler, rows = sampler_of(model, budget), []
    for group in answer_groups(facts, pool, model.tokenizer, budget, index):
        seeds = [[budget.seed, index, zlib.crc32(prompt.fact_id.encode())] for prompt in group]
        longest = budget.longest(model.tokenizer, group)
        drawn = sampler.draw(group, seeds, longest, hopeless=partial(hopeless, model, budget, group))
        rows += [_score(prompt, found, model, budget) for prompt, found in zip(group, drawn, strict=True)]
    return pd.DataFrame(rows).set_index("fact_id").reindex(facts["fact_id"]).reset_index()


def sampler_of(model: LoadedModel, budget: Budget) -> Sampler:
    """What draws a model's answers."""
    eos, newlines = ending_tokens(model.model, model.tokenizer)
    lines = newlines if SCORERS[budget.scorer].one_line else frozenset[int]()
    return Sampler(model.model, eos, lines, budget.n_samples, budget.temperature)


def hopeless(model: LoadedModel, budget: Budget, group: list[Prompt], number: int, tokens: tuple[int, ...]) -> bool:
    """Whether the answer to a group's prompt of this number that begins so is wrong whatever follows."""
    begun = str(model.tokenizer.decode(list(tokens), skip_special_tokens=True)).lstrip()
    return len(begun.splitlines()) < 2 and SCORERS[budget.scorer].hopeless(begun, group[number].answers)


def _score(prompt: Prompt, drawn: Drawn, model: LoadedModel, budget: Budget) -> dict[str, object]:
    rule = SCORERS[budget.scorer]

    def text(tokens: tuple[int, ...]) -> str:
        return text_of(model.tokenizer, tokens, one_line=rule.one_line)

    right = [count for tokens, count in drawn.samples.items() if rule.correct(text(tokens), prompt.answers)]
    return {
        "fact_id": prompt.fact_id,
        "greedy": text(drawn.greedy),
        "greedy_correct": rule.correct(text(drawn.greedy), prompt.answers),
        "confidence": drawn.confidence,
        "n_correct": sum(right),
    }


def answer_groups(
    facts: pd.DataFrame, pool: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, budget: Budget, index: int
) -> list[list[Prompt]]:
    """Prompts with the same demonstrations together: a relation's, and apart those whose fact is among them."""
    style = budget.style(index)
    prompts = make_prompts(facts, tokenizer, style, demonstrations=pool)
    groups: dict[str, list[Prompt]] = {}
    for prompt, fact in zip(prompts, facts.to_dict("records"), strict=True):
        shown = prompt.text.removesuffix(style.body(fact)[0])  # type: ignore[arg-type]
        groups.setdefault(shown, []).append(prompt)
    return list(groups.values())
