"""The trainings that an adapter came through, each with the hash of what it left: `chain.json`
beside the weights, and "chain" in the manifest. pydantic only, never torch.

A stage that starts from an adapter goes on with its chain. Every adapter of a chain stands on the
same base.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.wire.stages import StageName

CHAIN, WEIGHTS, CONFIG = "chain.json", "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CONFIG, CHAIN)  # of an adapter, as a later stage reads it
MAX_TEXT = 1 << 20  # bytes of one of them that is not weights
MIN_ACCURACY = 0.55  # of a reward model on held-out pairs

How = Literal["new", "continue", "stack", "merge"]


class Link(BaseModel):
    """One training. `how` it took up what was before it, `sha256` of the weights that it left,
    `numbers` of held-out rows after it."""

    model_config = ConfigDict(frozen=True)

    stage: StageName
    run_id: str
    how: How
    sha256: str
    numbers: dict[str, float] = Field(default={}, max_length=100)


class Chain(BaseModel):
    """`base` is the base model's name, `base_sha256` what trainer.result.adapter.identity says of
    its files, `template` the hash of the tokens that the template becomes."""

    model_config = ConfigDict(frozen=True)

    base: str
    base_sha256: str
    template: str
    links: list[Link] = Field(default=[], max_length=100)


@contextmanager
def opened(adapter: Path, name: str) -> Iterator[IO[bytes]]:
    """A file of an adapter, which is a folder or an archive. Raises FileNotFoundError, and
    ValueError for an archive that cannot be read."""
    if adapter.is_dir():
        with open(adapter / name, "rb") as file:
            yield file
        return
    try:
        with zipfile.ZipFile(adapter) as archive:
            try:
                info = archive.getinfo(name)
            except KeyError as why:
                raise FileNotFoundError(f"{adapter} holds no {name}") from why
            with archive.open(info) as file:
                yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as why:
        raise ValueError(f"it is no archive that can be read: {why}") from why


def text_of(adapter: Path, name: str) -> bytes:
    """Raises FileNotFoundError, ValueError for one of more than MAX_TEXT bytes."""
    with opened(adapter, name) as file:
        text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{adapter}: {name} has more than {MAX_TEXT} bytes")
    return text


def weights_sha256(adapter: Path) -> str:
    """The sha256 of an adapter's weights, by which it is identified. Raises FileNotFoundError."""
    with opened(adapter, WEIGHTS) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def chain_of(adapter: Path) -> Chain | None:
    """The chain of an adapter; None where it has no chain.json. Raises ValueError."""
    try:
        return Chain.model_validate(json.loads(text_of(adapter, CHAIN)))
    except FileNotFoundError:
        return None


def reward_defect(
    reward: Chain | None,
    sha256: str,
    start: Chain | None,
    base: str,
    foreign: bool,
    merged: bool = False,
) -> str:
    """Why a reward model (`sha256` of its weights) must not judge a policy that starts from `start`
    (None: from `base` itself; `merged`: which is merged into the base, and a fresh one trained);
    empty where it may. `foreign`: whether it may come from another chain."""
    if reward is None or not reward.links:
        return "it has no chain.json: it is no reward model of this trainer"
    last = reward.links[-1]
    if last.stage != "rm":
        return f"its last stage is {last.stage}, not rm"
    if last.sha256 != sha256:
        return "its weights are not those that its chain.json names"
    if reward.base != base:
        return f"it stands on {reward.base}, the policy on {base}"
    if merged and last.how != "merge":
        return "it stands on the base, the policy on a base with an adapter merged into it"
    if start is not None and not merged and start.base_sha256 != reward.base_sha256:
        return "it stands on other weights of the same base than the adapter to start from"
    if foreign:
        return ""
    before = [link.sha256 for link in reward.links[:-1]]
    policy = [] if start is None else [link.sha256 for link in start.links]
    if before != policy:
        return (
            f"it was trained {_after(reward.links[:-1])}, the policy starts "
            f"{_after([] if start is None else start.links)}"
        )
    accuracy = last.numbers.get("accuracy")
    if accuracy is not None and accuracy < MIN_ACCURACY:
        return f"it orders {accuracy:.0%} of its held-out pairs rightly, less than 55 %"
    return ""


def _after(links: list[Link]) -> str:
    if not links:
        return "from the base"
    return "after " + ", ".join(f"{link.stage} {link.sha256[:12]}" for link in links)
