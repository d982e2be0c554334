"""What a model answers: greedy text or a letter, what it thinks before, and the answer's log-probability."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from subjattn.engine.answers import answer_logits
from subjattn.engine.checks import check_model
from subjattn.engine.interventions import BATCH_TOKENS, Row
from subjattn.errors import BadInput
from subjattn.measures import check_prompts, hf_model, labelled, tokenizer_of
from subjattn.measures.metrics import measure_rows, parse_metrics
from subjattn.measures.scoring import SCORERS, ScorerName
from subjattn.prompts import Prompt
from subjattn.prompts.style import CONCLUSION


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subjattn.measures import Model

LOGPROB_ATTRS = {
    "unit": "nats",
    "definition": "log-probability of the first accepted answer, summed over its tokens, the prompt given",
}


def answer_logprob(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Summed log-probability of each prompt's first accepted answer, in nats: an array `(fact,)`."""
    check_prompts(prompts)
    rows = [Row(prompt) for prompt in prompts]
    found = measure_rows(answer_logits(hf_model(model), prompts), rows, parse_metrics("answer_logprob"))
    return labelled("answer_logprob", found.values["answer_logprob"], prompts, **LOGPROB_ATTRS)


def predict(
    model: Model,
    prompts: Sequence[Prompt],
    scorer: ScorerName = "answer_start",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """What a model answers, and whether that is right.

    Greedy text, or the likeliest letter of a multiple-choice question. Prompts of equal length are generated
    together, so nothing is padded.

    Args:
        model: a `LoadedModel`, or a plain Hugging Face causal model in eval mode.
        prompts: facts asked.
        scorer: `answer_start`, `exact_match`, `containment` or `letters`; see `subjattn.measures.scoring`.
        tokenizer: of a plain model; a `LoadedModel` has its own.

    Returns:
        One row per prompt with `fact_id`, `prediction`, `correct` and `scorer`.

    Raises:
        BadInput: an unknown scorer, letters for prompts without choices, or a plain model without a tokenizer.
    """
    hf = hf_model(model)
    check_prompts(prompts)
    check_model(hf)
    if scorer == "letters":
        texts = [ascii_uppercase[i] for i in choice_logprobs(model, prompts).argmax("choice").values]
        correct = [text == prompt.answers[0] for text, prompt in zip(texts, prompts, strict=True)]
    elif scorer in SCORERS:
        rule = SCORERS[scorer]
        texts = generate(hf, tokenizer_of(model, tokenizer), prompts, rule.new_tokens, one_line=rule.one_line)
        correct = [rule.correct(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)]
    else:
        raise BadInput(f"scorer {scorer!r} is not one of {', '.join([*SCORERS, 'letters'])}")
    return pd.DataFrame(
        {
            "fact_id": [prompt.fact_id for prompt in prompts],
            "prediction": texts,
            "correct": correct,
            "scorer": scorer,
        }
    )


@torch.inference_mode()
def choice_logprobs(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Log-probability of each letter of a multiple-choice question, in nats: an array `(fact, choice)`.

    The softmax is over the whole vocabulary. Questions with fewer choices have NaN at the end.

    Raises:
        BadInput: a prompt without choices.
    """
    hf = hf_model(model)
    check_model(hf)
    values = np.full((len(prompts), max((len(prompt.choice_ids) for prompt in prompts), default=0)), np.nan)
    for prompt in prompts:
        if not prompt.choice_ids:
            raise BadInput(f"fact {prompt.fact_id} has no choices: score it by its text, not by letters")
    for index, ids in _of_equal_length(prompts, hf.device, 1):
        logprobs = hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        for row, i in enumerate(index):
            letters = torch.tensor(prompts[i].choice_ids, device=logprobs.device)
            values[i, : len(letters)] = logprobs[row, letters].cpu()
    definition = "log-probability of each letter at the prediction position, over the whole vocabulary"
    return labelled("choice_logprob", values, prompts, ("choice",), unit="nats", definition=definition)


def reason(
    model: Model, prompts: Sequence[Prompt], new_tokens: int = 48, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, str]:
    """What a model thinks before it answers, greedily: one line by fact id, for `make_prompts(reasoning=…)`.

    Args:
        model: a `LoadedModel`, or a plain Hugging Face causal model in eval mode.
        prompts: of a style with chain of thought, made without reasoning.
        new_tokens: the longest thought.
        tokenizer: of a plain model; a `LoadedModel` has its own.
    """
    hf = hf_model(model)
    check_model(hf)
    texts = generate(hf, tokenizer_of(model, tokenizer), prompts, new_tokens, one_line=True)
    return {prompt.fact_id: text.partition(CONCLUSION)[0].strip() for prompt, text in zip(prompts, texts, strict=True)}


@torch.inference_mode()
def generate(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    new_tokens: int,
    *,
    one_line: bool,
) -> list[str]:
    """Greedy text of at most `new_tokens` tokens behind each prompt, stripped; its first line if `one_line`."""
    eos, newlines = ending_tokens(hf, tokenizer)
    texts = [""] * len(prompts)
    for index, ids in _of_equal_length(prompts, hf.device, new_tokens):
        for i, tokens in zip(index, _greedy(hf, ids, eos, newlines if one_line else (), new_tokens), strict=True):
            texts[i] = text_of(tokenizer, tokens, one_line=one_line)
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, one_line: bool) -> str:
    """An answer's text, stripped; its first line if `one_line`."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
    return text.splitlines()[0].strip() if text and one_line else text


def _of_equal_length(
    prompts: Sequence[Prompt], device: torch.device, new_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Prompts (without answers) in batches that need no padding: their numbers and ids."""
    lengths: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        lengths.setdefault(prompt.prediction + 1, []).append(i)
    for length, members in lengths.items():
        step = max(1, BATCH_TOKENS // (length + new_tokens))
        for index in (members[i : i + step] for i in range(0, len(members), step)):
            yield index, torch.tensor([prompts[i].ids[:length] for i in index], device=device)


def ending_tokens(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], Container[int]]:
    """Tokens that end the text, and those that are a new line."""
    configured = hf.generation_config.eos_token_id if hf.generation_config else None
    eos = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    return frozenset(eos), _NewLines(tokenizer)


class _NewLines(Container[int]):
    """Tokens with a new line in them, each looked at when it is met: a whole vocabulary takes half a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._found = tokenizer, dict[int, bool]()

    def __contains__(self, token: object) -> bool:
        assert isinstance(token, int)
        if token not in self._found:
            known = token < len(self._tokenizer)  # a model may have more rows than its tokenizer has tokens
            self._found[token] = known and "\n" in str(self._tokenizer.decode([token]))
        return self._found[token]


def _greedy(
    hf: PreTrainedModel, ids: Tensor, eos: Container[int], newlines: Container[int], new_tokens: int
) -> list[list[int]]:
    """Argmax decoding with the model's own cache; a row leaves the batch when its text or line ends.

    A new line as the first token does not end the line, since the answer may stand below it.
    """
    tokens: list[list[int]] = [[] for _ in range(len(ids))]
    running = list(range(len(ids)))
    output = hf(input_ids=ids, use_cache=True, logits_to_keep=1)
    for step in range(new_tokens):
        new = output.logits[:, -1].argmax(-1)
        read = new.tolist()
        for row, token in zip(running, read, strict=True):
            tokens[row].append(token)
        going = [i for i, token in enumerate(read) if token not in eos and (step == 0 or token not in newlines)]
        if not going or step == new_tokens - 1:
            break
        cache = output.past_key_values
        if len(going) < len(running):
            left = torch.tensor(going, device=new.device)
            cache.batch_select_indices(left)
            new, running = new[left], [running[i] for i in going]
        output = hf(input_ids=new[:, None], past_key_values=cache, use_cache=True)
    return tokens
