"""What comes from the hub, at one commit: which one a name means, and files of data sets.

A repository's name means another thing tomorrow. So it is resolved to a commit once a process, by the hub where it
can be reached, else by the local cache; what is loaded is that commit, and what is recorded is `org/name@commit`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal

from subjattn.errors import BadInput


Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def parted(name: str) -> tuple[str, str | None]:
    """Repository and revision of `org/name@revision`; None for the revision where none is given."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


@cache
def commit_of(repository: str, revision: str | None = None, kind: Kind = "model") -> str:
    """The commit that a revision of a repository on the hub is now, the same for the rest of the process.

    Raises:
        BadInput: the hub cannot be asked, or knows no such revision, and the local cache has none.
    """
    from huggingface_hub import HfApi, snapshot_download

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        if found := HfApi().repo_info(repository, revision=revision, repo_type=kind).sha:
            return str(found)
        reason = "the hub names no commit"
    except Exception as error:  # of whichever library the hub's own speaks through
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    try:
        cached = snapshot_download(repository, revision=revision, repo_type=kind, local_files_only=True)
    except (OSError, ValueError):
        what = f"{'data set' if kind == 'dataset' else kind} {repository!r}"
        at = f" at {revision!r}" if revision else ""
        advice = "give a local copy as NAME:PATH" if kind == "dataset" else "give a local folder, or connect once"
        raise BadInput(f"{what}{at} cannot be fetched and is not in the local cache: {reason}; {advice}") from None
    return Path(cached).name


def fetch(repository: str, file: str) -> Path:
    """One file of a data set on the hub at its commit, from the local cache where it was fetched before.

    Args:
        repository: `org/name`, or `org/name@revision`.
        file: its path in the repository.
    """
    from huggingface_hub import hf_hub_download

    name, revision = parted(repository)
    commit = commit_of(name, revision, "dataset")
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInput(f"data set {name!r} cannot be fetched: {reason}; give a local copy as NAME:PATH") from None


def only_file(path: Path, pattern: str) -> Path:
    """The path itself if it is a file, else the one file in the folder that the pattern fits."""
    if path.is_file():
        return path
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        raise BadInput(f"{path} holds {len(found)} files {pattern}, not one: give the file's path")
    return found[0]
