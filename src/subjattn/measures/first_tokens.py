"""First tokens of answers: their margin over others, and whether they tell one answer from another.

What is measured at the prediction position is of the answer's first token alone. Where several answers begin with it,
as years and numbers do with "1" or a space, it says nothing of which answer it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from jaxtyping import Bool, Float

from subjattn.errors import NotDefined, SpanNotFound
from subjattn.measures.candidates import same_answers
from subjattn.prompts.make import first_token


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from subjattn.prompts import Prompt


def first_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """First tokens of all accepted answers, but those whose tokens merge with the prompt's."""
    found = {prompt.answer_ids[0]}
    for answer in prompt.answers[1:]:
        with suppress(SpanNotFound):
            found.add(first_token(tokenizer, prompt, answer))
    return sorted(found)


def shared_first_tokens(
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]] | None = None,
    relations: Mapping[str, str] | None = None,
) -> set[tuple[str, int]]:
    """Relations and tokens that begin several of these facts' answers; answers that one fact accepts are one.

    Args:
        prompts: the facts that are compared.
        tokens: of each fact the first tokens that count; None: that of the first accepted answer.
        relations: by fact id; without, all are of one relation, "".
    """
    own = [[prompt.answer_ids[0]] for prompt in prompts] if tokens is None else tokens
    answers: dict[tuple[str, int], set[int]] = {}
    for prompt, number, of in zip(prompts, same_answers(prompts).tolist(), own, strict=True):
        for token in of:
            answers.setdefault((_relation_of(prompt, relations), token), set()).add(number)
    return {key for key, numbers in answers.items() if len(numbers) > 1}


def _relation_of(prompt: Prompt, relations: Mapping[str, str] | None) -> str:
    return (relations or {}).get(prompt.fact_id, "")


def telling(
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]] | None = None,
    relations: Mapping[str, str] | None = None,
) -> Bool[np.ndarray, " fact"]:
    """Whether the first tokens of each fact's answers begin no answer of the others that it does not accept.

    Raises:
        NotDefined: they tell no fact's answer.
    """
    own = [[prompt.answer_ids[0]] for prompt in prompts] if tokens is None else tokens
    shared = shared_first_tokens(prompts, own, relations)
    found = np.array(
        [
            not any((_relation_of(prompt, relations), token) in shared for token in of)
            for prompt, of in zip(prompts, own, strict=True)
        ],
        bool,
    )
    if not found.any():
        raise_undefined(prompts)
    return found


def raise_undefined(prompts: Sequence[Prompt]) -> NoReturn:
    prompt = prompts[0]
    raise NotDefined(
        f"the first token of an answer tells none of them from others ({prompt.tokens[prompt.prediction + 1]!r} of "
        f"{prompt.answers[0]!r}): ask for answers that begin with different tokens"
    )


class Margin:
    """A metric: of the accepted answers' first tokens over the best other one, in standard deviations of the logits."""

    __name__ = "margin"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
        self.accepted = {prompt.fact_id: first_tokens(tokenizer, prompt) for prompt in prompts}

    def __call__(self, logits: Float[Tensor, "answer vocab"], prompt: Prompt) -> float:
        return float(self.of(logits[:1].cpu().numpy(), [prompt])[0])

    def of(self, logits: Float[np.ndarray, "fact vocab"], prompts: Sequence[Prompt]) -> Float[np.ndarray, " fact"]:
        """Of each prompt's next token; NaN where logits are."""
        found = np.full(len(logits), np.nan)
        for i, (own, prompt) in enumerate(zip(logits, prompts, strict=True)):
            others = own.copy()
            others[self.accepted[prompt.fact_id]] = -np.inf
            found[i] = (own[self.accepted[prompt.fact_id]].max() - others.max()) / own.std()
        return found
