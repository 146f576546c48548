"""One question to an endpoint that speaks OpenAI's chat completions: what comes back, or why
nothing did. Nothing is sent twice here."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests

from ops.errors import ConfigError
from ops.market.http import read

MAX_ANSWER = 16 << 20  # bytes
CONNECT_S, ANSWER_S = 10.0, 300.0
LONGEST_WAIT_S = 300.0  # of a Retry-After that is kept
LIMITS = ("max_tokens", "max_completion_tokens")
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Endpoint:
    """Where, which model, and what a million tokens cost in dollars. `limit` is the name of the
    field that bounds an answer's tokens, `extra` are more fields of a request."""

    url: str
    model: str
    usd_in: float = 0.0
    usd_out: float = 0.0
    key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    limit: str = "max_tokens"

    def usd(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.usd_in + tokens_out * self.usd_out) / 1e6

    def body(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        asked = {"model": self.model, "messages": list(messages), self.limit: max_tokens}
        return {**asked, "temperature": 0, **self.extra}


@dataclass(frozen=True)
class Answer:
    """`tokens` are (in, out) as the endpoint counts them, None where it does not say."""

    text: str
    finish: str
    tokens: tuple[int, int] | None


class NotAnswered(Exception):
    """`billed` says whether it may cost something all the same; `again` whether the same question
    may be asked again, after `wait_s` where the endpoint says so; `fatal` whether every other
    question would end likewise."""

    def __init__(
        self,
        what: str,
        *,
        billed: bool = False,
        again: bool = False,
        wait_s: float | None = None,
        fatal: bool = False,
    ) -> None:
        super().__init__(what)
        self.billed, self.again, self.wait_s, self.fatal = billed, again, wait_s, fatal


def endpoint_of(
    url: str,
    model: str,
    price_in: float | None,
    price_out: float | None,
    key_env: str | None,
    extra: str | None = None,
    limit: str = "max_tokens",
    environ: Mapping[str, str] = os.environ,
) -> Endpoint:
    """The endpoint that these options name. Raises ConfigError for a URL that is none, a host
    beyond this computer without prices, and a key that is not there or would travel open."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(f"{url!r} is no address", hint="--endpoint https://HOST/v1")
    near = is_loopback(parts.hostname)
    if not near and (price_in is None or price_out is None):
        raise ConfigError(
            f"what {parts.hostname} costs is not said",
            hint="--price-in and --price-out: dollars for a million tokens, 0 for your own server",
        )
    key = environ.get(key_env, "") if key_env else ""
    if key_env and not key:
        raise ConfigError(f"{key_env} is not set", hint=f"export {key_env}=...")
    if key and not near and parts.scheme == "http":
        hint = "https://, or `ssh -L` to a port of this machine"
        raise ConfigError(f"the key would travel unencrypted to {parts.hostname}", hint=hint)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    whole = f"{parts.scheme}://{parts.netloc}{path or '/v1'}/chat/completions"
    if limit not in LIMITS:
        raise ConfigError(f"--limit-field {limit!r} is none", hint=" or ".join(LIMITS))
    if min(price_in or 0.0, price_out or 0.0) < 0:
        raise ConfigError("a price is below 0", hint="--price-in 0.14 --price-out 0.28")
    return Endpoint(whole, model, price_in or 0.0, price_out or 0.0, key, _extra(extra), limit)


def _extra(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as e:
        raise ConfigError(f"--extra is no JSON ({e})", hint="--extra '{\"seed\": 1}'") from e
    owned = {"model", "messages", "stream", "n", "max_tokens", "max_completion_tokens"}
    if not isinstance(found, dict) or owned & set(found):
        raise ConfigError("--extra is no object of other fields", hint="--extra '{\"seed\": 1}'")
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is this computer, by its name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_session(endpoint: Endpoint) -> requests.Session:
    """A session for one thread. The key goes to the endpoint alone: no redirect is followed, and no
    ~/.netrc takes its place."""
    session = requests.Session()
    session.trust_env = not is_loopback(urlsplit(endpoint.url).hostname or "")

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if endpoint.key:
            request.headers["Authorization"] = f"Bearer {endpoint.key}"
        return request

    session.auth = authorize
    return session


def ask(session: requests.Session, url: str, body: Mapping[str, Any], call: str) -> Answer:
    """Sends one question, `call` as its Idempotency-Key. Raises NotAnswered."""
    try:
        answer = session.post(
            url,
            json=body,
            headers={"Idempotency-Key": call, "Accept-Encoding": "identity"},
            timeout=(CONNECT_S, ANSWER_S),
            allow_redirects=False,
            stream=True,
        )
    except requests.ConnectTimeout as e:
        raise NotAnswered(f"no connection: {e}", again=True) from e
    except (requests.RequestException, OSError) as e:
        refused = "refused" in str(e) or "resolve" in str(e)
        raise NotAnswered(f"no answer: {e}", billed=not refused, again=True) from e
    try:
        said = read(answer.raw, MAX_ANSWER)
    except requests.RequestException as e:
        raise NotAnswered(f"its answer broke off: {e}", billed=True, again=True) from e
    finally:
        answer.close()
    if answer.status_code != 200:
        raise refusal(answer.status_code, said, answer.headers.get("Retry-After"))
    return answer_of(said)


def answer_of(said: bytes) -> Answer:
    """The answer in a body. Raises NotAnswered where it is none: it was paid all the same."""
    try:
        told = json.loads(said)
        choice = told["choices"][0]
        text, finish = choice["message"]["content"] or "", choice.get("finish_reason") or ""
        usage = told.get("usage") or {}
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise NotAnswered(f"its answer is no chat completion: {said[:80]!r}", billed=True) from e
    if not isinstance(text, str):
        raise NotAnswered("its answer is no text", billed=True)
    counts = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")]
    ints = [n for n in counts if type(n) is int and n >= 0]
    return Answer(text, str(finish), (ints[0], ints[1]) if len(ints) == 2 else None)


def refusal(status: int, said: bytes, retry_after: str | None) -> NotAnswered:
    """What a status other than 200 means."""
    what = f"status {status}: {_message(said)[:200]}"
    if status == 429 or status == 503:
        return NotAnswered(what, billed=status == 503, again=True, wait_s=_seconds(retry_after))
    if status >= 500:
        return NotAnswered(what, billed=True, again=True, wait_s=_seconds(retry_after))
    return NotAnswered(what, fatal=status not in (400, 408, 413, 422))


def _message(said: bytes) -> str:
    """The words in a body that refuses: OpenAI's `error.message`, or all of it."""
    text = said.decode("utf-8", "replace")
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return text
    return message if isinstance(message, str) and message else text


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; a date is not kept."""
    try:
        return min(max(float(retry_after or "x"), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return None
