"""A model's shape with random weights: to try out time and memory of the whole road where the weights are not at hand.

Its folder holds a configuration, a tokenizer and a mark in place of weights, so that whatever takes a model's folder
takes it; `load_model` draws the weights as it loads.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from subjattn.digest import cache_folder, digest_of
from subjattn.errors import BadInput
from subjattn.models.names import located
from subjattn.models.packaged import PACKAGED, packaged_model
from subjattn.models.reading import quiet
from subjattn.run.folder import replacing


log = logging.getLogger(__name__)
MARK = "random_weights.json"
"""Stands in a folder for the weights, and says from which seed they are drawn."""


def shapes() -> dict[str, Any]:
    """Configurations that are known without a network, by the model's name in lower case, the maker left out."""
    from transformers import LlamaConfig

    return {"llama-2-7b": LlamaConfig(max_position_embeddings=4096)}


def random_folder(name: str, seed: int = 0) -> Path:
    """A folder that stands for a model of this name with random weights.

    Where the model's configuration or tokenizer cannot be fetched, the shape is one known here, and the tokenizer the
    packaged model's; the embedding then has as many rows as that needs, which is said.

    Raises:
        BadInput: a model whose shape is not known.
    """
    from transformers import AutoConfig, AutoTokenizer

    with quiet():
        try:
            source, commit = located(name)
            config = AutoConfig.from_pretrained(source, revision=commit)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=commit)
        except (OSError, ValueError):
            short = name.rpartition("/")[2].partition("@")[0].lower().removesuffix("-hf")
            if short not in shapes():
                raise BadInput(
                    f"the shape of {name!r} is not at hand; known without a network: {', '.join(shapes())}"
                ) from None
            config, tokenizer = shapes()[short], AutoTokenizer.from_pretrained(packaged_model(PACKAGED))
            log.warning("%s: its tokenizer is not at hand, that of %s stands for it", name, PACKAGED)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    what = {"seed": seed, "config": config.to_dict(), "tokens": len(tokenizer)}
    digest = digest_of(json.loads(json.dumps(what, default=str)))[:8]
    folder = cache_folder() / "random" / f"{Path(name).name}-{digest}"
    if not (folder / MARK).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with replacing(folder / MARK) as path:
            path.write_text(json.dumps({"seed": seed, "shape_of": name}))
    return folder


def random_weights(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The model that a folder of `random_folder` stands for; on one kind of device the same each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    seed = int(json.loads((folder / MARK).read_text())["seed"])
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def is_random(source: str) -> bool:
    """Whether a folder stands for random weights."""
    return (Path(source) / MARK).is_file()
