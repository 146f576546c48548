"""jobs/insurance.py and jobs/gpt2_pb2e.py on the practice model: declared, trained, talked to."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import milktea

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["gpt2_pb2e", "insurance"])
def test_a_declared_job_trains_here_and_its_result_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        "MILKTEA_RUNS": str(tmp_path / "runs"),
        "MILKTEA_EMULATOR": str(tmp_path / "emulator"),
        "VAST_API_KEY": "never used",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    spec = spec_from_file_location(name, ROOT / f"jobs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    beside = {"gpt2_pb2e": tmp_path / "template", "insurance": ROOT / "jobs/practice/held_out.json"}
    job = module.job(
        ROOT / "jobs/practice/train.json",
        beside[name],
        model={"base": str(ROOT / "trainer/practice/practice_model"), "precision": "fp32"},
        image={"ref": "milktea/practice:3", "trainer": "image", "size_gib": 0.31},
        training={"method": "lora", "learning_rate": 3e-3, "save_every_s": 5},
        data={"max_length": 192},
        gpu=(),
        timeout="30m",
    )
    try:
        result = job.remote(where="here", detach=True)
        assert milktea.Result.of(result.id).wait().adapter is not None
        assert result.usd > 0 and result.held_out is not None and result.held_out < 1.0
        row = json.loads((ROOT / "jobs/practice/held_out.json").read_text())[0]
        asked = "\n\n".join(filter(None, [row["instruction"], row["input"]]))
        with result.chat(device="cpu") as chat:
            pieces = list(chat.stream(asked, max_tokens=40))
            assert any("\u4e00" <= letter <= "\u9fff" for letter in "".join(pieces)), pieces
            assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
        assert job.volume.files().keys() >= {f"{result.id}/adapter.zip"}
    finally:
        server = tmp_path / "emulator/server.json"
        if server.is_file():
            os.kill(json.loads(server.read_text())["pid"], signal.SIGTERM)
