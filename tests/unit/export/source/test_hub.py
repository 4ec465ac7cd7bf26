"""Hub ids: pinned to a commit, and refused with the reason. The hub itself is stood in for: tests have no network."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import fewstep
from fewstep.bundle.bundle import write_manifest
from fewstep.bundle.source import SourceInfo
from fewstep.errors import SourceError
from fewstep.export import load
from fewstep.export.source.load import missing
from tests.support.bundles import built
from tests.support.command import Run, refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Stands in for the download of a snapshot, as huggingface_hub lays it out."""
    snapshot = tmp_path / "models--someone--tiny-lcm" / "snapshots" / COMMIT
    shutil.copytree(built("lcm").source, snapshot)
    download = mock.Mock(return_value=str(snapshot))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return download


def test_revision_is_pinned_to_its_commit(hub: mock.Mock) -> None:
    generator = load("someone/tiny-lcm@main")
    assert generator.name == "tiny-lcm"
    assert (generator.source.uri, generator.source.kind) == ("someone/tiny-lcm@main", "hub")
    assert generator.source.revision == COMMIT
    assert generator.source.spec().uri == f"someone/tiny-lcm@{COMMIT}"
    assert generator.source.sha256 == load(str(built("lcm").source)).source.sha256
    assert hub.call_args.args == ("someone/tiny-lcm",)
    assert hub.call_args.kwargs["revision"] == "main"
    assert not any(pattern.endswith((".bin", ".ckpt")) for pattern in hub.call_args.kwargs["allow_patterns"])


def test_revision_survives_the_manifest(hub: mock.Mock, tmp_path: Path) -> None:
    folder = shutil.copytree(built("lcm").bundle.path, tmp_path / "bundle")
    source = load("someone/tiny-lcm").source
    write_manifest(folder, replace(fewstep.Bundle.open(folder).manifest, source=source))
    assert fewstep.Bundle.open(folder).manifest.source == source


def test_verification_asks_for_the_commit_and_no_network(hub: mock.Mock) -> None:
    source = SourceInfo("someone/tiny-lcm", "hub", "0" * 64, revision=COMMIT)
    assert missing(source) is None
    assert hub.call_args.kwargs["revision"] == COMMIT
    assert hub.call_args.kwargs["local_files_only"] is True
    hub.side_effect = errors.LocalEntryNotFoundError("not cached")
    assert missing(source) == f"the source someone/tiny-lcm@{COMMIT}"


def http_error(kind: type[Exception]) -> Exception:
    """Returns an error of the hub without the response that its constructor wants."""
    return kind.__new__(kind, "server text")


@pytest.mark.parametrize(
    ("error", "offline", "message", "hint"),
    [
        (
            http_error(errors.RepositoryNotFoundError),
            False,
            "the hub knows no someone/tiny-lcm, or it is private",
            "check the name; for a private repository, `hf auth login`",
        ),
        (
            http_error(errors.GatedRepoError),
            False,
            "the hub does not give someone/tiny-lcm to this account: it is gated",
            "accept its licence on https://huggingface.co/someone/tiny-lcm, then `hf auth login`",
        ),
        (
            http_error(errors.RevisionNotFoundError),
            False,
            "the hub has no revision 'v9' of someone/tiny-lcm",
            "give a branch, a tag or a whole commit hash",
        ),
        (
            errors.LocalEntryNotFoundError("x"),
            True,
            "someone/tiny-lcm@v9 is not in the local cache of the hub, and HF_HUB_OFFLINE forbids to download it",
            "unset HF_HUB_OFFLINE, or give a local folder",
        ),
        (
            errors.LocalEntryNotFoundError("x"),
            False,
            "someone/tiny-lcm@v9 is not in the local cache of the hub, and the hub cannot be reached",
            "check the network, or give a local folder",
        ),
        (
            OSError("disk full"),
            False,
            "cannot download someone/tiny-lcm@v9 from the hub: OSError: disk full",
            "check the name and the network, or give a local folder",
        ),
    ],
    ids=["unknown", "gated", "revision", "offline", "no network", "disk"],
)
def test_refused_with_the_reason(
    run: Run,
    hub: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    offline: bool,
    message: str,
    hint: str,
) -> None:
    hub.side_effect = error
    monkeypatch.setattr(constants, "is_offline_mode", lambda: offline)
    text = refused(run, "someone/tiny-lcm@v9", tmp_path)
    assert message in text
    assert f"hint: {hint}" in text


def test_a_snapshot_without_a_commit(hub: mock.Mock, tmp_path: Path) -> None:
    hub.return_value = str(tmp_path)
    with pytest.raises(SourceError, match="is not the snapshot of a commit, so someone/tiny-lcm cannot be pinned"):
        load("someone/tiny-lcm")


def test_names_of_files_are_no_hub_ids(hub: mock.Mock) -> None:
    with pytest.raises(SourceError, match=r"models/gone\.safetensors is not a file"):
        load("models/gone.safetensors")
    hub.assert_not_called()
