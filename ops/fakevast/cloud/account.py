"""The one customer: keys, secrets, and what was spent before and by instances that are gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Account:
    """Extra API keys have the same rights; instance keys are another matter (Cloud.who)."""

    id: int = 4711  # of the key's hash in a Cloud: two emulators are two accounts
    key: str = ""
    opened_at: float = 0.0
    ssh_keys: list[dict[str, Any]] = field(default_factory=list)
    api_keys: list[dict[str, Any]] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    spent_before_usd: float = 0.0  # in earlier lives of this emulator
    closed_usd: float = 0.0  # what destroyed instances cost
    old_charges: list[dict[str, Any]] = field(default_factory=list)
    last_key_id: int = 0

    def next_key_id(self) -> int:
        """A number for an SSH key or an API key that no other key has."""
        self.last_key_id += 1
        return self.last_key_id
