"""Find what can fail before anything is spent: in the job (ops/job/planner.py), its image, the key
and the credit."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ops.errors import NoAnswer, PreflightError, Refused
from ops.job.plan import Plan
from trainer.wire.job import WIRE

IMAGES = Path(__file__).parents[2] / "images"
LAST_OF_WIRE_1 = 2  # the last tag of the images of milktea 0.1
MIN_SHARDED_TORCH = (2, 11)  # the oldest on which full training over several GPUs was run

if TYPE_CHECKING:
    from ops.market.client import Vast


def preflight(make_plan: Callable[[], Plan], vast: Vast, root: Path) -> Plan:
    """The plan that `make_plan` makes in `root`. Raises PreflightError or ConfigError for what it
    finds, and for an image whose trainer speaks another wire, a key that does not work, or no
    credit; the run's folder is removed then."""
    try:
        credit = vast.credit_usd()
    except Refused as e:
        raise PreflightError(str(e), hint=e.hint) from e
    except NoAnswer as e:
        raise PreflightError(
            f"vast.ai cannot be reached: {e}",
            hint="check the network, and VAST_URL where it is set; nothing was rented",
        ) from e
    plan = make_plan()
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
    """Compare one of our own images with the job: images/*.toml says which wire its trainer speaks
    and which torch it has. An image of milktea 0.1 is recognised by its tag."""
    if not IMAGES.is_dir():  # an installed milktea has no images/
        if plan.trainer != "push":
            plan.notes.append(
                f"whether the trainer in {plan.image} speaks wire {WIRE} is not known here: that "
                "stands in images/ of milktea's checkout"
            )
        return
    name, _, tag = plan.image.partition("@")[0].rpartition("/")[2].partition(":")
    file = IMAGES / f"{name}.toml"
    if not file.is_file():
        return
    definition = tomllib.loads(file.read_text("utf-8"))
    _validate_torch(plan, name, definition["python"]["requirements"])
    wire = 1 if tag.isdigit() and int(tag) <= LAST_OF_WIRE_1 else definition["wire"]
    if plan.trainer != "push" and wire != WIRE:
        raise PreflightError(
            f"the trainer in image {plan.image} speaks wire {wire}, this milktea speaks {WIRE}: "
            "they would not understand each other",
            hint=f"set image.ref to {name}:{definition['version']} where you pull it from (`make "
            f'image IMAGE={name}` builds it), or set image.trainer = "push"',
        )


def _validate_torch(plan: Plan, name: str, requirements: list[str]) -> None:
    """Raises PreflightError for full training over several GPUs with a torch that cannot write
    sharded checkpoints; trainer/loop/sharded.py would raise on the box."""
    version = next(r.partition("==")[2] for r in requirements if r.startswith("torch=="))
    major, minor = (int(n) for n in version.split(".")[:2])
    sharded = plan.wire_job["training"]["method"] == "full" and plan.needs.num_gpus > 1
    if sharded and (major, minor) < MIN_SHARDED_TORCH:
        raise PreflightError(
            f"image {name} has torch {version}, which cannot train a whole model over "
            f"{plan.needs.num_gpus} GPUs",
            hint='take image train-cu130, one GPU, or training.method = "lora"',
        )
