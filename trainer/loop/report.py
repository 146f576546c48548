"""What people look at: TensorBoard (always), Weights & Biases (when configured), a loss curve as
PNG and a one-page HTML report."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from trainer.wire.job import Job


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


def smooth(losses: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, without the pull towards zero at the start."""
    smoothed, average = [], 0.0
    for i, loss in enumerate(losses, 1):
        average = weight * average + (1 - weight) * loss
        smoothed.append(average / (1 - weight**i))
    return smoothed


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


def page(
    job: Job,
    facts: dict[str, Any],
    samples: Sequence[dict[str, str]],
    score: tuple[float, float] | None,
    png: bytes,
) -> bytes:
    """One HTML file with everything in it."""
    told = {
        "base model": job.model.base,
        "method": f"{job.training.method}, {job.model.precision}",
        "steps": f"{facts['steps']} of {job.training.batch_size} rows",
        "loss": f"{facts['curve'][0][1]:.4f} at first, {facts['final_loss']:.4f} at last",
        "prompt template": f"{facts['template']['name']} ({facts['template']['token_hash'][:12]})",
        "data": ", ".join(f"{f.name} ({f.sha256[:12]})" for f in job.data.files),
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
        "kernels": ", ".join(f"{k}: {v}" for k, v in facts["kernels"].items()) or "plain torch",
    }
    if score is not None:
        told["held-out exact match"] = f"{score[0]:.1%} before, {score[1]:.1%} after"
    facts_table = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in told.items())
    names = ("prompt", "expected", "before", "after")
    answers = "".join(
        "<tr>" + "".join(f"<td>{html.escape(s.get(n, ''))}" for n in names) for s in samples
    )
    table = (
        "<h2>Held-out "
        f"questions</h2><table><tr><th>asked<th>expected<th>before<th>after{answers}</table>"
        if samples
        else ""
    )
    picture = base64.b64encode(png).decode()
    settings = html.escape(json.dumps(job.model_dump(include={"lora", "training"}), indent=1))
    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em "
        "auto;color:#2b1d12}td,th{text-align:left;padding:.2em 1em .2em 0;vertical-align:top}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(job.run_id)}</title>'
        f"<style>{style}</style><h1>{html.escape(job.run_id)}</h1>"
        f'<table>{facts_table}</table><img alt="loss curve" '
        f'src="data:image/png;base64,{picture}" width="900">{table}'
        f"<h2>Settings</h2><pre>{settings}</pre>"
    ).encode()
