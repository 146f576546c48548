"""Runs side by side, from their folders alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

import milktea
import rig
from ops.cli.app import app
from ops.errors import JournalError
from ops.run.journal import Journal


def ended(own: rig.Rig, name: str, rate: float, losses: list[float], **training: Any) -> str:
    """A run of two steps that looked at its held-out rows before, between and after them."""
    plan = own.plan()
    plan = own.plan(run_id=f"{name}{plan.run_id}")
    plan.wire_job["run_id"] = plan.run_id
    plan.wire_job["training"] |= {"learning_rate": rate, **training}
    with Journal(own.runs / plan.run_id) as journal:
        journal.append("planned", **plan.to_line())
    rows: list[dict[str, Any]] = [{"event": "started", "total_steps": 2}]
    for step, loss in enumerate(losses):
        if step:
            fields = {"learning_rate": rate, "grad_norm": 1.0, "tokens_per_second": 1000.0 * step}
            rows.append({"event": "step", "step": step, "loss": 2 * loss, **fields})
        rows.append(
            {"event": "held_out", "step": step, "rows": 9, "loss": loss, "accuracy": 1 / (1 + loss)}
        )
    text = "".join(json.dumps({"t": 1.0, **row}) + "\n" for row in rows)
    (own.runs / plan.run_id / "events.jsonl").write_text(text)
    return plan.run_id


def test_only_what_differs_is_told_beside_where_the_curves_ended(own: rig.Rig) -> None:
    names = [ended(own, "a", 1e-4, [3.0, 2.0, 1.5]), ended(own, "b", 2e-4, [3.0, 1.25, 1.75])]
    found = milktea.compare(names, root=own.runs)
    assert found.differ == {"training.learning_rate": [1e-4, 2e-4]}
    first, second = found.outcomes
    assert (first.held_out_before, first.held_out, second.held_out) == (3.0, 1.5, 1.75)
    assert (first.loss_first, first.loss_last, first.steps) == (4.0, 3.0, 2)
    assert first.tokens_per_second == 1500.0 and first.adapter is None and first.spent_usd == 0


def test_a_run_that_keeps_its_best_parameters_is_told_by_their_loss(own: rig.Rig) -> None:
    best = ended(own, "b", 2e-4, [3.0, 1.25, 1.75], load_best_model_at_end=True)
    assert milktea.compare([best], root=own.runs).outcomes[0].held_out == 1.25


def test_the_command_prints_a_column_for_each_run(
    own: rig.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILKTEA_RUNS", str(own.runs))
    names = [ended(own, "a", 1e-4, [3.0, 2.0, 1.5]), ended(own, "b", 2e-4, [3.0, 1.25, 1.75])]
    shown = CliRunner().invoke(app, ["compare", *names])
    lines = {line.split("  ")[0]: line.split() for line in shown.stdout.splitlines()}
    assert shown.exit_code == 0 and shown.stdout.splitlines()[0].split() == names
    assert lines["training.learning_rate"][-2:] == ["0.0001", "0.0002"]
    assert lines["held-out loss"][-2:] == ["1.5000", "1.7500"] and "GPU" not in lines
    told = json.loads(CliRunner().invoke(app, ["compare", *names, "--json"]).stdout)
    assert [run["held_out"] for run in told["runs"]] == [1.5, 1.75] and list(told["differ"])
    alone = CliRunner().invoke(app, ["compare", names[0]])
    assert alone.exit_code == 2 and "compared with nothing" in alone.stderr


def test_what_is_no_run_is_refused_by_its_name(own: rig.Rig) -> None:
    with pytest.raises(JournalError, match="names 0 runs"):
        milktea.compare([ended(own, "a", 1e-4, [3.0]), "nothing"], root=own.runs)
