"""Debian packages are fetched, checked and unpacked, from a mirror that is made here."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fewstep.errors import RuntimeMissingError
from fewstep.runtimes.executors.deb_packages import Mirror, unpack

NO_KEYS = Path("/nothing")


def deb(files: Mapping[str, bytes]) -> bytes:
    """Returns a package: an ar archive with a tar archive in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    members = {"debian-binary": b"2.0\n", "data.tar.xz": data.getvalue()}
    parts = [b"!<arch>\n"]
    for name, body in members.items():
        parts += [
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode(),
            body,
            b"\n" * (len(body) % 2),
        ]
    return b"".join(parts)


def mirror(root: Path, body: bytes, *, listed: bytes | None = None) -> Mirror:
    """Returns a mirror in a folder with one package, whose index may be of another file."""
    pool, index = root / "pool" / "hello.deb", root / "dists" / "test" / "main" / "binary-arm64" / "Packages.xz"
    for path in (pool, index):
        path.parent.mkdir(parents=True)
    pool.write_bytes(body)
    digest = hashlib.sha256(listed or body).hexdigest()
    text = f"Package: hello\nVersion: 1.2\nFilename: pool/hello.deb\nSize: {len(body)}\nSHA256: {digest}\n\n"
    index.write_bytes(lzma.compress(text.encode()))
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    release = f"Codename: test\nSHA256:\n {digest} 1 main/binary-arm64/Packages.xz\nEnd:\n"
    (root / "dists" / "test" / "InRelease").write_text(release)
    return Mirror(root.as_uri(), "test")


def test_fetch_and_unpack(tmp_path: Path) -> None:
    source = mirror(tmp_path / "mirror", deb({"./usr/bin/hello": b"hi", "./usr/share/doc": b"long"}))
    release, signed = source.release(NO_KEYS)
    assert not signed, "without keys a signature is not taken for checked"
    package = source.index(release, "arm64")["hello"]
    assert (package.version, package.filename) == ("1.2", "pool/hello.deb")
    path = source.fetch(package, tmp_path / "downloads")
    before = path.stat().st_mtime_ns
    assert source.fetch(package, tmp_path / "downloads") == path
    assert path.stat().st_mtime_ns == before, "what is there is not fetched again"
    unpack(path, tmp_path / "root", ["usr/bin/hello"])
    assert (tmp_path / "root/usr/bin/hello").read_bytes() == b"hi"
    assert not (tmp_path / "root/usr/share").exists()


def test_a_package_that_is_not_what_the_index_says(tmp_path: Path) -> None:
    source = mirror(tmp_path / "mirror", deb({"./a": b"1"}), listed=b"another")
    package = source.index(source.release(NO_KEYS)[0], "arm64")["hello"]
    with pytest.raises(RuntimeMissingError, match=r"hello\.deb has sha256 .*, expected") as caught:
        source.fetch(package, tmp_path / "downloads")
    assert "FEWSTEP_DEBIAN_MIRROR" in str(caught.value.hint)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_an_index_that_is_not_the_release_s(tmp_path: Path) -> None:
    source = mirror(tmp_path / "mirror", deb({"./a": b"1"}))
    release = source.release(NO_KEYS)[0]
    index = tmp_path / "mirror/dists/test/main/binary-arm64/Packages.xz"
    index.write_bytes(lzma.compress(b"Package: other\n"))
    with pytest.raises(RuntimeMissingError, match=r"Packages\.xz has sha256"):
        source.index(release, "arm64")
    with pytest.raises(RuntimeMissingError, match="the release test has no main/binary-riscv64"):
        source.index(release, "riscv64")


def test_no_mirror() -> None:
    with pytest.raises(RuntimeMissingError, match=r"cannot fetch http://127\.0\.0\.1:9/") as caught:
        Mirror("http://127.0.0.1:9", "test").release(NO_KEYS)
    assert "connect to the network" in str(caught.value.hint)


def test_files_stay_below_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "bad.deb"
    path.write_bytes(deb({"./../../outside": b"1"}))
    with pytest.raises(RuntimeMissingError, match="leaves the folder"):
        unpack(path, tmp_path / "root")
    path.write_bytes(b"not a package")
    with pytest.raises(RuntimeMissingError, match="is not a Debian package"):
        unpack(path, tmp_path / "root")
    path.write_bytes(deb({"./a": b"1"}))
    with pytest.raises(RuntimeMissingError, match=r"bad\.deb lacks b"):
        unpack(path, tmp_path / "root", ["b"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str | None]]]:
    """Serves a folder with ranges, and notes which were asked for."""
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (tmp_path / "mirror" / self.path.lstrip("/")).read_bytes()
            wanted = self.headers.get("Range")
            asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.end_headers()
            self.wfile.write(body[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", asked
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_an_interrupted_download_goes_on(tmp_path: Path, server: tuple[str, list[str | None]]) -> None:
    body = deb({"./a": b"1" * 5000})
    mirror(tmp_path / "mirror", body)
    url, asked = server
    source = Mirror(url, "test")
    package = source.index(source.release(NO_KEYS)[0], "arm64")["hello"]
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "hello.deb.part").write_bytes(body[:100])
    assert source.fetch(package, downloads).read_bytes() == body
    assert asked[-1] == "bytes=100-"
