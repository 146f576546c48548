"""Files of a base model that is named by its id on the hub, for a plan: from the hub, or from its
cache on this machine where the hub cannot be reached. Nothing is tried for long."""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from pathlib import Path

LOOK_S = 2.0  # for the hub to answer at all
BELIEVED_S = 30.0  # how long that is believed


class NotHere(OSError):
    """What is named is not in the cache, and the hub cannot be reached; or the hub has it not."""


def file(base: str, name: str) -> Path:
    """One file of the model `base` (ID or ID@REVISION). Raises NotHere, or ValueError for what is
    no id."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    model, _, revision = base.partition("@")
    why = unreachable()
    try:
        return Path(
            hf_hub_download(model, name, revision=revision or None, local_files_only=bool(why))
        )
    except LocalEntryNotFoundError as e:
        raise NotHere(_missing(base, why or str(e))) from e


def cached_folder(model: str, revision: str | None) -> Path | None:
    """The cache's folder of a model with its tokenizer, where the hub cannot be reached; None where
    it can. Raises NotHere."""
    if not (why := unreachable()):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as e:
        raise NotHere(_missing(model, why)) from e
    except HFValidationError as e:
        raise NotHere(f"{model} is no folder on this machine, and no id of the hub") from e
    if not any(folder.glob("tokenizer*")):
        raise NotHere(_missing(model, why))
    return folder


def _missing(model: str, why: str) -> str:
    return f"{model} is not on this machine, and the hub cannot be reached: {why}"


def unreachable() -> str:
    """Why the hub does not answer within LOOK_S; "" where it does, whatever it says."""
    return _unreachable(int(time.monotonic() / BELIEVED_S))


@lru_cache(maxsize=1)
def _unreachable(moment: int) -> str:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    said: list[str] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=LOOK_S)
            said.append("")
        except Exception as e:  # of whichever HTTP client it has
            said.append(f"{e}".strip().splitlines()[0] if f"{e}".strip() else type(e).__name__)

    # a thread, because nothing bounds the look-up of a name
    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(LOOK_S)
    return said[0] if said else f"{constants.ENDPOINT} does not answer within {LOOK_S:.0f} s"
