"""Which vast.ai is meant: the real one for a key, else the emulator on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ops.market.client import Vast
from ops.market.provider import Provider, provider_from
from ops.run.folders import project_folder
from ops.wait import RealClock

# no limits on requests, and the image size that jobs/practice.toml names
EMULATOR = ("--no-rate-limits", "--image-bytes", "milktea/*=289910784")
EMULATOR_PACE = 0.1  # waiting for an emulator, as a share of waiting for vast.ai


def uses_vast_ai(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether VAST_API_KEY is set. Without it the emulator plays vast.ai, and no money moves."""
    return provider_from(dict(environ)) is not None


def open_market(environ: Mapping[str, str] = os.environ) -> Vast:
    """vast.ai for the key in VAST_API_KEY (at VAST_URL, if set); without a key the emulator of
    MILKTEA_EMULATOR (`.milktea/fakevast`), started when it does not run. MILKTEA_PACE scales all
    waiting. Raises RuntimeError where the emulator does not start."""
    provider = provider_from(dict(environ))
    if provider is not None:
        return Vast(provider, RealClock(float(environ.get("MILKTEA_PACE") or 1)))
    from ops.fakevast.embedded import ensure  # asyncssh and aiohttp, which a key does without

    folder = Path(environ.get("MILKTEA_EMULATOR") or project_folder() / ".milktea" / "fakevast")
    server = ensure(folder, options=EMULATOR)
    return Vast(Provider(server.url, server.api_key), RealClock(EMULATOR_PACE))
