"""Load a causal language model by hub id, folder or packaged weights, with or without an adapter."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subjattn.errors import BadInput
from subjattn.models.adapter import with_adapter
from subjattn.models.names import located
from subjattn.models.provenance import provenance
from subjattn.models.random import is_random, random_weights
from subjattn.models.reading import reading


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at import of kernels that nobody asked for
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A Hugging Face causal model in eval mode with its tokenizer; an adapter is live and unmerged.

    In its place may stand a mixture of two (see `subjattn.mixed`), of which only answers can be measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    adapter: str | None = None

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to get the same numbers: what the model is, hashes, dtype, merge state, versions."""
        return provenance(self)


def load_model(
    name: str,
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    four_bit: bool = False,
    identical: bool = False,
) -> LoadedModel:
    """Load a model for measuring.

    Args:
        name: `smollm2-135m` (packaged, no network), a hub id such as `meta-llama/Llama-2-7b-hf` or
            `meta-llama/Llama-2-7b-hf@REVISION` (branch, tag or commit), or a local folder in Hugging Face layout.
        adapter: a PEFT adapter folder or hub id, kept live and unmerged.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device; by default `cuda` if there is one, else `cpu`.
        four_bit: with its matrices in 4 bits (bitsandbytes, NF4), to train an adapter over them.
        identical: whether the adapter may change nothing, as a control.

    Raises:
        BadInput: the model or adapter cannot be found or read.
        AdapterMismatch: adapter keys that match no module, or an adapter that changes nothing.

    Warns:
        UserWarning: an adapter whose configuration names another base model.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise BadInput(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    device = device or best_device()
    source, commit = located(name)
    tokenizer = load_tokenizer(name)
    with reading(f"model {name!r}"):
        model: Any
        loading: dict[str, Any] = {"missing_keys": (), "mismatched_keys": ()}
        if is_random(source):
            if four_bit:
                raise BadInput(f"model {name!r} has random weights, which are not put into 4 bits: leave four_bit out")
            model = random_weights(Path(source), getattr(torch, dtype), device)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                source,
                revision=commit,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                **_quantized(dtype, device, four_bit=four_bit),
            )
    _refuse_incomplete(name, model, loading)
    if four_bit:
        _keep_unpacked(model)
    if adapter is not None:
        model = with_adapter(model, tokenizer, str(name), str(adapter), may_be_identical=identical)
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, str(name), None if adapter is None else str(adapter))


def _quantized(dtype: str, device: str, *, four_bit: bool) -> dict[str, Any]:
    """What transformers is told to load a model in 4 bits."""
    if not four_bit:
        return {}
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise BadInput("a model in 4 bits needs bitsandbytes: pip install 'subjattn[four-bit]', or leave four_bit out")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4 bits anew for CPUs: it rounds (to bfloat16), and a `state_dict` spoils it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def best_device() -> str:
    """`cuda` if there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_incomplete(name: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse weights that would be random, and an adapter that transformers applied by itself."""
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        raise BadInput(
            f"model {name!r} lacks {len(absent)} of its weights, which would be random: {', '.join(absent[:3])}; "
            "save it again with save_pretrained()"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BadInput(f"model {name!r} brings an adapter of its own: give its base model, and the adapter apart")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for looking at prompts without loading weights."""
    from transformers import AutoTokenizer

    source, commit = located(name)
    with reading(f"tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(source, revision=commit)  # type: ignore[no-any-return]


def model_shape(name: str) -> tuple[int, int]:
    """Layers and query heads of a model, from its configuration alone."""
    from transformers import AutoConfig

    source, commit = located(name)
    with reading(f"model {name!r}"):
        config = AutoConfig.from_pretrained(source, revision=commit).get_text_config()
    return config.num_hidden_layers, config.num_attention_heads
