"""The command line of the server: what it refuses, and what it says once it listens."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from trainer.practice.model import HERE as PRACTICE
from trainer.serve.server import is_of_this_server, named, parse, token_of

ROOT = Path(__file__).parents[3]


def test_no_address_beyond_this_computer_without_a_token_of_one_s_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "box.example"):
        with pytest.raises(SystemExit):
            parse(["--base", "b", "--host", host, "a=b"])
        assert "--token-file" in capsys.readouterr().err
        assert parse(["--base", "b", "--host", host, "--token-file", "f"]).host == host
    assert parse(["--base", "b"]).host == "127.0.0.1"


def test_a_token_is_long_and_new_or_the_user_s(tmp_path: Path) -> None:
    assert len(token_of(None)) == 43 and token_of(None) != token_of(None)
    (tmp_path / "token").write_text("abcdefghijklmnop\nmore")
    assert token_of(tmp_path / "token") == "abcdefghijklmnop"
    for short in ("", "\n", "short", "口令口令口令口令口令口令口令口令"):
        (tmp_path / "token").write_text(short)
        with pytest.raises(ValueError, match="no token of 16"):
            token_of(tmp_path / "token")


def test_results_are_called_as_they_are_named_or_as_their_folder(tmp_path: Path) -> None:
    (tmp_path / "my-run" / "result").mkdir(parents=True)
    zipped = tmp_path / "my-run" / "result" / "adapter.zip"
    zipped.touch()
    assert list(named([f"mine={zipped}", str(zipped)])) == ["mine", "my-run"]
    with pytest.raises(ValueError, match="two results are called my-run"):
        named([str(zipped), str(tmp_path / "my-run")])


@pytest.mark.slow
def test_it_may_be_interrupted_while_it_loads() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.serve.server", "--base", str(PRACTICE), "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None and process.stderr.readline().startswith("loading ")
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and told.strip() == "interrupted"


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_end(results: dict[str, Path], tmp_path: Path) -> None:
    words = ["--base", str(PRACTICE), "--port", "0", "--json", "--feedback", str(tmp_path)]
    words += ["--address", str(tmp_path / "address"), "--meter", str(tmp_path / "meter")]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.serve.server", *words, f"mine={results['zh-1']}"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    told = json.loads(process.stdout.readline())
    assert told["models"] == ["mine", "base"] and told["page"].endswith("/#" + told["token"])
    assert json.loads((tmp_path / "address").read_text()) == told
    key = {"Authorization": f"Bearer {told['token']}"}
    url = told["api"].removesuffix("/v1")
    assert requests.get(f"{url}/meter", headers=key, timeout=60).json() is None
    costs = {"usd": 0.5, "usd_per_hour": 0.0, "max_usd": 1.0, "ends_in_s": 60.0}
    (tmp_path / "meter").write_text(json.dumps(costs))
    assert requests.get(f"{url}/meter", headers=key, timeout=60).json()["usd"] == 0.5
    body = {"model": "mine", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    answer = requests.post(f"{told['api']}/chat/completions", json=body, headers=key, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] <= 3
    with requests.get(told["page"], timeout=60) as page:
        assert page.text.startswith("<!doctype html>")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.stdout.close()


def test_what_strangers_send_that_is_no_http_is_not_in_the_log() -> None:
    def line(error: Exception) -> logging.LogRecord:
        told = (type(error), error, None)
        return logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "failed", None, told)

    assert not is_of_this_server(line(BadHttpMessage("a TLS greeting")))
    assert not is_of_this_server(line(web.RequestPayloadError("no gzip")))
    assert is_of_this_server(line(RuntimeError("our own fault")))
