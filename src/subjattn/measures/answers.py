"""What a model answers: greedy text against the accepted answers, and the answer's log-probability."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from subjattn.engine import cones
from subjattn.engine.checks import check_model
from subjattn.engine.interventions import BATCH_TOKENS, Row
from subjattn.measures import hf_model, labelled
from subjattn.measures.metrics import measure_rows
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.measures import Model

NEW_TOKENS = 8
LOGPROB_ATTRS = {
    "unit": "nats",
    "definition": "log-probability of the first accepted answer, summed over its tokens, the prompt given",
}


def answer_logprob(model: Model, prompts: Sequence[Prompt]) -> xr.DataArray:
    """Summed log-probability of each prompt's first accepted answer, in nats: an array `(fact,)`."""
    rows = [Row(prompt) for prompt in prompts]
    found = measure_rows(cones.forward(hf_model(model), rows), rows, ["answer_logprob"])
    return labelled("answer_logprob", found.values["answer_logprob"], prompts, **LOGPROB_ATTRS)


@torch.inference_mode()
def predict(model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """Greedy answers: the first line of at most eight tokens.

    Prompts of equal length are generated together, so nothing is padded.

    Returns:
        One row per prompt with `fact_id`, `prediction` and `correct`, which is
        `is_correct(prediction, answers)`.
    """
    hf = hf_model(model)
    check_model(hf)
    eos, newline = _ending_tokens(hf, tokenizer)
    lengths: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        lengths.setdefault(prompt.prediction + 1, []).append(i)
    texts = [""] * len(prompts)
    for length, members in lengths.items():
        step = max(1, BATCH_TOKENS // (length + NEW_TOKENS))
        for index in (members[i : i + step] for i in range(0, len(members), step)):
            ids = torch.tensor([prompts[i].ids[:length] for i in index], device=hf.device)
            for i, tokens in zip(index, _greedy(hf, ids, eos, newline), strict=True):
                text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                texts[i] = text.splitlines()[0].strip() if text else ""
    return pd.DataFrame(
        {
            "fact_id": [prompt.fact_id for prompt in prompts],
            "prediction": texts,
            "correct": [is_correct(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)],
        }
    )


def _ending_tokens(hf: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Tokens that end the text, and those that are a new line."""
    configured = hf.generation_config.eos_token_id if hf.generation_config else None  # type: ignore[union-attr]
    eos = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    newline = [token for token, text in enumerate(texts) if text == "\n"]
    device = hf.get_input_embeddings().weight.device  # type: ignore[operator]
    return torch.tensor(sorted(eos), dtype=torch.long, device=device), torch.tensor(newline, device=device)


def _greedy(hf: torch.nn.Module, ids: Tensor, eos: Tensor, newline: Tensor) -> list[list[int]]:
    """Argmax decoding with the model's own cache; a row leaves the batch when its text or line ends.

    A new line as the first token does not end the line, since the answer may stand below it.
    """
    tokens: list[list[int]] = [[] for _ in range(len(ids))]
    running = torch.arange(len(ids), device=ids.device)
    output = hf(input_ids=ids, use_cache=True, logits_to_keep=1)
    for step in range(NEW_TOKENS):
        new = output.logits[:, -1].argmax(-1)
        for row, token in zip(running.tolist(), new.tolist(), strict=True):
            tokens[row].append(token)
        going = ~torch.isin(new, torch.cat([eos, newline]) if step else eos)
        if not going.any() or step == NEW_TOKENS - 1:
            break
        cache = output.past_key_values
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
        running = running[going]
        output = hf(input_ids=new[going][:, None], past_key_values=cache, use_cache=True)
    return tokens


def is_correct(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction starts with an accepted answer that ends where a name ends.

    Case, accents, leading punctuation and a leading "the" do not count. A name that goes on is another
    name: "Nigeria" is no answer to "Niger", "Guinea-Bissau" and "Guinea Bissau" are none to "Guinea".
    """
    text = _plain(prediction)
    return any(re.match(re.escape(_plain(a)) + r"(?![\w-])(?!\s+(?-i:[A-Z]))", text, re.IGNORECASE) for a in answers)


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.replace("’", "'"))
    plain = re.sub(r"\s+", " ", "".join(char for char in decomposed if not unicodedata.combining(char)))
    return re.sub(r"^\W*(the\s+)?", "", plain, flags=re.IGNORECASE).rstrip(" .,:;")
