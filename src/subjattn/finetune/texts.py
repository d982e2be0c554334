"""Text like that of pre-training, as blocks of tokens: from a file, a data set on the hub, or the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from subjattn.errors import BadInput
from subjattn.facts.files import read_parquet
from subjattn.facts.hub import fetch
from subjattn.models import LoadedModel
from subjattn.run.folder import replacing


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED_AT_ONCE = 64
"""Texts that the model writes side by side."""


def blocks_of_text(source: str, tokenizer: PreTrainedTokenizerBase, n_blocks: int, length: int) -> Tensor:
    """Blocks `[block, token]` from the beginning of a text, the end of each of its parts marked.

    Args:
        source: a .txt file (parts between empty lines), a .parquet file with a column `text`, or one of a data set on
            the hub, `org/name:path/in/it.parquet`.
        tokenizer: of the model that is trained.
        n_blocks: how many; fewer where the text ends before.
        length: tokens of each.

    Raises:
        BadInput: no such file, no column `text`, or a text shorter than one block.
    """
    repository, colon, inside = source.partition(":")
    file = fetch(repository, inside) if colon and repository.count("/") == 1 else Path(source)
    if not file.is_file():
        raise BadInput(f"text {source!r}: there is no such file; give a .txt or .parquet file, or org/name:FILE")
    if file.suffix == ".parquet":
        table = read_parquet(file)
        if "text" not in table:
            raise BadInput(f"text {source!r} has no column 'text'; it has {', '.join(map(str, table))}")
        parts = [str(text) for text in table["text"]]
    else:
        parts = file.read_text(encoding="utf-8").split("\n\n")
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for part in filter(str.strip, parts):
        ids += [*tokenizer(part.strip()).input_ids, *end]
        if len(ids) >= n_blocks * length:
            break
    n_blocks = min(n_blocks, len(ids) // length)
    if not n_blocks:
        raise BadInput(f"text {source!r} has {len(ids)} tokens, and a block takes {length}: give more text")
    return torch.tensor(ids[: n_blocks * length]).view(n_blocks, length)


@torch.no_grad()
def sampled_text(base: LoadedModel, model: Any, n_blocks: int, length: int, seed: int, kept: Path) -> Tensor:
    """Blocks `[block, token]` that the model writes at temperature 1 behind its token for the beginning of a text.

    They are written into `kept`, so that a training that goes on sees the same.
    """
    file = kept / "texts.npy"
    if file.is_file():
        return torch.from_numpy(np.load(file))
    start = base.tokenizer.bos_token_id
    start = base.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise BadInput("the tokenizer has no token that begins or ends a text to sample behind: give a 'text'")
    device, blocks = base.model.device, []
    training = model.training
    model.eval()
    torch.manual_seed(seed)
    for at in range(0, n_blocks, SAMPLED_AT_ONCE):
        begun = torch.full((min(SAMPLED_AT_ONCE, n_blocks - at), 1), int(start), device=device)
        blocks.append(_sampled(model, begun, length).cpu())
    model.train(training)
    found = torch.cat(blocks)
    with replacing(file) as path, path.open("wb") as out:
        np.save(out, found.numpy())
    return found


def _sampled(model: Any, ids: Tensor, length: int) -> Tensor:
    """Ids with tokens drawn behind them up to this length; the end of a text is a token like others."""
    output = model(input_ids=ids, use_cache=True)
    while True:
        drawn = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
        ids = torch.cat([ids, drawn], 1)
        if ids.shape[1] == length:
            return ids
        output = model(input_ids=drawn, past_key_values=output.past_key_values, use_cache=True)
