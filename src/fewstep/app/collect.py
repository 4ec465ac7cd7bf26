"""Takes the results of device checks: from whoever holds the token of the moment, of the right form and size."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

from fewstep.bundle.bundle import Bundle
from fewstep.disk import write_whole
from fewstep.errors import FewstepError, StorageError
from fewstep.pipeline.device_checks import MOST_BYTES, parse_result


@dataclass(frozen=True)
class Answer:
    """What a post is answered with."""

    status: HTTPStatus
    text: str


class Collector:
    """Writes results to a folder; each token lets one result in."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self._bundle = bundle
        self._folder = folder
        self.on_result: Callable[[Path], None] = lambda _: None
        """Called with the file of each result that was taken."""
        self._lock = threading.Lock()
        self._token = secrets.token_urlsafe(18)

    @property
    def token(self) -> str:
        """The token that lets the next result in."""
        return self._token

    def refusal(self, token: str | None, length: str | None, content_type: str | None) -> Answer | None:
        """Returns why a post is refused by its headers alone, before its body is read; None if it is not."""
        if token is None or not hmac.compare_digest(token.encode(), self._token.encode()):
            return Answer(HTTPStatus.FORBIDDEN, "the token is missing or spent")
        if (content_type or "").partition(";")[0].strip().lower() != "application/json":
            return Answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        if length is None or not re.fullmatch(r"\d{1,12}", length):
            return Answer(HTTPStatus.LENGTH_REQUIRED, "the length is missing")
        if int(length) > MOST_BYTES:
            return Answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MOST_BYTES} bytes")
        return None

    def accept(self, token: str, body: bytes) -> Answer:
        """Writes a result if its token is still good, and returns what to answer."""
        try:
            result = parse_result(body, self._bundle, where="the result")
        except FewstepError as error:
            return Answer(HTTPStatus.BAD_REQUEST, error.message)
        with self._lock:
            if not hmac.compare_digest(token.encode(), self._token.encode()):
                return Answer(HTTPStatus.FORBIDDEN, "the token is missing or spent")
            self._token = secrets.token_urlsafe(18)
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{result['device']['browser']}-{result['device']['os']}")
        path = self._folder / f"{now}-{words[:60]}-{secrets.token_hex(3)}.json"
        try:
            write_whole(path, f"{json.dumps(result, indent=1)}\n".encode())
        except StorageError as error:
            return Answer(HTTPStatus.INSUFFICIENT_STORAGE, error.message)
        self.on_result(path)
        return Answer(HTTPStatus.CREATED, "thank you")
