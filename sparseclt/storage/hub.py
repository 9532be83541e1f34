"""Directories on the Hugging Face hub: from a name to a directory on this disk."""

import re
from pathlib import Path
from typing import TypedDict

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*")


class Download(TypedDict, total=False):
    """How to fetch a directory of the hub; names, meanings and defaults are those of huggingface_hub."""

    revision: str | None
    """A branch, a tag or a commit."""
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    """Take what is in the cache and do not ask the hub."""


def local_directory(path: str | Path, download: Download) -> Path:
    """`path` itself, if it is a `Path` or there is something of that name on this disk. A text such as "owner/name", or
    "owner/name/folder" for a folder of a repository, is fetched from the hub into its cache: the directory there.

    Raises ValueError for options of a download where nothing is downloaded, and for what the hub does not give.
    """
    # A directory that is being replaced may be absent for a moment: see `atomic_directory`.
    here = any(Path(name).exists() for name in (path, f"{path}.old"))
    if isinstance(path, Path) or here or not _NAME.fullmatch(path):
        if given := [name for name, value in download.items() if value]:
            raise ValueError(f"{given[0]}: expected only with a name on the hub, such as owner/name, got path {path}")
        return Path(path)
    from huggingface_hub import snapshot_download

    owner, name, *folder = path.split("/")
    inside = "/".join(folder)
    try:
        fetched = snapshot_download(f"{owner}/{name}", allow_patterns=f"{inside}/*" if inside else None, **download)
    except (OSError, ValueError) as error:  # no such repository, no network, no permission, a name it does not allow
        reason = " ".join(str(error).split())
        raise ValueError(
            f"path: expected a directory, or a repository on the hub that can be read, got {path} ({reason})"
        ) from error
    return Path(fetched, inside)
