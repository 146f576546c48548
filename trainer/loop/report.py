"""What people look at: TensorBoard (always), Weights & Biases (when configured), and a loss
curve as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from trainer.wire.job import Job
from trainer.wire.page import smooth


class Boards:
    """Scalars by step to TensorBoard and, when asked for, Weights & Biases: as WANDB_MODE says,
    else online with WANDB_API_KEY, else offline into the run folder's wandb/ (`wandb sync` sends it
    later)."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._wandb: Any = None
        self.warning = ""
        if "wandb" in job.training.report_to:
            self._wandb, self.warning = _wandb_run(job, folder)

    def step(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(job: Job, folder: Path) -> tuple[Any, str]:
    try:
        import wandb
    except ImportError:
        return (
            None,
            "training.report_to names wandb, which is not installed here (pip install wandb, "
            "100 MB with what it needs): TensorBoard only",
        )
    mode = os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )
    return wandb.init(
        project="milktea",
        name=job.run_id,
        dir=str(folder),
        mode=mode,
        config=job.model_dump(exclude={"data"}),
    ), ""


def curve_png(curve: Sequence[Sequence[float]], title: str) -> bytes:
    """The loss curve as a PNG of 900 x 500 points."""
    figure = Figure(figsize=(9, 5), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [p[0] for p in curve], [p[1] for p in curve]
    axes.plot(steps, losses, color="#b9a28a", linewidth=0.8, label="loss")
    axes.plot(steps, smooth(losses), color="#6b3f1d", linewidth=1.8, label="smoothed")
    axes.set(xlabel="step", ylabel="loss per target token", title=title)
    axes.grid(alpha=0.25)
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
