"""The [notify] section of a job: who is told of what, and what the plan says about it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ops.errors import PreflightError
from trainer.wire.job import EnvironmentName, Strict

Event = Literal["done", "failed", "budget", "outbid", "leaked"]
EVENTS: tuple[Event, ...] = ("done", "failed", "budget", "outbid", "leaked")
BUDGET_SHARE = 0.8  # of limits.max_usd, at which `budget` is told


class Notify(Strict):
    """Who is told; this desktop too, where notify-send is. No message has a text of a machine or a
    row of data."""

    url: Annotated[
        str | None, Field(description="A webhook (JSON by POST) or an ntfy topic; https or http")
    ] = None
    format: Annotated[
        Literal["auto", "json", "ntfy"],
        Field(description="auto: ntfy where the host is ntfy.sh or ntfy.SOMETHING, else json"),
    ] = "auto"
    token: Annotated[
        EnvironmentName | None,
        Field(description="Variable here whose value goes with it: Authorization: Bearer VALUE"),
    ] = None
    command: Annotated[
        str | None,
        Field(description="A program here with its arguments; it gets the JSON on its stdin"),
    ] = None
    on: Annotated[list[Event], Field(min_length=1, description="Of what is told")] = list(EVENTS)

    @field_validator("url")
    @classmethod
    def _sound(cls, url: str | None) -> str | None:
        """Messages do not repeat the address: who knows a topic's can read it."""
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound, parts = False, urlsplit("")
        if not sound or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
            raise ValueError("no address of the kind https://HOST/PATH")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a password in the address: name a variable in notify.token")
        if parts.fragment:
            raise ValueError("what stands behind # is never sent")
        return url

    @field_validator("command")
    @classmethod
    def _words(cls, command: str | None) -> str | None:
        try:
            if command is not None and not shlex.split(command):
                raise ValueError("it names no program")
        except ValueError as e:
            raise ValueError(f"cannot be split into words: {e}") from e
        return command

    @model_validator(mode="after")
    def _token_needs_url(self) -> Notify:
        if self.token is not None and self.url is None:
            raise ValueError("token goes with url, and there is none")
        return self

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command or "")

    @property
    def is_ntfy(self) -> bool:
        host = urlsplit(self.url or "").hostname or ""
        return self.format == "ntfy" or (self.format == "auto" and host.startswith("ntfy."))

    def relative_to(self, folder: Path) -> Notify:
        """With a program that is named by a relative path (./tell.sh) found from `folder`."""
        words = self.words
        if not words or "/" not in words[0]:
            return self
        program = (folder / Path(words[0]).expanduser()).resolve()
        return self.model_copy(update={"command": shlex.join([str(program), *words[1:]])})


def describe(notify: Notify | None, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the plan says about it; hosts only, no whole address. Raises PreflightError for a
    program that is not there, or a variable that is not set."""
    if notify is None:
        return []
    ways = []
    if notify.url is not None:
        parts = urlsplit(notify.url)
        kind = "ntfy at" if notify.is_ntfy else "a webhook at"
        bare = parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1")
        ways.append(f"{kind} {parts.hostname}{' (not encrypted)' if bare else ''}")
    if notify.token is not None and not environ.get(notify.token, "").strip():
        raise PreflightError(
            f"{notify.token} is named in notify.token and not set here",
            hint="export it in this terminal and run this again, or take it out of the job file",
        )
    if words := notify.words:
        if shutil.which(words[0]) is None:
            raise PreflightError(
                f"notify.command: there is no program {words[0]!r} on this machine",
                hint="name it by its path, relative to the job file, or make it executable",
            )
        ways.append(Path(words[0]).name)
    if shutil.which("notify-send"):
        ways.append("this desktop")
    if not ways:
        return ["notify: nobody is told, since it has no url, no command, and no notify-send"]
    return [f"notify: {', '.join(ways)} hear of {', '.join(dict.fromkeys(notify.on))}"]
