"""Where the market is, and as whom one speaks to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from ops.errors import PreflightError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
VAST_AI = ".vast.ai"


@dataclass(frozen=True)
class Provider:
    """The address of vast.ai's API, or of the emulator, and the key for it."""

    url: str
    api_key: str


def provider_from(environ: dict[str, str] | os._Environ[str]) -> Provider | None:
    """The real vast.ai when VAST_API_KEY is set (VAST_URL overrides its address), else None.
    Raises PreflightError for an address to which the key would travel in the clear."""
    key = environ.get("VAST_API_KEY", "").strip()
    if not key:
        return None
    url = environ.get("VAST_URL", "").strip() or "https://console.vast.ai"
    there = urlsplit(url)
    if there.scheme != "https" and not (there.scheme == "http" and is_loopback(url)):
        raise PreflightError(
            f"VAST_URL is {url}: the account's key would travel to it in the clear",
            hint="write https:// in VAST_URL, or unset it for vast.ai itself",
        )
    return Provider(url, key)


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine: an emulator."""
    return urlsplit(url).hostname in LOOPBACK
