"""Downloads generators from the hub, pinned to a commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import SourceError

_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Snapshot:
    """A repository of the hub at one commit, as files on this machine."""

    repository: str
    revision: str
    folder: Path


def is_hub_id(source: str) -> bool:
    """Whether a source reads as ``owner/name`` or ``owner/name@revision``."""
    return _HUB_ID.match(source) is not None


def download(hub_id: str, suffixes: Sequence[str], *, local_only: bool = False) -> Snapshot:
    """Returns the files of a hub id that end in ``suffixes``, at the commit that its revision stands for now.

    Args:
        hub_id: ``owner/name`` or ``owner/name@revision``: a branch, a tag or a commit.
        suffixes: which files.
        local_only: take what was downloaded before, and ask nobody.

    Raises:
        SourceError: the hub does not know it, does not give it to us, or cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    match = _HUB_ID.match(hub_id)
    assert match is not None
    repository, revision = match["repo"], match["revision"]
    patterns = [f"*{suffix}" for suffix in suffixes]
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_only)
    except errors.GatedRepoError as error:  # is a RepositoryNotFoundError, so it comes first
        raise SourceError(
            f"the hub does not give {repository} to this account: it is gated",
            hint=f"accept its licence on https://huggingface.co/{repository}, then `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"the hub has no revision {revision!r} of {repository}", hint="give a branch, a tag or a whole commit hash"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub knows no {repository}, or it is private",
            hint="check the name; for a private repository, `hf auth login`",
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _unreachable(hub_id) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise SourceError(
            f"cannot download {hub_id} from the hub: {type(error).__name__}: {error}",
            hint="check the name and the network, or give a local folder",
        ) from error
    folder = Path(found)
    if not _COMMIT.match(folder.name):
        raise SourceError(
            f"{folder} is not the snapshot of a commit, so {hub_id} cannot be pinned", hint="give the folder instead"
        )
    return Snapshot(repository, folder.name, folder)


def _unreachable(hub_id: str) -> SourceError:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return SourceError(
            f"{hub_id} is not in the local cache of the hub, and HF_HUB_OFFLINE forbids to download it",
            hint="unset HF_HUB_OFFLINE, or give a local folder",
        )
    return SourceError(
        f"{hub_id} is not in the local cache of the hub, and the hub cannot be reached",
        hint="check the network, or give a local folder",
    )
