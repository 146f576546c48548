"""What a server of ours tells browsers, and asks of them: of the chat page and of the page of runs.
Standard library only."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from urllib.parse import urlsplit

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def content_policy(page: str) -> str:
    """A policy that lets the page's own script and style run, by their hashes, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def is_foreign(origin: str | None, host: str) -> bool:
    """Whether the header Origin names another website than the header Host."""
    return origin is not None and urlsplit(origin).netloc.lower() != host.lower()


def bears(authorization: str, token: bytes) -> bool:
    """Whether the header Authorization is `Bearer` and this token, told in constant time."""
    kind, _, given = authorization.partition(" ")
    sound = hmac.compare_digest(given.strip().encode(errors="replace"), token)
    return sound and kind.lower() == "bearer"
