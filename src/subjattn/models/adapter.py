"""Put a live adapter on a model, and tell its weights from the model's by peft's own account."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subjattn.errors import AdapterMismatch
from subjattn.facts.hub import parted
from subjattn.models.names import identity, resolve_adapter
from subjattn.models.packaged import PACKAGED, packaged_model
from subjattn.models.reading import quiet, reading


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str, adapter: str
) -> PreTrainedModel:
    """The model with a live adapter, after checks that the adapter fits and does something.

    Warns:
        UserWarning: the adapter's own configuration names another base than `base`.

    Raises:
        AdapterMismatch: keys without a partner, shapes that differ, or an adapter that changes nothing.
    """
    from peft import PeftConfig, PeftModel

    folder = resolve_adapter(adapter)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with reading(f"adapter {adapter!r}", AdapterMismatch), torch.inference_mode():
        before = model(ids).logits
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise AdapterMismatch(f"adapter {adapter!r} adds prompt tokens, which moves every position: use LoRA")
        tuned = PeftModel(model, config)
        loaded = tuned.load_adapter(folder, "default")
        own = adapter_keys(tuned)
        unmatched = [*(key for key in loaded.missing_keys if key in own), *loaded.unexpected_keys]
        if unmatched:
            raise AdapterMismatch(
                f"adapter {adapter!r} does not match this model's modules (another base model?): "
                f"{len(unmatched)} keys without a partner, such as {', '.join(unmatched[:3])}"
            )
        after = tuned.eval()(ids).logits
    if torch.equal(before, after):
        raise AdapterMismatch(
            f"adapter {adapter!r} changes nothing in this model (an untrained adapter, or one of another model): "
            "a comparison would be of the base model with itself"
        )
    named = config.base_model_name_or_path
    if named and not _same_model(named, base):
        warnings.warn(
            f"adapter {adapter!r} was trained on {named!r} and is loaded on {base!r}: its shapes fit, but if that is "
            "another model its numbers mean nothing",
            UserWarning,
            stacklevel=3,
        )
    return tuned.get_base_model()  # type: ignore[return-value]


def adapter_keys(model: Any) -> set[str]:
    """Keys of the state dict that peft would save as the adapter; none where the model carries none."""
    from peft import get_peft_model_state_dict

    if not getattr(model, "peft_config", None):
        return set()
    state = model.state_dict()
    with quiet():
        saved = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    ours = {id(tensor) for tensor in saved.values()}
    return {key for key, tensor in state.items() if id(tensor) in ours}


def adapter_base(model: Any) -> str | None:
    """The base model that a live adapter's configuration names; None where it names none."""
    config = getattr(model, "peft_config", None)
    return (next(iter(config.values())).base_model_name_or_path or None) if config else None


def _same_model(named: str, base: str) -> bool:
    """Whether two names stand for the same model: the same text, place, repository or content."""
    if named == base or parted(named)[0] == parted(base)[0]:
        return True
    folders = [packaged_model() if name == PACKAGED else Path(name) for name in (named, base)]
    if not all(folder.is_dir() for folder in folders):
        return False
    return folders[0].resolve() == folders[1].resolve() or identity(str(folders[0])) == identity(str(folders[1]))
