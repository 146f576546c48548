"""Everything that can fail for free, before a cent is spent: the job itself (ops/planner.py), its image, the key, the credit."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from ops.errors import MilkteaError, PreflightError, Refused
from ops.plan import Plan
from trainer.job import WIRE

if TYPE_CHECKING:
    from ops.vast import Vast


def preflight(make: Callable[[], Plan], vast: Vast, root: Path) -> Plan:
    """The plan that `make` makes in `root`, or what stands against it there, or at vast.ai: an image of another wire, a key that does not work,
    no credit. Raises PreflightError or ConfigError; costs nothing, and leaves nothing."""
    try:
        credit = vast.credit_usd()
    except Refused as e:
        raise PreflightError(str(e), hint=e.hint) from e
    plan = make()
    try:
        _check_image(plan)
        if credit <= 0:
            raise PreflightError(f"the account has {credit:.2f} $ of credit", hint="add credit at https://cloud.vast.ai/billing/")
    except PreflightError:
        shutil.rmtree(root / plan.run_id)
        raise
    return plan


class Ahead:
    """A fork of this process calls `make`, on another core, while this one imports what talks to vast.ai: a third of what a user waits for
    before the search. Only Linux forks; elsewhere `make` is called when its plan is asked for."""

    def __init__(self, make: Callable[[], Plan]) -> None:
        self._make, self._pid = make, 0
        self._said: IO[bytes] | None = None
        if sys.platform != "linux":
            return
        said, tell = os.pipe()
        self._said = open(said, "rb")  # noqa: SIM115  # closed by __exit__
        self._pid = os.fork()
        if self._pid == 0:
            try:
                signal.signal(signal.SIGTERM, _stop)  # a background job of a shell ignores SIGINT
                self._said.close()
                with open(tell, "wb") as pipe:
                    pipe.write(_answer(make))
            finally:
                os._exit(0)  # whatever happened: only the parent goes on from here
        os.close(tell)

    def plan(self) -> Plan:
        """Raises what `make` raised."""
        if not self._pid or self._said is None:
            return self._make()
        said = self._said.read()
        os.waitpid(self._pid, 0)
        self._pid = 0
        if not said:  # it was killed, or raised what cannot be told: here it is raised where it can be seen
            return self._make()
        answer: Any = pickle.loads(said)
        if isinstance(answer, BaseException):
            raise answer
        plan: Plan = answer
        return plan

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGTERM)  # it cleans up
            os.waitpid(self._pid, 0)
        if self._said:
            self._said.close()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _answer(make: Callable[[], Plan]) -> bytes:
    try:
        return pickle.dumps(make())
    except MilkteaError as error:
        return pickle.dumps(error)
    except Exception as error:
        error.add_note(traceback.format_exc())  # the parent's would end at `raise answer`
        return pickle.dumps(error)


def _check_image(plan: Plan) -> None:
    """An image of ours says in images/*.toml which wire its trainer speaks."""
    if plan.trainer == "push":
        return
    folder = Path(__file__).parent.parent / "images"
    for file in sorted(folder.glob("*.toml")):
        said = tomllib.loads(file.read_text("utf-8"))
        names = (said.get("name"), said.get("image", {}).get("name") if isinstance(said.get("image"), dict) else None, file.stem)
        if plan.image.split("/")[-1].split(":")[0] in names:
            wire = said.get("wire", said.get("image", {}).get("wire") if isinstance(said.get("image"), dict) else None)
            if wire is not None and wire != WIRE:
                raise PreflightError(
                    f"image {plan.image} speaks wire {wire} ({file.name}), this milktea speaks {WIRE}",
                    hint=f'`make image IMAGE={file.stem}` builds one that fits, or set image.trainer = "push"',
                )
