"""The trainer's own modules, as processes: what needs torch is not imported here.

A `Word` is one command line. `show` gives it this terminal; `tell` asks it for JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.errors import PreflightError
from ops.use.found import Found

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Word:
    """A module of the trainer with its arguments."""

    module: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments]


def merge(
    found: Found, dtype: str = "bf16", to: Path | None = None, data: Path | None = None
) -> Word:
    """The base with the adapter in it, in the new folder `to`; the certificate is of the rows of
    `data`, or of the job's held-out ones, beside general texts."""
    out = to or found.beside / f"merged-{dtype}"
    more = _rows(found, data)
    if found.precision:
        more += ["--trained-in", found.precision]
    return Word(
        "trainer.result.merge",
        (str(found.adapter), *_base(found), "--out", str(out), "--dtype", dtype, *more),
    )


def evaluate(
    found: Found,
    data: Path | None = None,
    against: Found | None = None,
    rows: int | None = None,
    new_tokens: int | None = None,
    to: Path | None = None,
    precision: str | None = None,
) -> Word:
    """Scores on the rows of `data`, or on the job's held-out ones, beside those of the base or of
    another result; `precision` as of `chat`. Raises PreflightError where nobody says on which
    rows."""
    more = _rows(found, data)
    if not more:
        raise PreflightError(
            f"{found.name} has no held-out rows here",
            hint="--data FILE: rows with answers, or questions with options A to D",
        )
    if against is not None:
        more += ["--against", str(against.adapter), "--against-base", against.needs_base().base]
    given = {"rows": rows, "new-tokens": new_tokens, "to": to, "precision": precision}
    for option, value in given.items():
        more += [f"--{option}", str(value)] if value is not None else []
    return Word("trainer.eval.score", (str(found.adapter), *_base(found), *more))


def serve(results: Sequence[Found], options: Sequence[str] = ()) -> Word:
    """OpenAI's interface and a page over results on one base, until Ctrl-C. `options` are those of
    trainer.serve.server. Raises PreflightError where they have several bases or one name."""
    bases = {found.needs_base().base for found in results}
    if len(bases) > 1:
        raise PreflightError(
            f"these results have {len(bases)} bases: {', '.join(sorted(bases))}",
            hint="serve those of one base; a second `milktea serve` may stand beside it",
        )
    if len({found.name for found in results}) < len(results):
        raise PreflightError("two of these results have one name", hint="copy one to another name")
    more = ["--base", *bases, "--feedback", str(results[0].beside), *options]
    named = [f"{found.name}={found.adapter}" for found in results]
    return Word("trainer.serve.server", (*more, *named))


def _rows(found: Found, data: Path | None) -> list[str]:
    """The rows of `data`, else the job's held-out ones, as words of a command; none without any."""
    if (file := data or found.held_out) is None:
        return []
    return ["--data", str(file), *(["--job", str(found.job)] if found.job else [])]


def chat(found: Found, options: Sequence[str] = ()) -> Word:
    """A conversation, or one answer; `options` are those of trainer/serve/chat.py."""
    return Word("trainer.serve.chat", (str(found.adapter), *_base(found), *options))


def check(found: Found) -> Word:
    """Which programs load the adapter, and how."""
    known = ("--base", found.base) if (Path(found.base) / "config.json").is_file() else ()
    return Word("trainer.result.engines", (str(found.adapter), *known))


def export(found: Found, target: str, to: Path | None = None, options: Sequence[str] = ()) -> Word:
    """The result as `target` takes it, in the new folder `to`; `options` are those of
    trainer/result/export.py."""
    out = to or found.beside / f"for-{target}"
    return Word(
        "trainer.result.export",
        (str(found.adapter), *_base(found), "--for", target, "--out", str(out), *options),
    )


def combine(parts: Sequence[tuple[Found, float]], to: Path, rank: int | None = None) -> Word:
    """The weighted sum of adapters of one base, in the new archive or folder `to`."""
    named = [f"{found.adapter}={weight!r}" for found, weight in parts]
    cut = ["--rank", str(rank)] if rank is not None else []
    return Word("trainer.result.combine", (*named, "--out", str(to), *cut))


def _base(found: Found) -> Sequence[str]:
    return ["--base", found.needs_base().base]


def show(word: Word, as_json: bool = False) -> int:
    """Runs it on this terminal and returns its exit code. It handles Ctrl-C itself."""
    command = [*word.command, *(["--json"] if as_json else [])]
    with _carried_signals() as carry:
        return carry(subprocess.Popen(command, env=environment()))[0]


def tell(word: Word) -> dict[str, Any]:
    """Its answer, parsed from JSON; its progress goes to stderr. Raises PreflightError where
    it refuses."""
    command = [*word.command, "--json"]
    with _carried_signals() as carry:
        code, said = carry(subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE))
    lines = said.decode("utf-8", "replace").strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise PreflightError(
            f"{word.module} ended with {code} and no answer",
            hint="what it said stands above",
        ) from error
    if "refused" in answer:
        raise PreflightError(answer["refused"], hint=answer.get("hint", ""))
    return answer


@contextmanager
def _carried_signals() -> Iterator[Callable[[subprocess.Popen[bytes]], tuple[int, bytes]]]:
    """Gives a function that waits for a process and returns its exit code and what it wrote to a
    pipe. SIGINT is the process's own to hear; SIGTERM and SIGHUP of this one end it as well."""
    running: list[subprocess.Popen[bytes]] = []
    heard: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        heard.append(number)
        for child in running:
            child.terminate()

    def wait(child: subprocess.Popen[bytes]) -> tuple[int, bytes]:
        running.append(child)
        if heard:  # while the process was started
            child.terminate()
        said, _ = child.communicate()
        return child.returncode, said or b""

    if threading.current_thread() is not threading.main_thread():
        yield wait
        return
    # a handler, unlike SIG_IGN, is not inherited
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: pass_on, signal.SIGHUP: pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment() -> dict[str, str]:
    """An environment with the trainer of this milktea, whatever the working folder holds."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
