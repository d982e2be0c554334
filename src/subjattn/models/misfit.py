"""Say how an adapter's files differ from the model that they are put on: paths, shapes, tokens, chat template."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subjattn.errors import AdapterMismatch
from subjattn.models.names import TOKENIZER_FILES, located, resolve_adapter
from subjattn.models.reading import reading


if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_SHOWN = 5
"""Tokens that are named at most."""
_SAID = ("The capital of France is", " Nairobi", "東京 é\n\n1984")
"""Texts on which two tokenizers are compared."""
_PREFIX = "base_model.model."
"""What peft puts before a module's path."""


def refuse_misfit(
    tuned: PeftModel, tokenizer: PreTrainedTokenizerBase | None, base: str, adapter: str, *, origin: str
) -> None:
    """Compare the keys and shapes of an adapter's file with those that this model would save."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    more = tuned.state_dict() | get_peft_model_state_dict(tuned, save_embedding_layers=True)  # which may be saved too
    others = {name: tuple(tensor.shape) for name, tensor in more.items()}
    shapes = _shapes(adapter)
    wanted |= {name: others[name] for name in shapes.keys() - wanted.keys() if name in others}
    if unmatched := sorted(wanted.keys() ^ shapes.keys()):
        refuse_other_paths(tuned.get_base_model(), adapter)
        raise AdapterMismatch(
            f"adapter {adapter!r} does not match this model's modules (another base model?): "
            f"{len(unmatched)} keys without a partner, such as {', '.join(unmatched[:3])}{origin}"
        )
    if differing := [name for name in sorted(wanted) if wanted[name] != shapes[name]]:
        _refuse_more_tokens(tuned.get_base_model(), tokenizer, base, adapter, {n: shapes[n] for n in differing})
        name = differing[0]
        sizes = [" × ".join(map(str, of[name])) for of in (shapes, wanted)]
        raise AdapterMismatch(
            f"adapter {adapter!r} has other shapes than model {base!r}: {name.removeprefix('base_model.model.')} "
            f"is {sizes[0]} in it and would be {sizes[1]} here ({len(differing)} such){origin}"
        )


def refuse_other_paths(model: nn.Module, adapter: str) -> None:
    """Refuse an adapter whose modules are this model's under another path, naming both."""
    ours: dict[tuple[str, ...], str] = {}
    for name in _leaves(model):
        path = (_PREFIX + name).split(".")
        ours |= {tuple(path[start:]): ".".join(path[: start + 1]) for start in range(len(path) - 1)}
    found = Counter(pair for key in _shapes(adapter) if (pair := _other_path(key.split("."), ours)) is not None)
    if not found:
        return
    (theirs, here), _ = found.most_common(1)[0]
    if theirs.startswith(_PREFIX) and here.startswith(_PREFIX):
        theirs, here = theirs.removeprefix(_PREFIX), here.removeprefix(_PREFIX)
    raise AdapterMismatch(
        f"adapter {adapter!r} has its modules under {theirs!r}, and this model under {here!r}: give the base model "
        "that it was trained on, or rename them in adapter_model.safetensors (and in adapter_config.json)"
    )


def _leaves(model: nn.Module) -> list[str]:
    """Modules without children, those that peft wrapped under their own names."""
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    plain = [name for name, module in model.named_modules() if not any(True for _ in module.children())]
    return [*wrapped, *(name for name in plain if not name.startswith(tuple(f"{one}." for one in wrapped)))]


def _other_path(key: list[str], ours: Mapping[tuple[str, ...], str]) -> tuple[str, str] | None:
    """Where a key's module stands in the file and in the model, up to the first name that they share."""
    spans = [(start, end) for start in range(len(key)) for end in range(start + 2, len(key) + 1)]
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        if (here := ours.get(tuple(key[start:end]))) is not None:
            theirs = ".".join(key[: start + 1])
            same = _NUMBER.sub("", theirs) == _NUMBER.sub("", here)  # another layer is no other path
            return None if same else (theirs, here)
    return None


def refuse_unknown_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, base: str, adapter: str, indices: Collection[int]
) -> None:
    """Refuse an adapter that trains single tokens which the model has not."""
    rows = model.get_input_embeddings().weight.shape[0]
    if indices and max(indices) >= rows:
        raise _other_tokens(max(indices) + 1, rows, tokenizer, base, adapter)


def _refuse_more_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    base: str,
    adapter: str,
    differing: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse an adapter of a model whose embeddings were resized, by the tokens that were added."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    paths = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    rows = model.get_input_embeddings().weight.shape[0]
    if all(any(f".{path}." in name for path in paths) for name in differing):
        theirs = {size for shape in differing.values() for size in shape if size != rows}
        raise _other_tokens(max(theirs), rows, tokenizer, base, adapter)


def _other_tokens(
    theirs: int, rows: int, tokenizer: PreTrainedTokenizerBase | None, base: str, adapter: str
) -> AdapterMismatch:
    known = _tokenizer_of(base) if tokenizer is None else tokenizer
    own = _own_tokenizer(resolve_adapter(adapter), known)
    names, n = "its folder holds no tokenizer that names them", abs(theirs - rows)
    if own is not None:
        added = _added(own, known)
        names, n = _listed(added) or "its tokenizer has no others than the model's", len(added) or n
    return AdapterMismatch(
        f"adapter {adapter!r} was trained with {n} {'more' if theirs > rows else 'fewer'} token{'s' * (n > 1)} "
        f"({names}): it has {theirs} rows of embeddings and model {base!r} {rows}; change the base as it was changed "
        f"for training (tokenizer.add_tokens, model.resize_token_embeddings({theirs})), save both in one folder, and "
        "give that"
    )


def warn_of_texts(tokenizer: PreTrainedTokenizerBase, folder: str, base: str, adapter: str) -> None:
    """Warn where an adapter's folder holds a tokenizer or chat template that is not the base's: the base's is used."""
    own = _own_tokenizer(folder, tokenizer)
    chat, differ = _own_template(Path(folder), own), []
    if own is None and (Path(folder) / "tokenizer.json").is_file():
        differ.append("tokenizer files that cannot be read")
    if chat is not None and chat.rstrip("\n") != (tokenizer.chat_template or "").rstrip("\n"):
        differ.append("another chat template" if tokenizer.chat_template else "a chat template, and the base has none")
    differ += [] if own is None else _differences(own, tokenizer)
    if differ:
        warnings.warn(
            f"adapter {adapter!r} brings a tokenizer or chat template of its own, which differs from that of {base!r}: "
            f"{'; '.join(differ)}. Prompts are made with the base's: if the adapter was trained with its own, save the "
            "base with that tokenizer and give that folder as the base",
            UserWarning,
            stacklevel=4,
        )


def _differences(own: PreTrainedTokenizerBase, known: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer has otherwise than the base's."""
    differ = []
    if added := _added(own, known):
        differ.append(f"{len(added)} more token{'s' * (len(added) > 1)} ({_listed(added)})")
    if lost := _added(known, own):
        differ.append(f"{len(lost)} fewer token{'s' * (len(lost) > 1)} ({_listed(lost)})")
    numbers = known.get_vocab()
    if moved := [token for token, i in own.get_vocab().items() if numbers.get(token, i) != i]:
        differ.append(f"other numbers for {len(moved)} token{'s' * (len(moved) > 1)} ({_listed(moved)})")
    differ += [
        f"{what.replace('_', ' ')} {getattr(own, what)!r} for {getattr(known, what)!r}"
        for what in ("bos_token", "eos_token")
        if getattr(own, what) != getattr(known, what)
    ]
    if not differ and (text := next((t for t in _SAID if own(t).input_ids != known(t).input_ids), None)):
        differ.append(f"other tokens for {text!r}")
    return differ


def _own_tokenizer(folder: str, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies in an adapter's folder, read as the base's kind; None where none can be read."""
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with reading(f"tokenizer in adapter {folder!r}", AdapterMismatch):
            return type(like).from_pretrained(folder)  # type: ignore[no-any-return]
    except AdapterMismatch:
        return None


def _own_template(folder: Path, own: PreTrainedTokenizerBase | None) -> str | None:
    """The chat template of an adapter's folder, whether or not its tokenizer can be read."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if own is not None:
        return own.chat_template  # type: ignore[no-any-return]
    with suppress(OSError, ValueError):
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        return found if isinstance(found, str) else None
    return None


def _tokenizer_of(base: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source, commit = located(base)
    return AutoTokenizer.from_pretrained(source, revision=commit)  # type: ignore[no-any-return]


def _added(own: PreTrainedTokenizerBase, known: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that the one has and the other has not, in their order."""
    theirs = known.get_vocab()
    return [token for token, _ in sorted(own.get_vocab().items(), key=lambda item: item[1]) if token not in theirs]


def _listed(tokens: list[str]) -> str:
    return ", ".join(map(repr, tokens[:_SHOWN])) + (" …" if len(tokens) > _SHOWN else "")


def _shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(Path(resolve_adapter(adapter)) / "adapter_model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
