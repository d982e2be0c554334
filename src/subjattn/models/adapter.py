"""Put a live adapter on a model, and tell its weights from the model's by peft's own account."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subjattn.errors import AdapterMismatch
from subjattn.facts.hub import parted
from subjattn.models.names import identity, located, resolve_adapter
from subjattn.models.packaged import PACKAGES, packaged_model
from subjattn.models.reading import quiet, reading


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NOTHING = 1e-6
"""Of the largest logit: what putting a module around another may move by rounding."""


def with_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    adapter: str,
    *,
    may_be_identical: bool = False,
) -> PreTrainedModel:
    """The model with a live adapter, after checks that the adapter fits and (unless it may not) does something.

    Warns:
        UserWarning: the adapter's own configuration names another base than `base`.

    Raises:
        AdapterMismatch: keys without a partner, shapes that differ, or an adapter that changes nothing.
    """
    from peft import PeftModel

    folder = resolve_adapter(adapter)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids], device=model.device)
    with reading(f"adapter {adapter!r}", AdapterMismatch), torch.no_grad():
        config = _adapter_config(adapter)
        before = model(ids).logits
        tuned = PeftModel(model, config)
        _refuse_misfit(tuned, base, adapter, may_be_identical=may_be_identical)
        tuned.load_adapter(folder, "default")
        after = tuned.eval()(ids).logits
    if not may_be_identical and float((after - before).abs().max()) <= NOTHING * float(before.abs().max()):
        raise _changes_nothing(adapter)
    _warn_of_base(config, base, adapter)
    return tuned.get_base_model()  # type: ignore[return-value]


def check_adapter(base: str, adapter: str) -> bool:
    """Refuse an adapter that does not fit a model or changes nothing in it, before any weights are loaded.

    Returns:
        Whether that is all there is to check, as it is for plain LoRA; what others do only shows once they are loaded.

    Raises:
        AdapterMismatch: modules without a partner, other shapes, or nothing but zeros.
        BadInput: model or adapter cannot be found.

    Warns:
        UserWarning: the adapter's own configuration names another base than `base`.
    """
    from peft import PeftModel, PeftType
    from transformers import AutoConfig, AutoModelForCausalLM

    source, commit = located(base)
    with reading(f"adapter {adapter!r}", AdapterMismatch):
        config = _adapter_config(adapter)
        _warn_of_base(config, base, adapter)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=commit))
            try:
                tuned = PeftModel(model, config)
            except (NotImplementedError, RuntimeError):  # a kind that computes with weights as it is put on
                return False
        _refuse_misfit(tuned, base, adapter)
    more = ("modules_to_save", "use_dora", "trainable_token_indices")
    return config.peft_type == PeftType.LORA and not any(getattr(config, name, None) for name in more)


def _warn_of_base(config: Any, base: str, adapter: str) -> None:
    named = config.base_model_name_or_path
    if named and not _same_model(named, base):
        warnings.warn(
            f"adapter {adapter!r} was trained on {named!r} and is loaded on {base!r}: its shapes fit, but if that is "
            "another model its numbers mean nothing",
            UserWarning,
            stacklevel=4,
        )


def _adapter_config(adapter: str) -> Any:
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(resolve_adapter(adapter))
    if config.is_prompt_learning:
        raise AdapterMismatch(f"adapter {adapter!r} adds prompt tokens, which moves every position: use LoRA")
    begun = getattr(config, "init_lora_weights", True)
    if str(begun).startswith("pissa_niter"):
        raise AdapterMismatch(
            f"adapter {adapter!r} begins with {begun!r}, which draws another base at each loading: save it as plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _refuse_misfit(tuned: PeftModel, base: str, adapter: str, *, may_be_identical: bool = False) -> None:
    """Compare the keys and shapes of an adapter's file with those that this model would save."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    named = adapter_base(tuned)
    origin = f"; it was trained on {named!r}" if named and not _same_model(named, base) else ""
    saved = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    others = {name: tuple(tensor.shape) for name, tensor in tuned.state_dict().items()}  # embeddings may be saved too
    with safe_open(Path(resolve_adapter(adapter)) / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted |= {name: others[name] for name in shapes.keys() - wanted.keys() if name in others}
        if unmatched := sorted(wanted.keys() ^ shapes.keys()):
            raise AdapterMismatch(
                f"adapter {adapter!r} does not match this model's modules (another base model?): "
                f"{len(unmatched)} keys without a partner, such as {', '.join(unmatched[:3])}{origin}"
            )
        if differing := [name for name in sorted(wanted) if wanted[name] != shapes[name]]:
            name = differing[0]
            sizes = [" × ".join(map(str, of[name])) for of in (shapes, wanted)]
            raise AdapterMismatch(
                f"adapter {adapter!r} has other shapes than model {base!r}: {name.removeprefix('base_model.model.')} "
                f"is {sizes[0]} in it and would be {sizes[1]} here ({len(differing)} such){origin}"
            )
        if not may_be_identical and not any(
            bool(file.get_tensor(name).any()) for name in shapes if not _multiplied(name)
        ):
            raise _changes_nothing(adapter)


def _multiplied(name: str) -> bool:
    """Whether a tensor of an adapter counts only as a factor of another: LoRA's A, random from the start."""
    return ".lora_A." in name or ".lora_embedding_A" in name


def _changes_nothing(adapter: str) -> AdapterMismatch:
    return AdapterMismatch(
        f"adapter {adapter!r} changes nothing in this model (an untrained adapter, or one of another model): "
        "a comparison would be of the base model with itself"
    )


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
    folders = [packaged_model(name) if name in PACKAGES else Path(name) for name in (named, base)]
    if not all(folder.is_dir() for folder in folders):
        return False
    return folders[0].resolve() == folders[1].resolve() or identity(str(folders[0])) == identity(str(folders[1]))
