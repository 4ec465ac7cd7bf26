"""A bundle on disk: written whole or not at all, hashes checked when it is opened, no path leaves it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fewstep.bundle.consistency import is_inside
from fewstep.bundle.golden_headers import check_golden
from fewstep.bundle.manifest import FileEntry, Manifest
from fewstep.bundle.seal import MANIFEST as MANIFEST
from fewstep.bundle.seal import UNLISTED, check_seal, write_seal
from fewstep.disk import check_place, replacing
from fewstep.errors import BundleError
from fewstep.faults import naming_packages
from fewstep.hashing import file_sha256
from fewstep.strict import JSON_BYTES, parse_json, read_file

if TYPE_CHECKING:
    from fewstep.bundle.samples import Sample

_ELSEWHERE = "free some space there, or choose another -o folder"
_REBUILD = "build the bundle again; manifests are not edited"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Returns the bundle at a folder, after checking the hash of every file.

        Raises:
            BundleError: no bundle there, a manifest that is not what its hash says or that contradicts itself, or a
            file missing, altered, no plain file or outside the folder.
        """
        folder = Path(path)
        manifest_path = folder / MANIFEST
        try:
            content = read_file(manifest_path, JSON_BYTES, error=BundleError, hint=_REBUILD)
        except OSError as error:
            raise BundleError(
                f"{folder} is not a bundle: cannot read {MANIFEST} ({error.strerror})",
                hint="give the folder that `fewstep build -o` wrote",
            ) from error
        check_seal(folder, content)
        values = parse_json(content, str(manifest_path), error=BundleError, hint=_REBUILD)
        manifest = Manifest.from_json(values, where=str(manifest_path))
        _verify_files(folder, manifest)
        check_golden(folder, manifest)
        return cls(folder, manifest)

    def unlisted(self) -> tuple[str, ...]:
        """Returns what is in the folder and not in the manifest, links and special files included.

        Opening a bundle ignores it, because file managers leave files of their own (``.DS_Store``) wherever one looks:
        nothing reads it. Verifying refuses it.
        """
        found = []
        for folder, _, names in os.walk(self.path):
            found += [(Path(folder) / name).relative_to(self.path).as_posix() for name in names]
        for folder, names, _ in os.walk(self.path):
            links = (Path(folder) / name for name in names)
            found += [path.relative_to(self.path).as_posix() for path in links if path.is_symlink()]
        return tuple(sorted(path for path in found if path not in self.manifest.files and path not in UNLISTED))

    def refuse_unlisted(self) -> None:
        """Raises BundleError if there is something in the folder that the manifest does not list."""
        found = self.unlisted()
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise BundleError(
                f"{self.path} has {found[0]!r}{more}, which its manifest does not list",
                hint="nothing reads it; remove it, or use a copy of the bundle from whoever made it",
            )

    def file(self, relative: str) -> Path:
        """Returns the path of a file that the manifest lists."""
        if relative not in self.manifest.files:
            raise BundleError(f"{self.path}: {relative} is not listed in the manifest", hint="build the bundle again")
        return resolve_inside(self.path, relative)

    def shaped(self, shape: str) -> Bundle:
        """Returns the bundle at one of its shapes, such as ``512x768``.

        `fewstep.bundle.manifest.Manifest.shaped` refuses.
        """
        return replace(self, manifest=self.manifest.shaped(shape))

    def batched(self, batch: int) -> Bundle:
        """Returns the bundle for a batch of images; `fewstep.bundle.manifest.Manifest.batched` refuses."""
        return replace(self, manifest=self.manifest.batched(batch))

    @naming_packages()
    def generate(
        self,
        prompt: str = "",
        seed: int = 0,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        inputs: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> Sample:
        """Returns the sample of a prompt, and of the inputs beside it.

        See `fewstep.runtimes.sampling.sampler.generate`.
        """
        from fewstep.runtimes.sampling.sampler import (
            generate,  # a convenience that looks up the layers: the one place it does
        )

        return generate(
            self, prompt, seed, steps=steps, guidance=guidance, negative_prompt=negative_prompt, inputs=inputs
        )

    @naming_packages()
    def generate_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        inputs: Sequence[Mapping[str, npt.NDArray[Any]]] | None = None,
    ) -> list[Sample]:
        """Returns the samples of several prompts, drawn at once.

        See `fewstep.runtimes.sampling.sampler.generate_batch`.
        """
        from fewstep.runtimes.sampling.sampler import generate_batch  # as above

        return generate_batch(
            self, prompts, seeds, steps=steps, guidance=guidance, negative_prompt=negative_prompt, inputs=inputs
        )


def resolve_inside(folder: Path, relative: str) -> Path:
    """Returns ``folder / relative``, refusing absolute paths, ``..`` and links that leave the folder."""
    path = folder / relative
    if not is_inside(relative) or not _real(path).is_relative_to(_real(folder)):
        raise BundleError(
            f"{folder}: path {relative[:200]!r} leaves the bundle, expected a relative path inside it",
            hint="do not use this bundle: it was not written by fewstep",
        )
    return path


def _real(path: Path) -> Path:
    """Returns where a path leads; `Path.resolve` raises what is no OSError for links that go round in a circle."""
    return Path(os.path.realpath(path))


def _verify_files(folder: Path, manifest: Manifest) -> None:
    real = _real(folder)
    for relative, entry in manifest.files.items():
        path = resolve_inside(folder, relative)
        if path.is_symlink() or _real(path) != real / relative:
            raise BundleError(
                f"{folder}: {relative} is a link, expected the file itself",
                hint="copy the bundle with its files instead of links (cp -rL)",
            )
        if not path.is_file():
            what = "is neither a file nor a link to one" if path.exists() else "is missing"
            raise BundleError(f"{folder}: {relative} {what}", hint="copy the whole folder, or build it again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{folder}: {relative} has {size} bytes, expected {entry.bytes}",
                hint="the file is truncated or altered: copy it again or build the bundle again",
            )
        digest = file_sha256(path)
        if digest != entry.sha256:
            raise BundleError(
                f"{folder}: {relative} has sha256 {digest[:16]}..., expected {entry.sha256[:16]}...",
                hint="the file was altered: copy it again or build the bundle again",
            )
    for tokenizer in manifest.tokenizers.values():
        resolve_inside(folder, tokenizer.folder)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``target`` that takes its place when the block ends without an error.

    A killed or failed build leaves ``target`` as it was. An existing bundle is replaced; any other existing folder
    with something in it is refused.
    """
    check_writable(target)
    with replacing(target, what="the bundle", hint=_ELSEWHERE) as partial:
        yield partial


def check_writable(target: Path) -> None:
    """Raises BundleError or StorageError unless a bundle can be written at ``target``; creates its parent folders."""
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise BundleError(
            f"{target} exists and is not a bundle, expected a new folder or a bundle to replace",
            hint="choose another -o folder",
        )
    check_place(target.parent, hint=_ELSEWHERE)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Writes ``manifest.json`` with the hash of every file now in the folder, then its own; returns the manifest."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(file_sha256(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in UNLISTED
    }
    complete = replace(manifest, files=files)
    values = complete.to_json()
    Manifest.from_json(values, where="the manifest to be written")
    (folder / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_seal(folder)
    return complete
