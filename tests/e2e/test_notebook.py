"""jobs/notebook.ipynb, cell by cell, in a kernel of Jupyter: `pip install ipykernel` beside the
rest, or it is skipped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from machine import NOT_HERE

JOBS = Path(__file__).parents[2] / "jobs"
CELL_S = 900


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs_in_a_kernel_and_shows_its_progress_as_plain_lines(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ipykernel", reason=f"ipykernel: {NOT_HERE}")
    from jupyter_client.manager import start_new_kernel

    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST_")}
    env |= {"MILKTEA_RUNS": str(tmp_path / "runs"), "MILKTEA_EMULATOR": str(tmp_path / "emulator")}
    env["PYTHONPATH"] = os.pathsep.join([str(JOBS.parent), *filter(None, [env.get("PYTHONPATH")])])
    cells = json.loads((JOBS / "notebook.ipynb").read_text("utf-8"))["cells"]
    said: list[str] = []
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(JOBS), env=env)
    try:

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                said[-1] += message["content"]["text"]

        for cell in cells:
            if cell["cell_type"] == "code":
                said.append("")
                source = "".join(cell["source"])
                told = client.execute_interactive(source, timeout=CELL_S, output_hook=hear)
                assert told["content"]["status"] == "ok", (told["content"], said)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
        server = tmp_path / "emulator/server.json"
        if server.is_file():
            os.kill(json.loads(server.read_text())["pid"], signal.SIGTERM)
    _, plan, run, came, answer = said
    assert "$" in plan
    lines = run.splitlines()
    assert 10 < len(lines) < 40 and lines[-1].startswith("destroy"), run
    assert any(line.startswith("step ") and "loss" in line for line in lines), run
    assert "\r" not in run and "\x1b" not in run, "a line is never written over"
    assert "adapter.zip" in came and any("\u4e00" <= letter <= "\u9fff" for letter in answer)
