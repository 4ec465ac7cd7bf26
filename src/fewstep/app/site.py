"""What a web server must have to run a bundle in a browser: the app's files and the bundle's, by path."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fewstep.bundle.bundle import Bundle
from fewstep.bundle.seal import UNLISTED
from fewstep.disk import replacing
from fewstep.errors import BundleError, ContractError
from fewstep.hashing import file_sha256, value_sha256
from fewstep.pipeline.device_checks import WEB_RUNTIME
from fewstep.text.tokens import FILE as TOKENIZER

STATIC = Path(__file__).parent / "static"
SERVICE_WORKER = "sw.js"
_MARKER = "index.html"
# Not kept by the service worker: the page keeps them itself, by hash, and only those that the device needs.
_KEPT_BY_PAGE = (".gz",)
_BUILD = "build.json"

# What the pages may do, as the server's header says it; index.html says the same to hosts that send no headers.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'"
)
# The two Cross-Origin headers isolate the page, which is what browsers ask for before WebAssembly may have threads.
HEADERS = {
    "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Entry:
    """One file of a site: its content is that of a file, or given; with its hash."""

    source: Path | bytes
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Site:
    """The files of a site by path."""

    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, bundle: Bundle) -> Site:
        """Returns the site of a bundle.

        Raises:
            BundleError: the bundle has no networks that a browser runs, or fewstep was installed without the app.
        """
        app = {path: _file(STATIC / path) for path in _static_files()}
        worker = app.pop(SERVICE_WORKER)
        networks = {f"bundle/{path}": _file(source) for path, source in _bundle_files(bundle)}
        assert isinstance(worker.source, Path)
        kept = {path: entry.sha256 for path, entry in app.items() if not path.endswith(_KEPT_BY_PAGE)}
        kept |= {path: networks[path].sha256 for path in (f"bundle/{name}" for name in UNLISTED) if path in networks}
        release = json.dumps({"version": value_sha256(kept)[:16], "files": kept}, sort_keys=True)
        script = f"self.FEWSTEP_RELEASE={release};\n{worker.source.read_text(encoding='utf-8')}".encode()
        given = {SERVICE_WORKER: _given(script), "_headers": _given(_headers_file())}
        return cls({**app, **given, **networks})


def _static_files() -> list[str]:
    if not (STATIC / _MARKER).is_file():
        raise BundleError(
            f"{STATIC} has no {_MARKER}: this fewstep was installed without the web app",
            hint="build it: make app-build (needs Node 18 or later)",
        )
    paths = (path.relative_to(STATIC).as_posix() for path in sorted(STATIC.rglob("*")) if path.is_file())
    return [path for path in paths if path != _BUILD]


def _bundle_files(bundle: Bundle) -> Iterator[tuple[str, Path]]:
    """Yields what a browser reads of a bundle: manifest, networks, tokenizers, golden pack, guidance's tensors."""
    manifest = bundle.manifest
    folders = {
        PurePosixPath(manifest.artifact(WEB_RUNTIME, component).path).parent for component in manifest.components
    }
    tokenizers = {PurePosixPath(spec.folder) / TOKENIZER for spec in manifest.tokenizers.values()}
    for name in UNLISTED:  # the manifest, its hash, and a signature if there is one
        if (bundle.path / name).is_file():
            yield name, bundle.path / name
    for name in manifest.files:
        path = PurePosixPath(name)
        network = path.parent in folders and path.suffix != ".json"
        if network or path in tokenizers or path.parts[0] in ("golden", "guidance"):
            yield name, bundle.file(name)


def _file(path: Path) -> Entry:
    return Entry(path, file_sha256(path), path.stat().st_size)


def _given(content: bytes) -> Entry:
    return Entry(content, hashlib.sha256(content).hexdigest(), len(content))


def _headers_file() -> bytes:
    """Returns the headers in the form that several static hosts read (``_headers``)."""
    return "\n".join(["/*", *(f"  {name}: {value}" for name, value in HEADERS.items()), ""]).encode()


def write_site(site: Site, out: Path) -> None:
    """Writes a site to a folder, whole or not at all; an older site there is replaced.

    Raises:
        ContractError: there is something else at ``out``.
        StorageError: it cannot be written.
    """
    out = out.resolve()
    if out.exists() and not (out / SERVICE_WORKER).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ContractError(f"{out} exists and is not an app, expected a new folder", hint="choose another -o folder")
    with replacing(out, what="the app") as partial:
        for name, entry in site.entries.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(entry.source, bytes):
                path.write_bytes(entry.source)
            else:
                shutil.copyfile(entry.source, path)
