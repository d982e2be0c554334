"""Checkpoints too large to be held beside another: their layers stay on disk, and are read as they are called."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from subjattn.engine.anatomy import decoder_layers
from subjattn.models.load import LoadedModel, best_device, load_tokenizer
from subjattn.models.names import located
from subjattn.models.reading import reading


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_folders: list[TemporaryDirectory[str]] = []
"""Where weights lie that transformers had to write anew, until the process ends."""


def fits(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model's weights would take at most half of the memory that is free."""
    with reading(f"model {name!r}"):
        needed = sum(parameter.numel() for parameter in _empty(name).parameters()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 2 * needed <= free


def stream_model(name: str, dtype: torch.dtype, device: str | None = None) -> LoadedModel:
    """Load all but the decoder layers, which accelerate reads from disk, module by module, whenever they are called.

    Raises:
        BadInput: the model cannot be found or read.
    """
    source, commit = located(name)
    _folders.append(TemporaryDirectory(prefix="subjattn-"))
    with reading(f"model {name!r}"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=commit,
            dtype=dtype,
            use_safetensors=True,
            device_map=_on_disk(_empty(name), device or best_device()),
            offload_folder=_folders[-1].name,
        )
    return LoadedModel(model.eval().requires_grad_(False), load_tokenizer(name), str(name))


def _empty(name: str) -> PreTrainedModel:
    source, commit = located(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=commit))  # type: ignore[no-any-return]


def _on_disk(model: PreTrainedModel, device: str) -> dict[str, str]:
    """Every module beside the list of layers to the device, the list to disk."""
    layers = decoder_layers(model)
    (path,) = [name for name, module in model.named_modules() if module is layers]
    found = {path: "disk"}
    parents = path.split(".")[:-1]
    for depth in range(len(parents) + 1):
        inside = ".".join(parents[:depth])
        for name, _ in model.get_submodule(inside).named_children():
            child = f"{inside}.{name}" if inside else name
            if not path.startswith(child):
                found[child] = device
    return found
