"""Put a live adapter on a model, and tell its weights from the model's by peft's own account."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subjattn.errors import AdapterMismatch
from subjattn.facts.hub import parted
from subjattn.models.misfit import refuse_misfit, refuse_other_paths, refuse_unknown_tokens, warn_of_texts
from subjattn.models.names import identity, located, resolve_adapter
from subjattn.models.packaged import PACKAGES, packaged_model
from subjattn.models.reading import quiet, reading


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


NOTHING = 1e-6
"""Of the largest logit: what putting a module around another may move by rounding."""
_AS_EVER = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
_AS_EVER |= {"auto_mapping", "r", "lora_alpha", "target_modules"}
"""Settings of a configuration that say nothing about what is special in it."""


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
        UserWarning: the adapter's own configuration names another base than `base`, or its folder holds another
            tokenizer or chat template.

    Raises:
        AdapterMismatch: keys without a partner, shapes that differ, an adapter that changes nothing, or one whose
            update cannot be told from what peft's wrapper does.
    """
    from peft import PeftModel

    folder = resolve_adapter(adapter)
    with reading(f"adapter {adapter!r}", AdapterMismatch), torch.no_grad():
        config = _adapter_config(adapter)
        trained = _trained_tokens(config)
        refuse_unknown_tokens(model, tokenizer, base, adapter, trained)
        ids = torch.tensor([(tokenizer("The capital of France is").input_ids + trained)[:64]], device=model.device)
        before = model(ids).logits
        try:
            tuned = PeftModel(model, config)
        except ValueError:
            refuse_other_paths(model, adapter)
            raise
        fresh = tuned.eval()(ids).logits if _starts_from_base(config) else before
        _refuse_wrapper(adapter, config, before, fresh)
        refuse_misfit(tuned, tokenizer, base, adapter, origin=_origin(config, base))
        if not may_be_identical and not _has_update(adapter):
            raise _changes_nothing(adapter)
        tuned.load_adapter(folder, "default")
        after = tuned.eval()(ids).logits
        alone = tuned.get_base_model()(ids).logits
    if not may_be_identical and min(_moved(after, before), _moved(after, fresh)) <= NOTHING:
        raise _changes_nothing(adapter)
    if _moved(alone, after) > NOTHING:
        raise AdapterMismatch(
            f"adapter {adapter!r} ({config.peft_type.value}{special(config)}) works through peft's own forward pass "
            "alone, not through the model's modules: its numbers cannot be measured here"
        )
    _warn_of_base(config, base, adapter)
    warn_of_texts(tokenizer, folder, base, adapter)
    return tuned.get_base_model()  # type: ignore[return-value]


def check_adapter(base: str, adapter: str) -> bool:
    """Refuse an adapter that does not fit a model or changes nothing in it, before any weights are loaded.

    Returns:
        Whether that is all there is to check, as it is for plain LoRA; what others do only shows once they are loaded.

    Raises:
        AdapterMismatch: modules without a partner, other shapes, or nothing but zeros.
        BadInput: model or adapter cannot be found.

    Warns:
        UserWarning: the adapter's own configuration names another base model than `base`.
    """
    from peft import PeftModel, PeftType
    from transformers import AutoConfig, AutoModelForCausalLM

    source, commit = located(base)
    with reading(f"adapter {adapter!r}", AdapterMismatch):
        config = _adapter_config(adapter)
        _warn_of_base(config, base, adapter)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=commit))
            refuse_unknown_tokens(model, None, base, adapter, _trained_tokens(config))
            try:
                tuned = PeftModel(model, config)
            except (NotImplementedError, RuntimeError):  # a kind that computes with weights as it is put on
                return False
            except ValueError:
                refuse_other_paths(model, adapter)
                raise
        refuse_misfit(tuned, None, base, adapter, origin=_origin(config, base))
        if not _has_update(adapter):
            raise _changes_nothing(adapter)
    more = ("modules_to_save", "use_dora", "trainable_token_indices")
    return config.peft_type == PeftType.LORA and not any(getattr(config, name, None) for name in more)


def _trained_tokens(config: Any) -> list[int]:
    """Tokens that an adapter trains by themselves."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return [i for some in (found.values() if isinstance(found, dict) else [found]) for i in some]


def _moved(found: torch.Tensor, before: torch.Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((found - before).abs().max() / before.abs().max())


def _starts_from_base(config: Any) -> bool:
    """Whether an adapter of this kind leaves the model's logits alone until it is trained."""
    from peft import PeftType

    if config.peft_type in (PeftType.TRAINABLE_TOKENS, PeftType.LN_TUNING):
        return True
    return config.peft_type == PeftType.LORA and config.init_lora_weights in (True, "gaussian")


def _refuse_wrapper(adapter: str, config: Any, before: torch.Tensor, fresh: torch.Tensor) -> None:
    """Refuse what peft puts around modules where it moves the logits by itself, as by losing a bias."""
    rounding = 10 * NOTHING if before.dtype.itemsize >= 4 else 5e-2
    if (moved := _moved(fresh, before)) > rounding:
        raise AdapterMismatch(
            f"adapter {adapter!r}: what peft {version('peft')} puts around this model's modules{special(config)} moves "
            f"its logits before any training, by {moved:.1e} of the largest (a bias that is lost?), so the adapter's "
            "own effect cannot be told: train it with other target modules"
        )


def special(config: Any) -> str:
    """What is special in an adapter's configuration: ` (bias='all')`; nothing where nothing is."""
    if config is None:
        return ""
    usual = type(config)()
    special = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _AS_EVER and value != getattr(usual, name, None) and value
    }
    return f" ({', '.join(f'{name}={value!r}' for name, value in sorted(special.items()))})" if special else ""


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
    if invoked := getattr(config, "alora_invocation_tokens", None):
        raise AdapterMismatch(
            f"adapter {adapter!r} is an activated LoRA: it works behind its invocation tokens alone "
            f"(alora_invocation_tokens={list(invoked)}), so elsewhere the base would be compared with itself: train it "
            "as plain LoRA"
        )
    begun = getattr(config, "init_lora_weights", True)
    if str(begun).startswith("pissa_niter"):
        raise AdapterMismatch(
            f"adapter {adapter!r} begins with {begun!r}, which draws another base at each loading: save it as plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _has_update(adapter: str) -> bool:
    """Whether anything in the adapter's file is not zero, beside what counts as a factor only: LoRA's random A."""
    from safetensors import safe_open

    with safe_open(Path(resolve_adapter(adapter)) / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".lora_A." not in name and ".lora_embedding_A" not in name]  # noqa: SIM118
        return any(bool(file.get_tensor(name).any()) for name in names)


def _origin(config: Any, base: str) -> str:
    named = config.base_model_name_or_path
    return f"; it was trained on {named!r}" if named and not _same_model(named, base) else ""


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
