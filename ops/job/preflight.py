"""Everything that can fail for free, before a cent is spent: the job itself (ops/job/planner.py),
its image, the key, the credit."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ops.errors import PreflightError, Refused
from ops.job.plan import Plan
from trainer.wire.job import WIRE

if TYPE_CHECKING:
    from ops.market.client import Vast


def preflight(make: Callable[[], Plan], vast: Vast, root: Path) -> Plan:
    """The plan that `make` makes in `root`, or what stands against it there, or at vast.ai: an
    image of another wire, a key that does not work, no credit. Raises PreflightError or
    ConfigError; costs nothing, and leaves nothing."""
    try:
        credit = vast.credit_usd()
    except Refused as e:
        raise PreflightError(str(e), hint=e.hint) from e
    plan = make()
    try:
        _validate_image(plan)
        if credit <= 0:
            raise PreflightError(
                f"the account has {credit:.2f} $ of credit",
                hint="add credit at https://cloud.vast.ai/billing/",
            )
    except PreflightError:
        shutil.rmtree(root / plan.run_id)
        raise
    return plan


def _validate_image(plan: Plan) -> None:
    """An image of ours says in images/*.toml which wire its trainer speaks."""
    if plan.trainer == "push":
        return
    folder = Path(__file__).parents[2] / "images"
    for file in sorted(folder.glob("*.toml")):
        said = tomllib.loads(file.read_text("utf-8"))
        names = (
            said.get("name"),
            said.get("image", {}).get("name") if isinstance(said.get("image"), dict) else None,
            file.stem,
        )
        if plan.image.split("/")[-1].split(":")[0] in names:
            wire = said.get(
                "wire",
                said.get("image", {}).get("wire") if isinstance(said.get("image"), dict) else None,
            )
            if wire is not None and wire != WIRE:
                raise PreflightError(
                    f"image {plan.image} speaks wire {wire} ({file.name}), this milktea "
                    f"speaks {WIRE}",
                    hint=f"`make image IMAGE={file.stem}` builds one that fits, or set "
                    'image.trainer = "push"',
                )
