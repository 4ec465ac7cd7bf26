"""The app's server under clients that mean no good, on this machine alone: many at once, slow ones, malformed ones."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fewstep.app import AppServer, Site
from fewstep.app import serve as module
from fewstep.app.site import Entry

# A loaded machine may need its time; every one of these waits ends long before where the limit works.
PATIENCE_S = 30


@pytest.fixture
def server() -> Iterator[AppServer]:
    page = b"<title>page</title>"
    with AppServer(Site({"index.html": Entry(page, "0" * 64, len(page))})) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def opened(server: AppServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE_S)


def until_closed(connection: socket.socket) -> bytes:
    """Returns all that comes until the server closes, or resets, the connection."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return received


def status(server: AppServer, path: str) -> int:
    with opened(server) as connection:
        host = f"localhost:{server.server_port}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(until_closed(connection).split()[1])


@pytest.mark.parametrize("path", ["http://[", "http://[::1", "http://x]/"])
def test_malformed_addresses_are_400_and_no_traceback(
    server: AppServer, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    assert status(server, path) == 400
    assert status(server, "/") == 200, "the server goes on"
    assert capfd.readouterr().err == ""


def test_200_connections_at_once_are_served_or_refused(server: AppServer, capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda _: status(server, "/"), range(200)))
    assert set(found) <= {200, 503}
    assert found.count(200) >= module._MOST_CONNECTIONS // 2
    assert status(server, "/") == 200
    assert capfd.readouterr().err == ""


def test_more_connections_than_places_are_refused_at_once_and_threads_are_bounded(
    server: AppServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_places", threading.BoundedSemaphore(4))
    before = threading.active_count()
    silent = [opened(server) for _ in range(12)]
    try:
        answers = []
        for connection in silent[4:]:
            answers.append(until_closed(connection).split(b"\r\n")[0])
        assert answers == [b"HTTP/1.1 503 Service Unavailable"] * 8
        assert threading.active_count() - before <= 4
    finally:
        for connection in silent:
            connection.close()
    for _ in range(PATIENCE_S * 10):  # the places come back
        if status(server, "/") == 200:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the places of closed connections were not given back")


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_request_that_comes_byte_by_byte_ends(
    server: AppServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    monkeypatch.setattr(module, "_REQUEST_S", 0.5)
    start = time.monotonic()
    with opened(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(OSError, match=r"reset|Broken pipe|abort"):
            while time.monotonic() - start < PATIENCE_S:
                connection.sendall(b"X-a: b\r\n" if what == "headers" else b"a")
                time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_a_silent_connection_ends(server: AppServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.2)
    with opened(server) as connection:
        assert until_closed(connection) == b""
