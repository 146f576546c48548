"""One API request on its way to its handler, what goes back, and texts that are fetched later."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from ops.fakevast.boxes.boxes import Boxes
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.errors import ApiError
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.http.routes import Route


def new_token() -> str:
    """32 hexadecimal digits that nobody can guess."""
    return secrets.token_hex(16)


@dataclass
class StoredResult:
    """A log or a command's output. The first reads do not find it yet."""

    text: str
    reads_until_ready: int


class StoredResults:
    """Texts that the API hands over by a URL; the first `late` reads of each find nothing."""

    def __init__(self, late: int = 1) -> None:
        self.base_url = ""
        self._late = late
        self._stored: dict[str, StoredResult] = {}

    def store(self, text: str) -> str:
        """The URL under which this text can be fetched."""
        token = new_token()
        self._stored[token] = StoredResult(text, self._late)
        return f"{self.base_url}/_results/{token}"

    def read(self, token: str) -> str | None:
        """The text; None for an unknown token, and for one that is not ready."""
        stored = self._stored.get(token)
        if stored is None:
            return None
        if stored.reads_until_ready > 0:
            stored.reads_until_ready -= 1
            return None
        return stored.text


@dataclass
class Call:
    """`key` is None when nobody is logged in; `path` holds the numbers in the URL's path."""

    cloud: Cloud
    boxes: Boxes
    results: StoredResults
    route: Route
    path: dict[str, int]
    request_query: dict[str, str]
    key: str | None
    json: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None

    def query(self, name: str, default: Any) -> Any:
        """A JSON value of the query string; raises ApiError 400 when it is not JSON."""
        text = self.request_query.get(name)
        if text in (None, ""):
            return default
        try:
            return json.loads(str(text))
        except ValueError as error:
            message = f"Error in query parameters: {name} is not valid JSON"
            raise ApiError(400, "invalid_request", message) from error


@dataclass
class Response:
    """The answer to a call. With `cut` nothing is sent and the connection breaks."""

    status: int
    body: Any
    content_type: str = "application/json"
    delay_s: float = 0.0
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)
