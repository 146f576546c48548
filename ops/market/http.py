"""vastai's HTTP client with answers that end: in bytes, and in seconds."""

from __future__ import annotations

import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError
from vastai.api.client import VastClient, VastSession

MAX_BYTES = 64 << 20  # of one answer, unpacked: a thousand pages of a list
MAX_S = 120.0  # from an answer's first byte to its last
_PIECE = 1 << 16


class Endless(requests.RequestException):
    """An answer of more than MAX_BYTES, or that took longer than MAX_S."""


class Client(VastClient):  # type: ignore[misc]  # it is untyped
    """Each answer is read whole, within the limits. Nothing is sent twice. Raises Endless."""

    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        json_data: Any = None,
        timeout: float | None = None,
    ) -> requests.Response:
        with VastSession(self.server_url) as session:
            for scheme in ("https://", "http://"):
                session.mount(scheme, _Bounded())
            request = requests.Request(method=method, url=url, headers=headers, json=json_data)
            sent = session.prepare_request(request)
            answer: requests.Response = session.send(sent, timeout=timeout or self.timeout)
            return answer


class _Bounded(HTTPAdapter):
    """Reads what comes within the limits, redirects included."""

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        answer = super().build_response(req, resp)
        answer._content = read(resp, MAX_BYTES)  # as requests keeps what it has read
        answer._content_consumed = True
        return answer


def read(answer: BaseHTTPResponse, max_bytes: int, *, whole: bool = True) -> bytes:
    """The unpacked bytes of an answer; without `whole` the first `max_bytes` of a longer one.
    Raises Endless, ConnectionError."""
    ends_at, content = time.monotonic() + MAX_S, bytearray()
    try:
        while piece := answer.read1(_PIECE, decode_content=True):
            content += piece
            if len(content) > max_bytes and not whole:
                break
            if len(content) > max_bytes:
                raise Endless(f"its answer has more than {max_bytes:,} bytes")
            if time.monotonic() > ends_at:
                raise Endless(f"its answer did not end within {MAX_S:.0f} s")
    except (HTTPError, OSError) as e:
        raise requests.ConnectionError(f"its answer broke off: {e}") from e
    finally:
        if len(content) > max_bytes or time.monotonic() > ends_at:
            answer.close()
    return bytes(content[:max_bytes])
