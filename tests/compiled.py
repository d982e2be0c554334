"""Circuits that nobody here wrote: RASP programs compiled by tracr (Lindner et al. 2023), as ordinary GPT-2 folders.

tracr's transformer has no layer norm, and GPT-2 has. So every number of the residual stream stands there a second time
with its sign turned, and two constants ±`CONSTANT` beside them: the mean is then 0, the variance all but the
constants', and a norm with the weight that undoes it hands on what it is given (to 1e-6 and float32's rounding of the
constants).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


os.environ.setdefault("JAX_PLATFORMS", "cpu")
Circuit = Literal["lookup, then copy", "copy, then lookup"]
CONSTANT = 1000.0
SHARPNESS = 20.0
"""Logit of the program's output, all others are 0."""
MAX_TOKENS = 40
WORDS = ("now", "today", "the", "lives", "in", "somewhere")


def program(circuit: Circuit, answers: Mapping[str, str], attended: set[str]) -> Any:
    """At every position the answer of the one word before it that is `attended`: a subject, where these are names.

    Of the two circuits, the first looks a name's answer up at the name, by an MLP, and copies the answer; the other
    copies the name, and looks its answer up where it is predicted.
    """
    from tracr.rasp import rasp

    def look_up(of: Any) -> Any:
        return rasp.Map(lambda word: answers.get(word, word), of)

    pick = rasp.Select(rasp.tokens, rasp.tokens, lambda key, query: key in attended)
    if circuit == "lookup, then copy":
        return rasp.Aggregate(pick, look_up(rasp.tokens).named("looked"), default=None).named("answer")
    return look_up(rasp.Aggregate(pick, rasp.tokens, default=None).named("copied")).named("answer")


def compiled(circuit: Circuit, answers: Mapping[str, str], attended: set[str] | None = None) -> Any:
    """tracr's own model of a program."""
    from tracr.compiler import compiling

    return compiling.compile_rasp_to_model(
        program(circuit, answers, attended or set(answers)),
        vocab={*answers, *answers.values(), *WORDS},
        max_seq_len=MAX_TOKENS,
        causal=True,
        compiler_bos="BOS",
    )


def convert(theirs: Any, folder: Path) -> Path:
    """The compiled model as a GPT-2 with its tokenizer in a folder."""
    params = {name: {part: np.asarray(of) for part, of in own.items()} for name, own in theirs.params.items()}
    config, n = theirs.model_config, len(theirs.residual_labels)
    assert config.num_heads == 1
    assert not config.layer_norm
    assert config.causal
    width, key = 2 * n + 2, config.key_size
    vocabulary = theirs.input_encoder.encoding_map
    ours = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocabulary),
            n_positions=len(params["pos_embed"]["embeddings"]),
            n_embd=width,
            n_layer=config.num_layers,
            n_head=1,
            n_inner=config.mlp_hidden_size,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=vocabulary["BOS"],
            eos_token_id=vocabulary["compiler_pad"],
        )
    )
    state = {name: np.zeros(of.shape) for name, of in ours.state_dict().items()}

    def written(of: np.ndarray) -> np.ndarray:
        return np.concatenate([of, -of, np.zeros((*of.shape[:-1], 2))], axis=-1)

    def read(of: np.ndarray, out: int) -> np.ndarray:
        found = np.zeros((width, out))
        found[:n, : of.shape[1]] = of
        return found

    state["transformer.wte.weight"] = written(params["token_embed"]["embeddings"])
    state["transformer.wpe.weight"] = written(params["pos_embed"]["embeddings"])
    state["transformer.wpe.weight"][:, -2:] = CONSTANT, -CONSTANT
    for name in state:
        if name.split(".")[-2].startswith("ln_") and name.endswith("weight"):
            state[name] += np.sqrt(2 * CONSTANT**2 / width)
    for layer in range(config.num_layers):
        theirs_at, ours_at = f"transformer/layer_{layer}", f"transformer.h.{layer}"
        scale = np.sqrt(width / key)  # of scores, which each divides by the root of its own head size
        parts = [params[f"{theirs_at}/attn/{part}"] for part in ("query", "key", "value")]
        state[f"{ours_at}.attn.c_attn.weight"] = np.concatenate(
            [read(part["w"] * factor, width) for part, factor in zip(parts, (scale, 1, 1), strict=True)], axis=1
        )
        assert not any(part["b"].any() for part in parts)
        out = params[f"{theirs_at}/attn/linear"]
        state[f"{ours_at}.attn.c_proj.weight"][:key] = written(out["w"])
        state[f"{ours_at}.attn.c_proj.bias"] = written(out["b"])
        first, second = (params[f"{theirs_at}/mlp/linear_{number}"] for number in (1, 2))
        state[f"{ours_at}.mlp.c_fc.weight"], state[f"{ours_at}.mlp.c_fc.bias"] = (
            read(first["w"], config.mlp_hidden_size),
            first["b"],
        )
        state[f"{ours_at}.mlp.c_proj.weight"], state[f"{ours_at}.mlp.c_proj.bias"] = (
            written(second["w"]),
            written(second["b"]),
        )
    for number, label in enumerate(theirs.residual_labels):
        if label.startswith("answer"):
            state["lm_head.weight"][vocabulary[label.partition(":")[2]], number] = SHARPNESS
    ours.load_state_dict({name: torch.tensor(of, dtype=torch.float32) for name, of in state.items()})
    ours.save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)
    return folder


def tokenizer(vocabulary: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """A token a word, the beginning's before them."""
    plain = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="compiler_pad"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="BOS $A", pair="BOS $A $B", special_tokens=[("BOS", vocabulary["BOS"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="BOS",
        eos_token="compiler_pad",
        pad_token="compiler_pad",
        unk_token="compiler_pad",
    )
