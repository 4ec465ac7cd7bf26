"""`fewstep app`: what it writes, what its server gives away and to whom, and which results it takes."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fewstep.app import AppServer, Certificate, Collector, Site, write_site
from fewstep.app.site import HEADERS, STATIC
from fewstep.bundle.bundle import Bundle
from fewstep.cli import cli
from fewstep.errors import BundleError, ContractError
from fewstep.hashing import file_sha256
from fewstep.pipeline.device_checks import MOST_BYTES
from tests.support.bundles import built
from tests.web.results import result_of


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return built("lcm").bundle


@pytest.fixture(scope="module")
def site(bundle: Bundle) -> Site:
    return Site.of(bundle)


@pytest.fixture
def server(bundle: Bundle, site: Site, tmp_path: Path) -> Iterator[AppServer]:
    with AppServer(site, collector=Collector(bundle, tmp_path / "results")) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@dataclass(frozen=True)
class Answered:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(
    server: AppServer, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> Answered:
    with contextlib.closing(http.client.HTTPConnection("localhost", server.server_port, timeout=10)) as connection:
        # A server that refuses a post by its headers closes before all of a long body is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, body=body, headers=headers or {})
        with connection.getresponse() as response:
            return Answered(response.status, response.headers, response.read())


def post(server: AppServer, body: bytes, **changes: str) -> tuple[int, str]:
    assert server.collector is not None
    headers = {"X-Fewstep-Token": server.collector.token, "Content-Type": "application/json", **changes}
    answer = ask(server, "POST", "/collect", {k: v for k, v in headers.items() if v != "-"}, body)
    return answer.status, answer.body.decode().strip()


def test_folder_has_the_app_and_what_a_browser_reads_of_the_bundle(bundle: Bundle, site: Site, tmp_path: Path) -> None:
    write_site(site, tmp_path / "out")
    paths = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert paths == site.entries.keys()
    assert {"index.html", "sw.js", "manifest.webmanifest", "_headers", "bundle/manifest.json"} <= paths
    networks = {f"bundle/{artifact.path}" for artifact in bundle.manifest.artifacts}
    assert networks | {"bundle/tokenizer/tokenizer.json", "bundle/golden/000.safetensors"} <= paths
    assert not any(path.startswith("bundle/report/") or path == "build.json" for path in paths)
    for path, entry in site.entries.items():
        assert file_sha256(tmp_path / "out" / path) == entry.sha256, path


def test_service_worker_names_every_file_that_it_keeps(site: Site) -> None:
    source = site.entries["sw.js"].source
    assert isinstance(source, bytes)
    release = json.loads(re.fullmatch(rb"self\.FEWSTEP_RELEASE=(\{.*\});", source.split(b"\n")[0])[1])  # type: ignore[index]
    assert release["files"]["index.html"] == file_sha256(STATIC / "index.html")
    assert "bundle/manifest.json" in release["files"]
    assert not any(path.endswith((".onnx", ".gz")) for path in release["files"])


def test_older_site_is_replaced_and_anything_else_refused(site: Site, tmp_path: Path) -> None:
    write_site(site, tmp_path / "out")
    write_site(site, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ContractError, match="exists and is not an app, expected a new folder"):
        write_site(site, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_altered_bundle_is_not_packed(copy_bundle: Callable[[str], Path]) -> None:
    path = copy_bundle("lcm")
    model = next(path.glob("onnxruntime/*/model.onnx"))
    model.write_bytes(model.read_bytes()[:-1])
    done = CliRunner().invoke(cli, ["app", str(path), "-o", str(path.parent / "out")])
    assert isinstance(done.exception, BundleError)
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param([], "give -o FOLDER or --serve, and not both", id="neither"),
        pytest.param(["-o", "x", "--serve"], "give -o FOLDER or --serve, and not both", id="both"),
        pytest.param(["--serve", "--key", "k"], "--certificate and --key belong together", id="key alone"),
    ],
)
def test_usage(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(cli, ["app", "bundle", *arguments])
    assert done.exit_code == 2
    assert text in done.output


def test_files_come_with_headers_that_isolate_and_protect(server: AppServer) -> None:
    answer = ask(server, "GET", "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert answer.body == (STATIC / "index.html").read_bytes()
    again = ask(server, "GET", "/", {"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
    head = ask(server, "HEAD", "/sw.js")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Cache-Control"] == "no-cache"


def test_files_asked_for_by_hash_may_be_kept_for_ever(server: AppServer) -> None:
    entry = server.site.entries["bundle/tokenizer/tokenizer.json"]
    answer = ask(server, "GET", f"/bundle/tokenizer/tokenizer.json?sha256={entry.sha256}")
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    other = ask(server, "GET", f"/bundle/tokenizer/tokenizer.json?sha256={'0' * 64}")
    assert other.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/bundle/report/index.html", "/assets/"]
)
def test_nothing_else_can_be_had(server: AppServer, path: str) -> None:
    assert ask(server, "GET", path).status == 404


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/collect")])
def test_other_names_for_this_machine_are_refused(server: AppServer, method: str, path: str) -> None:
    answer = ask(server, method, path, {"Host": f"evil.example:{server.server_port}"})
    assert (answer.status, answer.body) == (403, b"unknown host\n")


def test_port_in_use_is_said(site: Site, server: AppServer) -> None:
    with pytest.raises(ContractError, match=rf"cannot serve on port {server.server_port}: ") as caught:
        AppServer(site, port=server.server_port)
    assert caught.value.hint == "choose another --port"


def test_result_is_taken_once(server: AppServer, bundle: Bundle, tmp_path: Path) -> None:
    result = result_of(bundle)
    body = json.dumps(result).encode()
    assert server.collector is not None
    token = server.collector.token
    assert server.collect_url == f"{server.url}#collect={token}"
    assert post(server, body) == (201, "thank you")
    (path,) = (tmp_path / "results").iterdir()
    assert json.loads(path.read_text()) == result
    assert post(server, body, **{"X-Fewstep-Token": token}) == (403, "the token is missing or spent")
    assert post(server, body)[0] == 201, "the next token is good"


def _changed(of: Bundle, **changes: Any) -> bytes:
    return json.dumps({**result_of(of), **changes}).encode()


@pytest.mark.parametrize(
    ("make", "changes", "status", "text"),
    [
        pytest.param(_changed, {"X-Fewstep-Token": "-"}, 403, "the token is missing or spent", id="no token"),
        pytest.param(_changed, {"X-Fewstep-Token": "é"}, 403, "the token is missing or spent", id="wrong token"),
        pytest.param(_changed, {"Content-Type": "text/plain"}, 415, "expected application/json", id="type"),
        pytest.param(_changed, {"Content-Length": "many"}, 411, "the length is missing", id="length"),
        pytest.param(
            lambda _: b" " * (MOST_BYTES + 1), {}, 413, f"expected at most {MOST_BYTES} bytes", id="oversized"
        ),
        pytest.param(lambda _: b"", {}, 400, "the result is not JSON", id="empty"),
        pytest.param(lambda _: b"\xff{", {}, 400, "the result is not JSON", id="bytes"),
        pytest.param(lambda _: b"[" * 100_000, {}, 400, "the result is not JSON", id="deep"),
        pytest.param(lambda _: b"[]", {}, 400, "the result: (top): [] is not of type 'object'", id="no object"),
        pytest.param(lambda b: _changed(b, more=1), {}, 400, "Additional properties are not allowed", id="more"),
        pytest.param(lambda b: _changed(b, picture_ms="x"), {}, 400, "picture_ms: 'x' is not of type", id="wrong type"),
        pytest.param(
            lambda b: _changed(b, checks=[]), {}, 400, "checks: [] should be non-empty", id="nothing compared"
        ),
        pytest.param(
            lambda b: _changed(b, bundle={"name": "x", "content_id": "0" * 64}),
            {},
            400,
            "is of bundle",
            id="other bundle",
        ),
    ],
)
def test_posts_that_are_refused(
    server: AppServer,
    bundle: Bundle,
    tmp_path: Path,
    make: Callable[[Bundle], bytes],
    changes: dict[str, str],
    status: int,
    text: str,
) -> None:
    found = post(server, make(bundle), **changes)
    assert found[0] == status
    assert text in found[1]
    assert not (tmp_path / "results").exists()
    assert post(server, _changed(bundle))[0] == 201, "a refused post spends no token"


def test_nothing_is_collected_unless_asked(site: Site) -> None:
    with AppServer(site) as plain:
        thread = threading.Thread(target=plain.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        answer = ask(plain, "POST", "/collect", {}, b"{}")
        plain.shutdown()
        thread.join()
    assert (answer.status, answer.body) == (404, b"nothing is collected here\n")


def test_local_network_address_comes_as_a_qr_code() -> None:
    from fewstep.app.serve import qr_text

    text = qr_text("http://192.168.1.20:8000/#collect=abcdefghijklmnopqrstuvwx")
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) > 10
    assert max(map(len, lines)) < 80, "fits a terminal"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_https_with_a_certificate(site: Site, tmp_path: Path) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", chain], check=True, capture_output=True)
    with AppServer(site, certificate=Certificate(chain, key)) as secure:
        assert secure.url == f"https://localhost:{secure.server_port}/"
        thread = threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        context = ssl.create_default_context(cafile=str(chain))
        connection = http.client.HTTPSConnection("localhost", secure.server_port, timeout=10, context=context)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            with connection.getresponse() as response:
                status = response.status
        secure.shutdown()
        thread.join()
    assert status == 200
    with pytest.raises(ContractError, match=r"key\.pem: cannot be used as a certificate"):
        AppServer(site, certificate=Certificate(key, key))
