"""Serves a site on this machine or the local network, with the headers that threads and safety need."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import socket
import ssl
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from fewstep.app.collect import Answer, Collector
from fewstep.app.site import HEADERS, Entry, Site
from fewstep.errors import ContractError

COLLECT_PATH = "collect"
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
# A browser keeps six connections open to a site; more devices than this has room for are told to come again.
_MOST_CONNECTIONS = 64
_BACKLOG = 256
# Seconds that a connection may be silent between requests, that a request with its body may take, and that a piece of
# an answer (_PIECE) may.
_IDLE_S, _REQUEST_S, _ANSWER_S = 15.0, 60.0, 30.0
_PIECE = 1 << 20
_READ_ON_S = 1.0
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 2\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 20\r\n\r\ntoo many connections"
)
_log = logging.getLogger("fewstep")


@dataclass(frozen=True)
class Certificate:
    """PEM files for https. Over http, browsers give pages of the local network no threads and no storage."""

    chain: Path
    key: Path


class AppServer(ThreadingHTTPServer):
    """A server of one site: nothing that the site does not list can be had from it."""

    daemon_threads = True
    request_queue_size = _BACKLOG

    def __init__(
        self,
        site: Site,
        *,
        port: int = 0,
        lan: bool = False,
        collector: Collector | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        """Binds the port (0: any free one) on localhost, or on every interface for ``lan``.

        Raises:
            ContractError: the port is taken, the certificate cannot be read, or there is no network.
        """
        self.site = site
        self.collector = collector
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self.host = lan_address() if lan else "localhost"
        try:
            super().__init__(("" if lan else "127.0.0.1", port), _Handler)
        except OSError as error:
            raise ContractError(
                f"cannot serve on port {port}: {error.strerror}", hint="choose another --port"
            ) from error
        self.scheme = "http"
        if certificate is not None:
            self._use(certificate)
        # Any other name is another site's, pointed at this machine to read from it (DNS rebinding).
        self.hosts = {f"{name}:{self.server_port}" for name in (self.host, "localhost", "127.0.0.1")}

    @property
    def url(self) -> str:
        """The address to open."""
        return f"{self.scheme}://{self.host}:{self.server_port}/"

    @property
    def collect_url(self) -> str:
        """The address to open on a device whose result is wanted; the part after # is not sent to servers."""
        return self.url if self.collector is None else f"{self.url}#collect={self.collector.token}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a connection in a thread of its own, or refuses it at once where there are too many."""
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0)
                if self.scheme == "http":  # over https it would take a handshake to say so
                    request.send(_BUSY)
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads
            self._places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a connection, and gives its place to the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps quiet of connections that broke or were too slow; anything else is told in a line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("a request failed: %s: %s", type(error).__name__, error)

    def _use(self, certificate: Certificate) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate.chain, certificate.key)
        except (OSError, ssl.SSLError) as error:
            self.server_close()
            raise ContractError(
                f"{certificate.chain}: cannot be used as a certificate ({error})",
                hint="give PEM files: --certificate FILE --key FILE",
            ) from error
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https"


def run(server: AppServer, say: Callable[[str], None], *, open_browser: bool = False) -> None:
    """Serves until interrupted; tells the address, and the next one after each result that was taken."""

    def announce() -> None:
        say(f"open    {server.collect_url}")
        if server.host != "localhost":
            say(qr_text(server.collect_url))
            if server.scheme == "http":
                say("one thread and nothing offline: over http that is all that browsers allow; see --certificate")

    def taken(path: Path) -> None:
        say(f"result  {path}")
        announce()

    if server.collector is not None:
        server.collector.on_result = taken
    announce()
    if open_browser:
        webbrowser.open(server.collect_url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def qr_text(text: str) -> str:
    """Returns a text as a QR code of block characters, dark on light for a dark terminal."""
    import segno

    buffer = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(out=buffer, compact=True)
    return buffer.getvalue()


def lan_address() -> str:
    """Returns this machine's address in the local network.

    Raises:
        ContractError: it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737): sends nothing, chooses an interface
            address: str = probe.getsockname()[0]
        except OSError as error:
            raise ContractError("this machine is in no network", hint="leave --lan out") from error
    return address


class _Timed(io.RawIOBase):
    """What comes from a connection, until a moment: a client that sends a byte now and then is not waited for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._end: float | None = None

    def readable(self) -> bool:
        """Returns True."""
        return True

    def expect(self) -> None:
        """Waits for the next request."""
        self._end = None

    def readinto(self, buffer: Any) -> int:
        """Returns how many bytes came.

        Raises:
            TimeoutError: none came in time.
        """
        now = time.monotonic()
        rest = _IDLE_S if self._end is None else self._end - now
        if rest <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(rest)
        count = self._connection.recv_into(buffer)
        if self._end is None:
            self._end = now + _REQUEST_S
        self._connection.settimeout(_ANSWER_S)
        return count


class _Handler(BaseHTTPRequestHandler):
    server: AppServer
    protocol_version = "HTTP/1.1"
    server_version = "fewstep"
    sys_version = ""
    timeout = _ANSWER_S
    _immutable: ClassVar[str] = "public, max-age=31536000, immutable"

    def setup(self) -> None:
        """Prepares a connection."""
        super().setup()
        self.rfile.close()
        self._timed = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._timed)

    def handle_one_request(self) -> None:
        """Answers one request, if it comes in time."""
        self._timed.expect()
        super().handle_one_request()

    def do_GET(self) -> None:
        """Answers with a file."""
        self._file(send_body=True)

    def do_HEAD(self) -> None:
        """Answers with a file's headers."""
        self._file(send_body=False)

    def do_POST(self) -> None:
        """Takes a result."""
        self.close_connection = True  # a body that was refused is not read
        collector = self.server.collector
        if not self._known_host():
            return self._answer(Answer(HTTPStatus.FORBIDDEN, "unknown host"))
        if collector is None or self._address().path != f"/{COLLECT_PATH}":
            return self._answer(Answer(HTTPStatus.NOT_FOUND, "nothing is collected here"))
        token, length = self.headers.get("X-Fewstep-Token"), self.headers.get("Content-Length")
        refusal = collector.refusal(token, length, self.headers.get("Content-Type"))
        if refusal is not None:
            self._answer(refusal)
            return self._read_on()
        assert token is not None and length is not None, "refused above"
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return self._answer(Answer(HTTPStatus.BAD_REQUEST, "the result is not whole"))
        self._answer(collector.accept(token, body))

    def _read_on(self) -> None:
        """Reads what still comes, for a moment: closing with bytes unread takes the answer back (RFC 9112, 9.6)."""
        end = time.monotonic() + _READ_ON_S
        with contextlib.suppress(OSError):
            while (rest := end - time.monotonic()) > 0:
                self.connection.settimeout(rest)
                if not self.connection.recv(_PIECE):
                    break

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet: the address of each request is nothing to show."""

    def parse_request(self) -> bool:
        """Reads the first line and the headers of a request, and refuses an address that is none."""
        if not super().parse_request():
            return False
        try:
            self._address()
        except ValueError:
            self.close_connection = True
            self._answer(Answer(HTTPStatus.BAD_REQUEST, "the address is malformed"))
            return False
        return True

    def _address(self) -> SplitResult:
        return urlsplit(self.path)

    def _known_host(self) -> bool:
        return self.headers.get("Host", "") in self.server.hosts

    def _file(self, *, send_body: bool) -> None:
        address = self._address()
        path = unquote(address.path).removeprefix("/") or _INDEX
        entry = self.server.site.entries.get(path)
        if not self._known_host():
            return self._answer(Answer(HTTPStatus.FORBIDDEN, "unknown host"))
        if entry is None:
            return self._answer(Answer(HTTPStatus.NOT_FOUND, "no such file"))
        named = path.startswith("assets/") or parse_qs(address.query).get("sha256") == [entry.sha256]
        headers = {
            "Cache-Control": self._immutable if named else "no-cache",
            "Content-Type": _TYPES.get(Path(path).suffix, "application/octet-stream"),
            "ETag": f'"{entry.sha256}"',
        }
        if self.headers.get("If-None-Match") == headers["ETag"]:
            return self._head(HTTPStatus.NOT_MODIFIED, headers)
        self._head(HTTPStatus.OK, {**headers, "Content-Length": str(entry.bytes)})
        if send_body:
            self._send(entry)

    def _send(self, entry: Entry) -> None:
        try:
            with io.BytesIO(entry.source) if isinstance(entry.source, bytes) else entry.source.open("rb") as stream:
                shutil.copyfileobj(stream, self.wfile, _PIECE)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the page was closed, or reads too slowly

    def _answer(self, answer: Answer) -> None:
        body = f"{answer.text}\n".encode()
        self._head(answer.status, {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
