"""A result in Cog's form: the files, the contract of `cog run`, and Cog's own server from PyPI."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from aiohttp.test_utils import TestClient, TestServer
from machine import free_port

from trainer.practice.model import HERE as PRACTICE
from trainer.result import cog
from trainer.result.export import ExportSettings, export
from trainer.serve.cog import CogAnswers, WrongInput, application, read_input

QUESTION = {"prompt": "里奥是什么动物？", "max_tokens": 6}


@pytest.fixture(scope="module")
def exported(results: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cog") / "out"
    told = export(results["zh-1"], PRACTICE, out, ExportSettings("cog", "tea"))
    assert all("cog run tea -i prompt=hello" in command for command in told["commands"])
    return out


@pytest.fixture(scope="module")
def answers(exported: Path) -> CogAnswers:
    return CogAnswers(exported / "result", exported / "base", "cpu")


def test_the_folder_holds_all_that_an_image_needs(exported: Path) -> None:
    told = yaml.safe_load((exported / "cog.yaml").read_text("utf-8"))
    assert told == cog.config() and (exported / told["run"].split(":")[0]).is_file()
    assert {p.name for p in (exported / "base").iterdir()} >= {"config.json", "model.safetensors"}
    assert (exported / "result/adapter_model.safetensors").is_file()
    assert (exported / "trainer/serve/cog.py").is_file()
    pins = (exported / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+\S*", pin) for pin in pins) and len(pins) > 9
    assert json.loads((exported / ".cog/openapi_schema.json").read_text()) == cog.schema()


def test_run_py_takes_the_inputs_of_the_schema_and_hands_all_of_them_on(exported: Path) -> None:
    [runner] = [
        n for n in ast.parse((exported / "run.py").read_text()).body if isinstance(n, ast.ClassDef)
    ]
    run = next(n for n in runner.body if isinstance(n, ast.FunctionDef) and n.name == "run")
    names = [a.arg for a in run.args.args[1:]]
    told = cog.schema()["components"]["schemas"]["Input"]
    assert names == list(told["properties"]) and told["required"] == ["prompt"]
    calls = (node for node in ast.walk(run.body[0]) if isinstance(node, ast.Call))
    handed = {k.arg: ast.unparse(k.value) for k in next(calls).keywords}
    assert handed == {name: name for name in names}


def test_the_image_s_labels_survive_a_dockerfile_s_quoting(exported: Path) -> None:
    text = (exported / "Dockerfile").read_text()
    labels = dict(re.findall(r'(run\.cog\.\w+)="((?:\\.|[^"\\])*)"', text))
    plain = {name: re.sub(r"\\(.)", r"\1", value) for name, value in labels.items()}
    assert json.loads(plain["run.cog.config"]) == cog.config()
    assert json.loads(plain["run.cog.openapi_schema"]) == cog.schema()
    assert not re.search(r"(?<!\\)\$(?!\{IMAGE\})", text), "Docker would put a variable there"
    command = json.loads(text.split("CMD ")[1])
    assert command[:3] == ["python", "-m", "trainer.serve.cog"]


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x", "seed": True}, "seed"),
        ({"prompt": "x", "seed": 1.5}, "seed"),
        ({"prompt": "x", "base": 1}, "base"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "image": "y"}, "image"),
        ({"prompt": "x", "seed": "1.5"}, "seed"),
        ({"prompt": "x", "max_tokens": "0"}, "max_tokens"),
        ({"prompt": "x", "top_p": "nan"}, "top_p"),
        ({"prompt": "x", "base": "perhaps"}, "base"),
    ],
)
def test_an_input_that_is_none_is_named_by_its_place(given: Any, place: str) -> None:
    with pytest.raises(WrongInput) as wrong:
        read_input({"input": given})
    assert wrong.value.faults[0]["loc"] == ["body", "input", place]
    for body in (None, [], {}, {"input": []}):
        with pytest.raises(WrongInput):
            read_input(body)
    assert read_input({"input": {"prompt": "x", "temperature": 1}})["temperature"] == 1.0


def test_numbers_that_cog_s_command_sends_as_texts_are_read_by_the_schema() -> None:
    # pkg/predict/input.go of older versions sends whatever stands after -i NAME= as a text
    said = {"prompt": "7", "max_tokens": "6", "temperature": "0.5", "top_p": "1", "base": "true"}
    found = read_input({"input": said})
    assert found == said | {"max_tokens": 6, "temperature": 0.5, "top_p": 1.0, "base": True}


async def asked(answers: CogAnswers) -> dict[str, Any]:
    """The requests of `cog run IMAGE -i prompt=...`, in its order, and some that it never makes."""
    async with TestClient(TestServer(application(answers))) as client:
        found: dict[str, Any] = {}
        found["health"] = await (await client.get("/health-check")).json()
        found["schema"] = await (await client.get("/openapi.json")).json()
        body = {"input": QUESTION}
        found["answer"] = await (await client.post("/predictions", json=body)).json()
        found["put"] = await (await client.put("/predictions/p1", json=body)).json()
        base = {"input": QUESTION | {"base": True}}
        found["base"] = await (await client.post("/predictions", json=base)).json()
        wrong = await client.post("/predictions", json={"input": {"prompt": 7}})
        found["wrong"] = wrong.status, await wrong.json()
        found["broken"] = (await client.post("/predictions", data=b"{")).status
        return found


def test_what_cog_asks_of_an_image_is_answered(answers: CogAnswers) -> None:
    import asyncio

    found = asyncio.run(asked(answers))
    assert found["health"]["status"] == "READY" and found["schema"] == cog.schema()
    answer = found["answer"]
    assert answer["status"] == "succeeded" and answer["error"] is None
    assert "".join(answer["output"]) == "".join(answers.pieces(**QUESTION))
    assert found["put"]["id"] == "p1" and found["put"]["output"] == answer["output"]
    assert found["base"]["status"] == "succeeded" and found["base"]["output"] != answer["output"]
    assert found["wrong"][0] == 422
    assert found["wrong"][1]["detail"][0]["loc"] == ["body", "input", "prompt"]
    assert found["broken"] == 422


@pytest.mark.slow
def test_cog_s_own_server_answers_as_ours_does(
    exported: Path, answers: CogAnswers, tmp_path: Path
) -> None:
    """The `coglet` of PyPI, on the exported run.py; torch is that of this environment."""
    place = tmp_path / "cog"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin/python"
    got = subprocess.run([python, "-m", "pip", "install", "-q", "cog==0.23.1"], check=False)
    if got.returncode:
        pytest.skip("cog cannot be had from an index here")
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    theirs = next((place / "lib").glob("python3*/site-packages"))
    (theirs / "ours.pth").write_text(ours + "\n")
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "COG_PREDICT_TYPE_STUB": "run.py:Runner",
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", "cog.server.http", "--host", "127.0.0.1"]
    print(shlex.join(map(str, command)))
    server = subprocess.Popen(command, cwd=exported, env=env)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                health = requests.get(f"{url}/health-check", timeout=5).json()
            except requests.ConnectionError:
                health = {}
            if health.get("status") == "READY":
                break
            assert health.get("status") != "SETUP_FAILED", health
            assert time.monotonic() < until, health
            time.sleep(0.3)
        answer = requests.post(f"{url}/predictions", json={"input": QUESTION}, timeout=60).json()
        assert answer["status"] == "succeeded", answer
        assert "".join(answer["output"]) == "".join(answers.pieces(**QUESTION))
        wrong = requests.post(f"{url}/predictions", json={"input": {"prompt": 7}}, timeout=60)
        assert wrong.status_code == 422, wrong.text
        told = requests.get(f"{url}/openapi.json", timeout=5).json()
        assert set(told["components"]["schemas"]["Input"]["properties"]) == {
            field.name for field in cog.FIELDS
        }
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
