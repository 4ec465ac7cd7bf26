"""Debian packages fetched, checked and unpacked into a folder: no root, no dpkg, any Linux.

The chain of trust is Debian's own: the release file (its signature is checked where gpgv and Debian's keys are
installed, else its transport is) has the hash of the index, which has the hash of each package.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fewstep.errors import RuntimeMissingError
from fewstep.hashing import file_sha256

MIRROR = "https://deb.debian.org/debian"
SUITE = "bookworm"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SECONDS = 60
_CHUNK = 1 << 20
_GLOBAL, _MEMBER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Package:
    """A package of the index: where it is below the mirror, and what its file must be."""

    name: str
    version: str
    filename: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Mirror:
    """A copy of Debian's archive."""

    url: str = MIRROR
    suite: str = SUITE

    def release(self, keys: Path = KEYS) -> tuple[str, bool]:
        """Returns the release file, and whether its signature was checked.

        Raises:
            RuntimeMissingError: no mirror there, or the signature is wrong.
        """
        body = self._get(f"dists/{self.suite}/InRelease")
        signed = shutil.which("gpgv") is not None and keys.is_file()
        if signed:
            done = subprocess.run(["gpgv", "--keyring", keys], input=body, capture_output=True, check=False)
            if done.returncode != 0:
                raise RuntimeMissingError(
                    f"{self.url}: the release file of {self.suite} is not signed by a key of {keys}",
                    hint="choose another mirror with FEWSTEP_DEBIAN_MIRROR",
                )
        return body.decode(), signed

    def index(self, release: str, architecture: str) -> dict[str, Package]:
        """Returns the packages of an architecture by name.

        Raises:
            RuntimeMissingError: the index cannot be had, or is not the release's.
        """
        name = f"main/binary-{architecture}/Packages.xz"
        match = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(name)}$", release, re.MULTILINE)
        if match is None:
            raise RuntimeMissingError(
                f"{self.url}: the release {self.suite} has no {name}",
                hint="choose another mirror with FEWSTEP_DEBIAN_MIRROR",
            )
        body = self._get(f"dists/{self.suite}/{name}")
        _check(hashlib.sha256(body).hexdigest(), match[1], f"{self.url}/dists/{self.suite}/{name}")
        found: dict[str, Package] = {}
        for paragraph in lzma.decompress(body).decode().split("\n\n"):
            fields = dict(re.findall(r"^(Package|Version|Filename|SHA256|Size): (.*)$", paragraph, re.MULTILINE))
            if fields:
                found[fields["Package"]] = Package(
                    fields["Package"], fields["Version"], fields["Filename"], fields["SHA256"], int(fields["Size"])
                )
        return found

    def fetch(self, package: Package, folder: Path) -> Path:
        """Returns a package's file in a folder; what is there already is not fetched again, and goes on where it ended.

        Raises:
            RuntimeMissingError: it cannot be had, or is not what the index says.
        """
        target = folder / PurePosixPath(package.filename).name
        if target.is_file() and file_sha256(target) == package.sha256:
            return target
        partial = target.with_name(f"{target.name}.part")
        folder.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.is_file() else 0
        with self._open(package.filename, have) as stream, partial.open("ab" if stream.status == 206 else "wb") as out:
            while chunk := _read(stream, self.url):
                out.write(chunk)
        found = file_sha256(partial)
        if found != package.sha256:
            partial.unlink()  # the next try starts anew
        _check(found, package.sha256, f"{self.url}/{package.filename}")
        return partial.replace(target)

    def _get(self, path: str) -> bytes:
        with self._open(path, 0) as stream:
            return b"".join(iter(lambda: _read(stream, self.url), b""))

    def _open(self, path: str, start: int) -> _Response:
        request = urllib.request.Request(f"{self.url}/{path}")
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            return _Response(urllib.request.urlopen(request, timeout=_SECONDS))
        except urllib.error.HTTPError as error:
            if error.code == 416:  # all of it was there, and it was wrong, or it would have been taken
                return self._open(path, 0)
            raise _unreachable(f"{self.url}/{path}", f"HTTP {error.code}") from error
        except (urllib.error.URLError, OSError) as error:
            raise _unreachable(f"{self.url}/{path}", str(getattr(error, "reason", error))) from error


class _Response:
    """What is read of an answer; its status is None for schemes that have none."""

    def __init__(self, answer: object) -> None:
        self._answer = answer
        self.status = getattr(answer, "status", None)

    def read(self, count: int) -> bytes:
        data: bytes = self._answer.read(count)  # type: ignore[attr-defined]  # urllib's answers share no type
        return data

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()  # type: ignore[attr-defined]  # as above


def _read(stream: _Response, url: str) -> bytes:
    try:
        return stream.read(_CHUNK)
    except OSError as error:
        raise _unreachable(url, str(error)) from error


def _unreachable(url: str, why: str) -> RuntimeMissingError:
    return RuntimeMissingError(
        f"cannot fetch {url}: {why}",
        hint="connect to the network (what is fetched already is kept), or name a Debian mirror with "
        "FEWSTEP_DEBIAN_MIRROR",
    )


def _check(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise RuntimeMissingError(
            f"{what} has sha256 {found[:16]}..., expected {expected[:16]}...",
            hint="try again: the mirror may have been changing; else choose another with FEWSTEP_DEBIAN_MIRROR",
        )


def unpack(deb: Path, folder: Path, only: Sequence[str] | None = None) -> None:
    """Unpacks a package's files below a folder; ``only`` names those that are wanted.

    Raises:
        RuntimeMissingError: the file is no Debian package, has a path that leaves the folder, or lacks a wanted file.
    """
    name, body = next((m for m in _members(deb) if m[0].startswith("data.tar")), ("", b""))
    if not name:
        raise RuntimeMissingError(f"{deb} is not a Debian package: it has no data", hint="delete it and try again")
    wanted = None if only is None else {f"./{path}" for path in only}
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        members = [m for m in archive if wanted is None or m.name in wanted]
        if wanted is not None and len(members) < len(wanted):
            raise RuntimeMissingError(f"{deb.name} lacks {', '.join(only or ())}", hint="report it")
        for member in members:
            if ".." in PurePosixPath(member.name).parts or member.name.startswith("/") or member.isdev():
                raise RuntimeMissingError(f"{deb}: {member.name} leaves the folder", hint="do not use this mirror")
        # Python before 3.11.4 has no filters; what they refuse was refused above.
        archive.extraction_filter = getattr(tarfile, "tar_filter", lambda member, _: member)
        archive.extractall(folder, members)


def _members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the members of an ar archive: a line of 60 bytes each, padded to even length."""
    with deb.open("rb") as stream:
        if stream.read(len(_GLOBAL)) != _GLOBAL:
            return
        while len(header := stream.read(_MEMBER)) == _MEMBER:
            size = int(header[48:58])
            body = stream.read(size)
            stream.read(size % 2)
            yield header[:16].decode().strip().rstrip("/"), body
