"""What a server has, from the JSON of ``sh INSTALL.sh preflight --json`` carried home: the next bundle holds the rest."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ops.errors import ConfigError
from ops.image import driver


class Lenient(BaseModel):
    """A server may run a newer INSTALL.sh that knows more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Gpu(Lenient):
    name: str
    driver: str
    capability: str


class Present(Lenient):
    """One image on the server; ``layers`` are its DiffIDs from the bottom up."""

    ref: str
    layers: list[str]


class Inventory(Lenient):
    milktea_preflight: int
    server: str
    engine: str
    store: str = ""
    gpus: list[Gpu] = []
    images: list[Present] = []
    models: list[str] = []
    kept: list[str] = []

    def base_for(self, diff_ids: list[str]) -> Present | None:
        """The image that shares the longest run of lowest layers with `diff_ids`, or the most layers at all; None if none does."""
        best = max(self.images, key=lambda image: (shared_prefix(image.layers, diff_ids), len({*image.layers} & {*diff_ids})), default=None)
        return best if best and {*best.layers} & {*diff_ids} else None

    def lines_that_fit(self, lines: list[driver.Line]) -> list[str]:
        """The image lines that every GPU of the server runs as it is. A GPU that nvidia-smi did not describe fits none."""
        known = [g for g in self.gpus if g.capability != "?"]
        if not known or len(known) < len(self.gpus):
            return []
        return [x.name for x in lines if x.cuda and all(driver.judge(g.driver, g.capability, driver.is_data_center(g.name), x).runs for g in known)]


def read(path: Path) -> Inventory:
    """Raises ConfigError that says what the file is not."""
    try:
        return Inventory.model_validate(json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", hint="on the server: sh INSTALL.sh preflight --json > server.json") from error
    except (ValidationError, ValueError) as error:
        raise ConfigError(
            f"{path} is not the JSON of a preflight: {error}", hint="on the server: sh INSTALL.sh preflight --json > server.json"
        ) from error


def shared_prefix(a: list[str], b: list[str]) -> int:
    """How many leading items two lists share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
