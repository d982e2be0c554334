"""The same prompt with another subject, a masked one, or with one of its parts alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from subjattn.errors import BadInput
from subjattn.facts.names import plain_name
from subjattn.prompts.prompt import Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ablation = Literal["masked", "subject_only", "relation_only"]


def swap_subjects(prompts: Sequence[Prompt], rng: np.random.Generator) -> list[tuple[Prompt, Prompt]]:
    """Pair each prompt (clean) with one that names another subject in its place (corrupt).

    Both ask the same with the same number of tokens in every part of the prompt and different first answer
    tokens, so that positions align and a logit difference exists (symmetric token replacement,
    Zhang & Nanda 2023). Prompts without a partner are left out; each prompt is clean at most once.
    """
    alike = defaultdict(list)
    for prompt in prompts:
        alike[_frame(prompt)].append(prompt)
    pairs = []
    for clean in prompts:
        partners = [
            other
            for other in alike[_frame(clean)]
            if plain_name(other.subject) != plain_name(clean.subject)
            and other.answer_ids[0] != clean.answer_ids[0]
            and not set(map(plain_name, other.answers)) & set(map(plain_name, clean.answers))
        ]
        if partners:
            pairs.append((clean, partners[int(rng.integers(len(partners)))]))
    return pairs


def aligned(a: Prompt, b: Prompt) -> bool:
    """Whether two prompts have the same tokens outside their subjects, at the same positions."""
    return _frame(a) == _frame(b)


def _frame(prompt: Prompt) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """The subject's span, the prediction position and the tokens around the subject."""
    start, stop = prompt.subject_span
    end = prompt.prediction + 1
    return prompt.subject_span, prompt.prediction, prompt.ids[:start] + prompt.ids[stop:end]


def ablate(prompt: Prompt, what: Ablation, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt without its subject, or without all else; the tokens that stay are the very same.

    Args:
        prompt: as it is asked.
        what: `masked`: each token of the subject becomes the token of "_" (the BOS, where the tokenizer of an invented
            world knows no "_"), so positions stay;
            `relation_only`: the subject's tokens are taken out, and the prompt has no subject any more;
            `subject_only`: the subject's tokens alone (behind a BOS, if there is one) predict the answer.
        tokenizer: of the prompt.

    Raises:
        BadInput: nothing is left of the prompt, or the tokenizer has nothing to mask by.
    """
    start, stop = prompt.subject_span
    bos = 1 if prompt.ids[0] == tokenizer.bos_token_id and start > 0 else 0
    end = prompt.prediction + 1
    if what == "masked":
        mask = _mask(tokenizer)
        ids = (*prompt.ids[:start], *[mask] * (stop - start), *prompt.ids[stop:])
        made = replace(prompt, ids=ids, subject="_")
    elif what == "relation_only":
        made = replace(
            prompt, ids=prompt.ids[:start] + prompt.ids[stop:], prediction=prompt.prediction - stop + start, span=None
        )
    elif what == "subject_only":
        ids = prompt.ids[:bos] + prompt.ids[start:stop] + prompt.ids[end:]
        made = replace(prompt, ids=ids, span=(bos, bos + stop - start), prediction=bos + stop - start - 1)
    else:
        raise BadInput(f"ablation {what!r} is not one of masked, subject_only, relation_only")
    if made.prediction < 0:
        raise BadInput(f"fact {prompt.fact_id}: nothing of the prompt {prompt.text!r} is left without its subject")
    tokens = tuple(str(tokenizer.decode([token])) for token in made.ids)
    return replace(made, tokens=tokens, text="".join(tokens[: made.prediction + 1]))


def _mask(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands for a masked one: one that a model of this tokenizer was trained on."""
    (*_, mask) = tokenizer.encode("_", add_special_tokens=False) or [tokenizer.unk_token_id]
    if mask is not None and (mask != tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(mask) == "_"):
        return int(mask)
    if tokenizer.bos_token_id is None:
        raise BadInput("this tokenizer knows neither '_' nor a BOS: there is no token to mask a subject by")
    return int(tokenizer.bos_token_id)
