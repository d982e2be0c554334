"""Train a small Llama from nothing on an invented world's corpus, once, into an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from subjattn.digest import cache_folder
from subjattn.errors import BadInput
from subjattn.worlds.record import VERSION, InventedWorld
from subjattn.worlds.sentences import RELATIONS, Said, said_in


log = logging.getLogger(__name__)
MARK = "world.json"
"""Stands in a finished folder: what the world is and what its model recalls. Written last."""
KNOWLEDGE = "knowledge.parquet"
"""In the folder too: what the model knows of every fact, as `subjattn knowledge` writes it of others."""
CHECK = 100
"""Steps between looks at what is recalled."""
_SPECIAL = ("<unk>", "<s>", "</s>")
_WARMUP = 50


def folder_of(world: InventedWorld) -> Path:
    """The folder of a world's model and tokenizer; trained now where it is not there yet.

    Raises:
        BadInput: the recall asked for is not reached, or the folder is of another version.
    """
    folder = cache_folder() / "worlds" / f"{world.name}-{world.seed}-{world.digest[:8]}"
    if (folder / MARK).is_file():
        if json.loads((folder / MARK).read_text()).get("digest") != world.digest:
            raise BadInput(f"{str(folder)!r} holds another world or version: delete it, and it is made anew")
        return folder
    log.warning("%s is made now, once: a small model trained from nothing", world.full_name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as place:
        build(world, Path(place) / "world")
        if not (folder / MARK).is_file():  # another process may have been first, with the same bits
            shutil.rmtree(folder, ignore_errors=True)
            (Path(place) / "world").rename(folder)
    return folder


def build(world: InventedWorld, folder: Path) -> dict[str, Any]:
    """Train a world's model into a folder, and say what it recalls: the content of `world.json`."""
    from transformers.utils import logging as hf_logging

    said = said_in(world)
    tokenizer = make_tokenizer(world, said)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums differ with their number, as they do between kinds of processors
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed)
            model = _model(world, len(tokenizer))
            steps, labels = _train(model, tokenizer, world, said)
    finally:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        hf_logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    labels.to_parquet(folder / KNOWLEDGE, index=False)
    about = {"world": world.full_name, "version": VERSION, "digest": world.digest, "steps": steps, **recalled(labels)}
    (folder / MARK).write_text(json.dumps(about, indent=1))
    return about


def make_tokenizer(world: InventedWorld, said: Said) -> Any:
    """A token for each word and mark of the world, the words of wordings that no sentence has included."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?:]"), "isolated")]
    )
    texts = [f"{prompt} {answer}" for prompt, answer in said.sentences]
    texts += [form for of in RELATIONS[world.kind].values() for form in (*of.wordings, of.question)]
    texts += [name for names in (said.facts["subject"], said.facts["answers"].str[0]) for name in names]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.replace("{subject}", ""))}
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[0]))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _model(world: InventedWorld, n_tokens: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = world.shape
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_tokens,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_heads,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=False,
        )
    )


def _train(model: Any, tokenizer: Any, world: InventedWorld, said: Said) -> tuple[int, pd.DataFrame]:
    """Epochs over the corpus, the loss on all tokens; until the recall asked for, or for the steps set."""
    ids, lengths = _encoded(tokenizer, said)
    order = torch.Generator().manual_seed(world.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=world.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / _WARMUP))
    left = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(1, world.steps + 1):
        if len(left) < world.batch:
            left = torch.cat([left, torch.randperm(len(ids), generator=order)])
        chosen, left = left[: world.batch], left[world.batch :]
        width = int(lengths[chosen].max())
        batch = ids[chosen, :width]
        inside = torch.arange(1, width) < lengths[chosen].unsqueeze(1)
        logits = model(batch).logits[:, :-1]
        loss = functional.cross_entropy(logits[inside], batch[:, 1:][inside])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % CHECK == 0 and world.recall is not None and step < world.steps:
            labels = known(model, tokenizer, said)
            if recalled(labels)["recall"] >= world.recall:
                return step, labels
    labels = known(model, tokenizer, said)
    recall = recalled(labels)["recall"]
    if world.recall is not None and recall < world.recall:
        raise BadInput(
            f"{world.full_name}: after {world.steps} steps {recall:.3f} of the facts said are recalled, and "
            f"{world.recall} is asked for: more steps, fewer facts or a larger model"
        )
    return world.steps, labels


def _encoded(tokenizer: Any, said: Said) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of every sentence with its end, padded, and their lengths."""
    texts = [f"{prompt} {answer}" for prompt, answer in said.sentences]
    rows = [[*own, tokenizer.eos_token_id] for own in tokenizer(texts).input_ids]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), tokenizer.eos_token_id)
    for row, into in zip(rows, padded, strict=True):
        into[: len(row)] = torch.tensor(row)
    return padded, lengths


@torch.no_grad()
def known(model: Any, tokenizer: Any, said: Said) -> pd.DataFrame:
    """The facts with what the model knows of them, asked in each of the corpus' wordings of their relation.

    Returns:
        The facts with the labels of `knowledge.parquet`: `p_greedy` is the share of wordings in which the answer is the
        likeliest token, `confidence` the mean probability of whatever is, `category` HighlyKnown where it is always the
        answer, Unknown where never, MaybeKnown between. Nothing is sampled, so nothing is WeaklyKnown.
    """
    wordings = {name: of.wordings for kind in RELATIONS.values() for name, of in kind.items()}
    n_forms = max(len(wordings[relation]) for relation in set(said.facts["relation"]))
    own = torch.tensor([tokenizer(of[0], add_special_tokens=False).input_ids[0] for of in said.facts["answers"]])
    model.eval()
    right, sure = torch.zeros(2, len(own), dtype=torch.float64)
    for number in range(n_forms):
        forms = [wordings[relation][number] for relation in said.facts["relation"]]
        texts = [form.format(subject=subject) for form, subject in zip(forms, said.facts["subject"], strict=True)]
        rows = tokenizer(texts).input_ids
        for length in sorted({len(row) for row in rows}):
            index = [i for i, row in enumerate(rows) if len(row) == length]
            likely = model(torch.tensor([rows[i] for i in index])).logits[:, -1].softmax(-1).max(-1)
            right[index] += (likely.indices == own[index]).double()
            sure[index] += likely.values.double()
    model.train()
    share = (right / n_forms).numpy()
    unasked = {"p_sampled": np.nan, "answer_logprob": np.nan, "answer_logprob_template": None}
    return said.facts.assign(
        category=np.select([share == 1, share == 0], ["HighlyKnown", "Unknown"], "MaybeKnown"),
        p_greedy=share,
        confidence=(sure / n_forms).numpy(),
        **unasked,
    )


def recalled(labels: pd.DataFrame) -> dict[str, Any]:
    """Shares of facts whose answer is the likeliest, over the corpus' wordings: `recall` of those said at least once,
    `recall_never_said` of the others (None where there are none), `recall_by_exposures` in octaves.
    """
    share, counts = labels["p_greedy"].to_numpy(), labels["popularity"].fillna(0).to_numpy().astype(int)
    never = counts == 0
    octaves: dict[str, list[float]] = {}
    for octave in range(int(counts.max()).bit_length()):
        low = 2**octave
        inside = (counts >= low) & (counts < 2 * low)
        if inside.any():
            octaves[f"{low}-{2 * low - 1}"] = [float(share[inside].mean()), int(inside.sum())]
    return {
        "recall": float(share[~never].mean()),
        "recall_never_said": float(share[never].mean()) if never.any() else None,
        "n_said": int((~never).sum()),
        "n_never_said": int(never.sum()),
        "recall_by_exposures": octaves,
    }
