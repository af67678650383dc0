"""Checkpoints of the Hugging Face Hub, through its own client: ``hf:owner/name@revision``.

They are kept where that client keeps its files, in a folder with the name of the commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from .adapters.reading import WEIGHTS
from .calibration.records import require
from .deltas.reading import as_delta, behind
from .findings import Refused
from .folders import ADAPTER, INDEX, MANIFEST, OTHERS, SINGLE, TOKENIZER, read_json

PREFIX = "hf:"
SMALL = (*OTHERS, *TOKENIZER, INDEX, ADAPTER, MANIFEST)  # never code, never a pickle


@dataclass(frozen=True)
class Reference:
    """A repository of models.

    Attributes:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return PREFIX + self.repo + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    @property
    def page(self) -> str:
        """Address of the repository."""
        return f"{endpoint()}/{self.repo}"


def endpoint() -> str:
    """Address of the Hub: ``HF_ENDPOINT``, or the client's own default."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def reference_of(place: Path | str) -> Reference | None:
    """What a word of the command line refers to at the Hub; None for a folder.

    Raises: Refused for a word that begins like a reference and is none.
    """
    word = place.as_posix() if isinstance(place, Path) else place
    if not word.startswith(PREFIX):
        return None
    repo, at, revision = word.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo) or (at and not revision):
        cure = "write it as the page of the model has it; a folder of such a name is ./hf:…"
        raise Refused(word, "hf:owner/name or hf:owner/name@revision", "another form", cure)
    return Reference(repo, revision or None)


def origin_of(folder: Path) -> dict[str, str]:
    """What a manifest says of where a folder came from: its name, or repository and commit where it
    is one of the client's."""
    folder = folder.resolve()
    kept = folder.parent.parent.name
    if folder.parent.name == "snapshots" and kept.startswith("models--"):
        repo = kept.removeprefix("models--").replace("--", "/", 1)
        return {"folder": repo, "revision": folder.name}
    return {"folder": folder.name}


def local(place: Path, *, progress: bool = False, more: Sequence[str] = ()) -> Path:
    """A folder as it is; of a reference, the folder with its files, which are downloaded unless
    they are there already: configuration, tokenizer and safetensors.

    Args:
        more: patterns of other files that are wanted.
    Raises: Refused saying why the Hub does not give them.
    """
    differences = behind(place)
    if differences is not None:
        return as_delta(local(differences, progress=progress))
    reference = reference_of(place)
    if reference is None:
        return place
    folder = snapshot(reference, (*SMALL, *more), progress)
    pinned = Reference(reference.repo, folder.name)
    names = files_of_weights(folder)
    snapshot(pinned, [escape(name) for name in names], progress)
    if names and not any((folder / name).is_file() for name in names):
        refuse_without_weights(pinned)
    return folder


def refuse_without_weights(reference: Reference) -> None:
    """Refused, for a repository that has no weights in safetensors."""
    expected = f"{SINGLE}, {INDEX} or an adapter's {WEIGHTS}"
    cure = f"see {reference.page}; pickled weights are never fetched"
    raise Refused(reference, expected, "none of them", cure)


def files_of_weights(folder: Path) -> list[str]:
    """Files that the weights may be in, by what the small files say; names that are paths are left
    out, which are refused when the folder is read."""
    if not (folder / INDEX).is_file():
        return [SINGLE, WEIGHTS]
    places = read_json(folder / INDEX).get("weight_map")
    names = {str(file) for file in places.values()} if isinstance(places, dict) else set()
    return sorted(name for name in names if Path(name).suffix and Path(name).name == name)


def snapshot(reference: Reference, patterns, progress: bool = False) -> Path:
    """The client's folder of a revision, with the files that fit these patterns."""
    require_client()
    from huggingface_hub import snapshot_download

    with troubles(reference), _bars(progress):
        folder = snapshot_download(
            reference.repo,
            revision=reference.revision,
            allow_patterns=list(patterns),
            endpoint=endpoint(),
        )
    return Path(folder)


def require_client(otherwise: str = "download the files and pass their folder") -> None:
    """Refused where the Hub's client is not installed; ``otherwise`` says what to do without."""
    require("huggingface_hub", "which asks the Hub", otherwise)


@contextmanager
def troubles(reference: Reference) -> Iterator[None]:
    """Refused in place of what the client raises where the Hub gives nothing."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        found, cure = trouble(error, reference.page, "correct owner, name and revision")
        raise Refused(reference, "files of the Hub", found, cure) from error


def trouble(error: Exception, page: str, amend: str) -> tuple[str, str]:
    """Why the Hub does not serve, and what to do.

    Args:
        page: address of the repository.
        amend: what to do where the request is wrong.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "gated", f"accept its terms at {page} and set HF_TOKEN"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        cure = "check the network, HF_HUB_OFFLINE and HF_ENDPOINT"
        return f"not in the cache, and {endpoint()} was not reached", cure
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository at {page}, or a private one", f"{amend}, or set HF_TOKEN"
    if isinstance(error, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return f"no such file or revision at {page}", amend
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    is_name = isinstance(error, errors.HFValidationError)
    return f"{type(error).__name__}: {first_line}", amend if is_name else "try again"


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Whether the client shows the progress of downloads."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_away(place: Path) -> bool:
    """Whether a place is at the Hub."""
    return reference_of(behind(place) or place) is not None
