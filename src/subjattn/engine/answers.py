"""What follows a prompt, scored for many prompts at least cost: whole passes of a Hugging Face model, plain rows only.

Of a prompt and its answer the last token predicts nothing and is not run; prompts of equal length share a batch, so
that nothing is padded but small batches; and the tokens that all prompts begin with are run once and kept in the
model's own cache. Arithmetic is nearly all it costs (on a CPU the matrix products run at the machine's rate from 64
tokens on), so fewer tokens are the only thing that helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from subjattn.engine.anatomy import only_positions, padded_ids
from subjattn.engine.checks import check_model
from subjattn.engine.forward import predicting_positions
from subjattn.engine.interventions import BATCH_TOKENS, SMALL, Output, Row, batches, wide
from subjattn.engine.mixture import Mixture
from subjattn.engine.prefix import shared_tokens
from subjattn.prompts import Prompt


TOGETHER = 64
"""Prompts of which two models' logits are held side by side."""
HELD = 4
"""Tokens that a batch holds in its cache for one that it may run, at most."""


@torch.inference_mode()
def answer_logits(model: PreTrainedModel | Mixture, prompts: Sequence[Prompt]) -> Iterator[Output]:
    """The logits that predict each prompt's answer tokens, as `forward.forward` gives them for plain rows.

    Args:
        model: a causal language model in eval mode, or a mixture of two.
        prompts: with their answers.

    Raises:
        UnsupportedModel: see errors.py.
    """
    if isinstance(model, Mixture):
        yield from _mixed(model, prompts)
        return
    check_model(model)
    shared = shared_tokens(list(prompts))
    if shared * (len(prompts) - 1) <= SMALL:  # another pass would cost as much
        shared = 0
    beginning = _cache(model, prompts[0].ids[:shared]) if shared else None
    lengths = [len(prompt) - 1 for prompt in prompts]
    for index in batches(lengths, _budget(max(lengths, default=1), shared), padding=1.0):
        some = [prompts[i] for i in index]
        rows, ids = [Row(prompt) for prompt in some], padded_ids(some, model.device)[:, shared:-1]
        cache = deepcopy(beginning)
        if cache is not None:
            cache.batch_repeat_interleave(len(some))
        at, position = predicting_positions(rows)
        with only_positions(model, at, position - shared):
            output = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        yield Output(index, rows, wide(output.logits[0]))


def _mixed(model: Mixture, prompts: Sequence[Prompt]) -> Iterator[Output]:
    """What two models give the answers' tokens, mixed."""
    for at in range(0, len(prompts), TOGETHER):
        some = list(prompts[at : at + TOGETHER])
        ours, theirs = (_in_order(*of) for of in ((model.tuned, some), (model.base, model.before(some))))
        yield Output(list(range(at, at + len(some))), [Row(prompt) for prompt in some], model.mixed(ours, theirs))


def _in_order(model: PreTrainedModel, prompts: list[Prompt]) -> Tensor:
    """The logits that predict the answers' tokens, prompt after prompt."""
    found: dict[int, Tensor] = {}
    for output in answer_logits(model, prompts):
        sizes = [len(row.prompt.predicting) for row in output.rows]
        found |= dict(zip(output.index, output.logits.split(sizes), strict=True))
    return torch.cat([found[i] for i in range(len(prompts))])


def _budget(longest: int, shared: int) -> int:
    """Tokens of a batch, shared ones included: as many as usual are run, and at most `HELD` times that are held."""
    return min(HELD * BATCH_TOKENS, BATCH_TOKENS * longest // (longest - shared))


def _cache(model: PreTrainedModel, ids: Sequence[int]) -> Cache:
    """The model's own cache behind these tokens."""
    none = torch.zeros(0, dtype=torch.long)
    with only_positions(model, none, none):
        cache: Cache = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True).past_key_values
    return cache
