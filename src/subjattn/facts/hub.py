"""Files of a published data set: fetched from the hub, or found in a folder of the user's."""

from __future__ import annotations

from pathlib import Path

from subjattn.errors import BadInput


def fetch(repository: str, file: str) -> Path:
    """One file of a data set on the hub, from the local cache where it was fetched before."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInput(f"data set {repository!r} cannot be fetched: {reason}; give a local copy as NAME:PATH") from None


def only_file(path: Path, pattern: str) -> Path:
    """The path itself if it is a file, else the one file in the folder that the pattern fits."""
    if path.is_file():
        return path
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        raise BadInput(f"{path} holds {len(found)} files {pattern}, not one: give the file's path")
    return found[0]
