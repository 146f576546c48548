"""Pure: the variations of a job that a sweep tries."""

from __future__ import annotations

import copy
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from ops.errors import ConfigError

MOST = 256  # runs of one sweep
NAME_LETTERS = 35  # of the job's name; "-" and the run's number follow


def parse_set(word: str) -> tuple[str, list[Any]]:
    """The key and the values of KEY=VALUE,VALUE. A value is read as TOML where it is TOML (a
    number, true, "a text", [a, list]), else as the text that it is. Raises ConfigError."""
    key, sign, text = word.partition("=")
    if not sign or not key.strip() or not text.strip():
        raise ConfigError(
            f"--set {word!r} is not KEY=VALUE,VALUE", hint="--set training.learning_rate=1e-4,2e-4"
        )
    try:
        values = tomllib.loads(f"values = [{text}]")["values"]
    except (ValueError, RecursionError):
        values = [_value(part) for part in text.split(",")]
    return key.strip(), values


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text.strip()


def combinations(sets: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last key's changing fastest. Raises ConfigError for a
    value that stands twice, for no values, and for more than MOST combinations."""
    for key, values in sets.items():
        if not values or any(v in values[:n] for n, v in enumerate(values)):
            raise ConfigError(f"--set {key}: {list(values)!r} is empty or has a value twice")
    found = [dict(zip(sets, values, strict=True)) for values in itertools.product(*sets.values())]
    if len(found) > MOST:
        raise ConfigError(
            f"these are {len(found):,} runs; a sweep has at most {MOST}", hint="name fewer values"
        )
    return found


def varied(raw: Mapping[str, Any], settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The job file's tables with these settings (dotted keys) in place of its own, and a name that
    ends in `number`. Raises ConfigError for a key that leads through what is no table."""
    job = copy.deepcopy(dict(raw))
    for key, value in settings.items():
        *path, name = key.split(".")
        table: Any = job
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {key}: {part} is no table of a job file")
        table[name] = value
    if isinstance(job.get("name"), str):
        job["name"] = f"{job['name'][:NAME_LETTERS]}-{number}"
    return job
