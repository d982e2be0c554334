"""What a model's or adapter's name stands for: packaged, an invented world's, a folder, or a hub id at a commit."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from subjattn.digest import content_digest
from subjattn.errors import BadInput
from subjattn.facts.hub import commit_of, parted
from subjattn.models.packaged import PACKAGES, packaged_model
from subjattn.worlds import folder_of, is_world, world_of


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def resolve_model(name: str) -> str:
    """A folder or hub id (with `@revision` where given); BadInput where the name can be neither."""
    if name in PACKAGES:
        return str(packaged_model(name))
    if is_world(name):
        return str(folder_of(world_of(name)))
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise BadInput(f"folder {name!r} holds an adapter: give its base model, and the folder as the adapter")
        if (path / "config.json").is_file():
            _refuse_other_weights(path)
            return str(path)
        inside = _inside(path, "config.json")
        raise BadInput(f"folder {name!r} holds no config.json: {inside or 'give a folder saved by save_pretrained()'}")
    repository, _ = parted(name)
    if path.is_absolute() or name.startswith(("./", "../", "~")) or repository.count("/") > 1:
        raise BadInput(f"no such folder: {name!r}")
    if "/" not in repository:
        raise BadInput(
            f"unknown model {name!r}{_nearest(name)}: use {', '.join(PACKAGES)}, world:NAME, a hub id such as "
            "'org/name', or an existing folder"
        )
    return name


_MAKERS = {
    "gpt2": "openai-community",
    "distilgpt2": "distilbert",
    "pythia": "EleutherAI",
    "gpt-neo": "EleutherAI",
    "llama": "meta-llama",
    "gemma": "google",
    "mistral": "mistralai",
    "qwen": "Qwen",
    "phi": "microsoft",
    "olmo": "allenai",
    "smollm": "HuggingFaceTB",
    "opt-": "facebook",
}
"""Whose models begin with these letters on the hub."""


def _nearest(name: str) -> str:
    """What a short name may mean."""
    if close := difflib.get_close_matches(name.lower(), PACKAGES, n=1, cutoff=0.7):
        return f", did you mean {close[0]!r}?"
    maker = next((maker for start, maker in _MAKERS.items() if name.lower().startswith(start)), None)
    return f", on the hub it may be '{maker}/{name}'" if maker else ""


def _inside(folder: Path, file: str) -> str:
    """Which folders in this one hold a file: what to give in its place; nothing where none does."""
    found = sorted(str(path.parent) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{file}"))
    more = f" (or {', '.join(map(repr, found[1:4]))}{' …' if len(found) > 4 else ''})" if found[1:] else ""
    return f"give the folder in it that does, {found[0]!r}{more}" if found else ""


def _refuse_other_weights(folder: Path) -> None:
    """Refuse a model's folder whose weights are in another format than safetensors alone, saying how to convert it."""
    if any(folder.glob("*.safetensors")):
        return
    kinds = {"*.bin": "pickled PyTorch weights", "*.h5": "TensorFlow weights", "*.msgpack": "Flax weights"}
    for pattern, what in (kinds | {"*.pt": kinds["*.bin"], "*.pth": kinds["*.bin"], "*.gguf": "GGUF weights"}).items():
        if files := sorted(path.name for path in folder.glob(pattern) if path.name != "training_args.bin"):
            more = f", gguf_file={files[0]!r}" if pattern == "*.gguf" else ""
            raise BadInput(
                f"folder {str(folder)!r} holds {what} ({files[0]}), and only safetensors are loaded: if you trust the "
                f"file, convert it by AutoModelForCausalLM.from_pretrained(folder{more}).save_pretrained(folder)"
            )


def located(name: str) -> tuple[str, str | None]:
    """What transformers loads a model from: a folder, or a repository of the hub and its commit."""
    source = resolve_model(name)
    if Path(source).is_dir():
        return source, None
    repository, revision = parted(source)
    return repository, commit_of(repository, revision)


def resolve_adapter(adapter: str) -> str:
    """A local folder with the adapter's safetensors, fetched from the hub if need be."""
    folder = Path(adapter)
    if not folder.is_dir():
        repository, revision = parted(adapter)
        if folder.is_absolute() or adapter.startswith(".") or repository.count("/") != 1:
            if Path(adapter).is_file():
                raise BadInput(f"adapter {adapter!r} is a file: give the folder that holds it")
            raise BadInput(f"no such adapter folder: {adapter!r}")
        from huggingface_hub import snapshot_download

        try:
            wanted = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", *TOKENIZER_FILES]
            commit = commit_of(repository, revision)
            folder = Path(snapshot_download(repository, revision=commit, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:300]
            raise BadInput(f"adapter {adapter!r} is no folder and cannot be fetched: {reason}") from None
    if not (folder / "adapter_config.json").is_file():
        inside = _inside(folder, "adapter_config.json") or "give a folder saved by peft's save_pretrained()"
        raise BadInput(f"folder {adapter!r} holds no adapter_config.json: {inside}")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        how = "PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        raise BadInput(
            f"adapter {adapter!r} has no adapter_model.safetensors: pickled weights are not loaded, save it again"
            + (f", if you trust adapter_model.bin, by {how}" if pickled else "")
        )
    return str(folder)


def identity(name: str) -> str:
    """What a model or adapter is, for stage keys and records, the same on every machine.

    The packaged weights' digest, a world's name with a digest of its weights, a digest of what a local folder holds,
    or `org/name@commit`; any other name is given back as it is.

    Raises:
        BadInput: a hub id whose commit can be found out neither from the hub nor in the local cache.
    """
    if name in PACKAGES:
        return packaged_model(name).name
    if is_world(name):
        return f"{name} ({content_digest(resolve_model(name))})"
    if Path(name).exists():
        return content_digest(name)
    repository, revision = parted(name)
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        return name
    return f"{repository}@{commit_of(repository, revision)}"


def fingerprint(path: str | os.PathLike[str]) -> str:
    """A digest of what a local folder or file holds, whatever its times and place; else the name."""
    return content_digest(path) if Path(path).exists() else str(path)
