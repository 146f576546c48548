"""Tasks for SkyPilot and dstack. Where MILKTEA_ENGINES names a Python that has both
(tests/engines_oracle.py), they read them by their own models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import milktea
import rig
from ops.errors import ConfigError
from trainer.wire.job import Job

HERE = Path(__file__).parent
FILES = {"skypilot": "task.yaml", "dstack": "task.dstack.yml"}


def exported(kind: Any, folder: Path, **more: Any) -> tuple[Path, dict[str, Any]]:
    """(the folder, the task that was written into it)."""
    base = folder / "base"
    own = rig.Rig(folder)
    job = milktea.Job(
        "tea",
        model={"base": str(base if base.is_dir() else rig.tiny_model(base)), "precision": "fp32"},
        data=own.data,
        timeout="2h",
        max_usd=1,
        image={"ref": "milktea/train-cu130:3", "trainer": "image"},
        **more,
    )
    written = job.export(kind, folder / "out")
    assert written[0].name == "README.md" and all(path.is_file() for path in written)
    told: dict[str, Any] = yaml.safe_load((written[0].parent / FILES[kind]).read_text())
    return written[0].parent, told


def test_skypilot_gets_the_image_the_cards_and_a_machine_that_goes(tmp_path: Path) -> None:
    folder, task = exported("skypilot", tmp_path, gpu=["RTX 4090", "RTX 4000Ada"])
    assert Job.model_validate_json((folder / "job.json").read_bytes()).run_id == "tea-skypilot"
    resources = task["resources"]
    assert resources["image_id"] == "docker:milktea/train-cu130:3"
    assert resources["accelerators"] == {"RTX4090": 1, "RTX4000-Ada": 1}
    assert resources["autostop"] == {"idle_minutes": 60, "down": True}
    assert task["run"] == "timeout --kill-after=120 7200 milktea-train job.json\n"
    assert f"sky launch -c {task['name']} task.yaml" in (folder / "README.md").read_text()
    _, any_card = exported("skypilot", tmp_path / "any")
    assert any_card["resources"]["accelerators"].endswith("GB+:1")


def test_dstack_gets_a_task_that_waits_to_be_fetched_and_ends(tmp_path: Path) -> None:
    offer = {"max_usd_per_hour": 0.8, "type": "interruptible"}
    folder, task = exported("dstack", tmp_path, gpu=["RTX A5000:2", "H100:2"], offer=offer)
    gpu = task["resources"]["gpu"]
    assert gpu["name"] == ["A5000", "H100"] and gpu["count"] == 2
    assert (task["max_price"], task["spot_policy"]) == (0.8, "spot")
    assert task["max_duration"] == 7200 + 120 + 3600
    assert (
        task["files"] == [".:/milktea/tea-dstack"] and "cd /milktea/tea-dstack" in task["commands"]
    )
    # its commands as a shell runs them: the result is waited for, and the training's code is kept
    said = "; ".join(task["commands"][1:]).replace("milktea-train job.json", "sh -c 'exit 7'")
    (folder / "fetched").touch()
    done = subprocess.run(["sh", "-c", said], cwd=folder, timeout=30)
    assert done.returncode == 7


@pytest.mark.parametrize("kind", FILES)
def test_machines_that_share_no_folder_get_no_job_of_several(kind: Any, tmp_path: Path) -> None:
    job = milktea.Job.from_toml(HERE.parents[2] / "jobs/practice.toml")
    with pytest.raises(ConfigError, match="share no folder"):
        job.export(kind, tmp_path, nodes=2)


@pytest.mark.parametrize("kind", FILES)
def test_the_engine_itself_reads_the_task(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = os.environ.get("MILKTEA_ENGINES")
    if not python:
        pytest.skip("MILKTEA_ENGINES names no Python with SkyPilot and dstack")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    folder, task = exported(kind, tmp_path, gpu=["RTX 4090"], env=["HF_TOKEN"])
    done = subprocess.run(
        [python, str(HERE.parents[1] / "engines_oracle.py"), kind, str(folder / FILES[kind])],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HOME": str(tmp_path)},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.rsplit("READ ", 1)[1])
    assert read["name"] == task["name"] and "RTX4090" in json.dumps(read["resources"])
