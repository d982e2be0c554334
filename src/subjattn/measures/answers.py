"""What a model answers: greedy text or a letter, what it thinks before, and the answer's log-probability."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import xarray as xr

from subjattn.backends import Backend, BackendName
from subjattn.engine.answers import answer_logits
from subjattn.engine.checks import check_answering
from subjattn.engine.interventions import BATCH_TOKENS, Row
from subjattn.engine.mixture import Decoding, Mixture, lengths_of
from subjattn.errors import BadInput
from subjattn.measures import check_prompts, hf_model, labelled, opened, tokenizer_of
from subjattn.measures.intervened import Interventions, followed, greedy, kept, letters
from subjattn.measures.metrics import measure_rows, parse_metrics
from subjattn.measures.scoring import SCORERS, Scorer, ScorerName
from subjattn.prompts import Prompt
from subjattn.prompts.style import CONCLUSION


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subjattn.measures import Model

BEYOND = 2
"""Tokens that an answer may have more than its accepted form: a "the" before it, and what shows that it has ended."""
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
    *,
    interventions: Interventions | None = None,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> pd.DataFrame:
    """What a model answers, and whether that is right; under interventions, where some are given.

    Greedy text, or the likeliest letter of a multiple-choice question. Prompts of equal length are generated
    together, so nothing is padded.

    Args:
        model: a `LoadedModel`, or a plain Hugging Face causal model in eval mode.
        prompts: facts asked.
        scorer: `answer_start`, `exact_match`, `containment` or `letters`; see `subjattn.measures.scoring`.
        tokenizer: of a plain model; a `LoadedModel` has its own.
        interventions: from a prompt to its `Row`, asked again for every token with the text so far in the place of the
            answer, so that `prompt.predicting` are the positions that predict the text: an edge from them stays blocked
            while it grows, `lambda p: Row(p, Block.between(p.predicting, p.subject_positions))`.
        backend: what computes interventions, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory for them beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        One row per prompt with `fact_id`, `prediction`, `correct` and `scorer`.

    Raises:
        BadInput: an unknown scorer, letters for prompts without choices, a plain model without a tokenizer, a row of
            another prompt, or a backend or budget without interventions.
        NotFired, UnsupportedModel: an intervention could not be applied.
    """
    if interventions is not None:
        each = [interventions] * len(prompts)
        return answered(model, prompts, each, scorer, tokenizer, backend, memory_budget)
    if backend != "engine" or memory_budget is not None:
        raise BadInput("without interventions the model itself generates: leave out the backend and the memory budget")
    hf = hf_model(model)
    check_prompts(prompts)
    check_answering(hf)
    _check_scorer(scorer)
    if scorer == "letters":
        texts = [ascii_uppercase[i] for i in choice_logprobs(model, prompts).argmax("choice").values]
    else:
        rule = SCORERS[scorer]
        own = tokenizer_of(model, tokenizer)
        texts = generate(hf, own, prompts, longest_answers(rule, own, prompts), one_line=rule.one_line)
    return _judged(prompts, texts, scorer)


def predict_rows(
    model: Model,
    rows: Sequence[Row],
    scorer: ScorerName = "answer_start",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> pd.DataFrame:
    """What a model answers in each row, and whether that is right: `predict` under interventions that stay as they are.

    Args:
        model: a `LoadedModel`, or a plain Hugging Face causal model in eval mode.
        rows: prompts with their interventions. A block stays for its queries alone: text behind them reads what it
            likes, and `predict(…, interventions=…)` blocks edges that grow with the text. Patches lie in the prompt.
        scorer, tokenizer, backend, memory_budget: as `predict` takes them.

    Returns:
        One row per row with `fact_id`, `prediction`, `correct` and `scorer`.

    Raises:
        BadInput, NotFired, UnsupportedModel: as `predict`; a patch behind its prompt.
    """
    each = [kept(row) for row in rows]
    return answered(model, [row.prompt for row in rows], each, scorer, tokenizer, backend, memory_budget)


def answered(
    model: Model,
    prompts: Sequence[Prompt],
    interventions: Sequence[Interventions],
    scorer: ScorerName,
    tokenizer: PreTrainedTokenizerBase | None,
    backend: BackendName | Backend,
    memory_budget: int | None,
    *,
    patterns: bool = False,
    whole: bool = True,
) -> pd.DataFrame:
    """What `predict` gives, each prompt under interventions of its own.

    `patterns` says whether some of them put patterns; texts that are not `whole` end where their verdict stands.
    """
    check_prompts(prompts)
    _check_scorer(scorer)
    if not prompts:
        return _judged(prompts, [], scorer)
    hf, rule = hf_model(model), SCORERS.get(scorer)
    if rule is None:
        run = opened(backend, hf, memory_budget, list(map(followed, prompts)), patterns=patterns)
        return _judged(prompts, [ascii_uppercase[i] for i in letters(run, prompts, interventions)], scorer)
    own = tokenizer_of(model, tokenizer)
    most = longest_answers(rule, own, prompts)
    longest = [followed(prompt, prompt.ids[:1] * n) for prompt, n in zip(prompts, most, strict=True)]
    run = opened(backend, hf, memory_budget, longest, patterns=patterns)
    eos, newlines = ending_tokens(hf, own)

    def enough(number: int, tokens: list[int]) -> bool:
        begun = str(own.decode(tokens, skip_special_tokens=True)).lstrip()
        if whole or getattr(own, "clean_up_tokenization_spaces", False):  # which changes what was written before
            return False
        return len(begun.splitlines()) < 2 and rule.decided(begun, prompts[number].answers)

    lines = newlines if rule.one_line else ()
    tokens = greedy(run, prompts, interventions, eos, lines, most, enough)
    return _judged(prompts, [text_of(own, of, one_line=rule.one_line) for of in tokens], scorer)


def longest_answers(rule: Scorer, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens to generate for each prompt: the scorer's, or room for the longest accepted answer where that is more."""
    long = {
        answer for prompt in prompts for answer in prompt.answers if len(answer.encode()) + BEYOND > rule.new_tokens
    }
    lengths = {answer: len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in long}
    return [max(rule.new_tokens, *(lengths.get(answer, 0) + BEYOND for answer in prompt.answers)) for prompt in prompts]


def _check_scorer(scorer: str) -> None:
    if scorer != "letters" and scorer not in SCORERS:
        raise BadInput(f"scorer {scorer!r} is not one of {', '.join([*SCORERS, 'letters'])}")


def _judged(prompts: Sequence[Prompt], texts: Sequence[str], scorer: str) -> pd.DataFrame:
    rule = SCORERS.get(scorer)
    correct = [
        text == prompt.answers[0] if rule is None else rule.correct(text, prompt.answers)
        for text, prompt in zip(texts, prompts, strict=True)
    ]
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
    check_answering(hf)
    values = np.full((len(prompts), max((len(prompt.choice_ids) for prompt in prompts), default=0)), np.nan)
    for prompt in prompts:
        if not prompt.choice_ids:
            raise BadInput(f"fact {prompt.fact_id} has no choices: score it by its text, not by letters")
    for index in _of_equal_length(hf, prompts, 1):
        logprobs = Decoding(hf).begin([prompts[i] for i in index]).float().log_softmax(-1)
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
    check_answering(hf)
    texts = generate(hf, tokenizer_of(model, tokenizer), prompts, [new_tokens] * len(prompts), one_line=True)
    return {prompt.fact_id: text.partition(CONCLUSION)[0].strip() for prompt, text in zip(prompts, texts, strict=True)}


@torch.inference_mode()
def generate(
    hf: PreTrainedModel | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    new_tokens: Sequence[int],
    *,
    one_line: bool,
) -> list[str]:
    """Greedy text of at most `new_tokens` tokens behind each prompt, stripped; its first line if `one_line`."""
    eos, newlines = ending_tokens(hf, tokenizer)
    texts = [""] * len(prompts)
    for index in _of_equal_length(hf, prompts, max(new_tokens, default=0)):
        most = [new_tokens[i] for i in index]
        written = _greedy(hf, [prompts[i] for i in index], eos, newlines if one_line else (), most)
        for i, tokens in zip(index, written, strict=True):
            texts[i] = text_of(tokenizer, tokens, one_line=one_line)
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, one_line: bool) -> str:
    """An answer's text, stripped; its first line if `one_line`."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
    return text.splitlines()[0].strip() if text and one_line else text


def _of_equal_length(hf: PreTrainedModel | Mixture, prompts: Sequence[Prompt], new_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts (without answers) in batches that need no padding."""
    lengths: dict[tuple[int, ...], list[int]] = {}
    for i, its in enumerate(lengths_of(hf, prompts)):
        lengths.setdefault(its, []).append(i)
    for its, members in lengths.items():
        step = max(1, BATCH_TOKENS // (max(its) + new_tokens))
        yield from (members[i : i + step] for i in range(0, len(members), step))


def ending_tokens(
    hf: PreTrainedModel | Mixture, tokenizer: PreTrainedTokenizerBase
) -> tuple[frozenset[int], Container[int]]:
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
    hf: PreTrainedModel | Mixture,
    prompts: Sequence[Prompt],
    eos: Container[int],
    newlines: Container[int],
    new_tokens: Sequence[int],
) -> list[list[int]]:
    """Argmax decoding with the model's own cache; a row leaves the batch when its text or line ends.

    A new line as the first token does not end the line, since the answer may stand below it.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    running, decoding = list(range(len(prompts))), Decoding(hf)
    logits = decoding.begin(prompts)
    for step in range(max(new_tokens)):
        new = logits.argmax(-1)
        read = new.tolist()
        for row, token in zip(running, read, strict=True):
            tokens[row].append(token)
        going = [
            i
            for i, token in enumerate(read)
            if token not in eos and (step == 0 or token not in newlines) and step + 1 < new_tokens[running[i]]
        ]
        if not going:
            break
        if len(going) < len(running):
            left = torch.tensor(going, device=new.device)
            decoding.keep(left)
            new, running = new[left], [running[i] for i in going]
        logits = decoding.go_on(new)
    return tokens
