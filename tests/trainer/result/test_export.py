"""Results as other programs take them: folders, commands, a Modelfile, an upload to a hub."""

from __future__ import annotations

import ast
import base64
import json
import re
import shlex
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from results import write_both, write_result
from transformers import AutoModelForCausalLM

from trainer.data.template import TemplateError, load, parse
from trainer.data.tokens import open_vocabulary
from trainer.result import export, ollama

IDS = torch.arange(3, 27)[None] * 7 % 300


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_both(tmp_path_factory.mktemp("result"))


def exported(result: tuple[Path, Path], target: str, out: Path, **more: Any) -> dict[str, Any]:
    return export.export(result[1], result[0], out, export.ExportSettings(target, "mine", **more))


def logits(folder: Path, adapter: Path | None = None, **more: Any) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    model = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
    with torch.no_grad():
        return torch.Tensor(model.eval()(IDS).logits)


def test_vllm_gets_the_adapter_the_template_and_one_command(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    told = exported(result, "vllm", tmp_path / "out")
    [command] = told["commands"]
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", str(result[0])] and "--max-lora-rank" in words
    assert f"mine={tmp_path}/out" in words
    assert Path(words[words.index("--chat-template") + 1]).is_file()
    ends = Path(words[words.index("--generation-config") + 1]) / "generation_config.json"
    assert json.loads(ends.read_bytes())["eos_token_id"] == [2]  # </s>
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_sglang_is_told_of_a_stop_token_that_the_base_does_not_have(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    assert not exported(result, "sglang", tmp_path / "same")["notes"]
    chatml = write_result(tmp_path / "chatml", result[0], "chatml")
    told = exported((result[0], chatml), "sglang", tmp_path / "out")
    assert '"stop_token_ids": [4]' in told["notes"][0]  # <|im_end|>


def test_what_an_engine_does_not_load_is_merged_for_it(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    dora = write_result(tmp_path / "dora", result[0], use_dora=True)
    told = exported((result[0], dora), "sglang", tmp_path / "out")
    assert "it is a DoRA" in told["notes"][0] and "--model-path" in told["commands"][0]
    right = logits(result[0], dora)
    assert (logits(tmp_path / "out") - right).abs().max() < 0.1 * right.std()
    assert (tmp_path / "out/certificate.json").is_file()


def test_llama_cpp_gets_one_file_that_computes_base_and_adapter(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    told = exported(result, "llama.cpp", tmp_path / "out")
    server, quantise = (shlex.split(c) for c in told["commands"])
    assert server[2] == quantise[1] == str(tmp_path / "out/mine-f16.gguf")
    assert quantise[-1] == "Q4_K_M" and "read back" in told["notes"][0]
    config = AutoModelForCausalLM.from_pretrained(result[0]).config
    found = logits(tmp_path / "out", gguf_file="mine-f16.gguf", config=config)
    right = logits(*result)
    assert (found - right).abs().max() < 0.02 * right.std()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("certificate.json", "mine-f16.gguf")
    ]


def test_ollama_gets_the_trained_template_and_its_stop(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    told = exported(result, "ollama", tmp_path / "out", kind="q8_0")
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith('FROM ./mine-q8_0.gguf\nTEMPLATE """{{-')
    assert "Below is an instruction" in text and 'PARAMETER stop "</s>"' in text
    assert told["commands"][1].startswith("ollama create --quantize q4_K_M mine -f")
    kinds = {t.tensor_type.name for t in GGUFReader(tmp_path / "out/mine-q8_0.gguf").tensors}
    assert kinds == {"F32", "Q8_0"}


@pytest.mark.parametrize("name", ["alpaca", "chatml", "vicuna", "llama2"])
def test_a_go_template_opens_and_closes_and_has_the_templates_texts(
    result: tuple[Path, Path], name: str
) -> None:
    template, vocabulary = load(name), open_vocabulary(result[0])
    text = ollama.go_template(template, vocabulary)
    opened = sum(text.count("{{- " + word) for word in ("range", "if"))
    assert opened == text.count("{{- end -}}") and text.count("{{") == text.count("}}")
    assert '"""' not in text and "{user}" not in text
    for piece in (template.user, template.assistant, template.between):
        for part in piece.replace("}", "{").split("{")[::2]:
            assert not part or ollama._string(part) in text


ODD_TEMPLATES = {
    "indented": 'user = "\\u3000\\u3000问：{user}\\n\\u00a0答："',
    "backslash": "user = 'C:\\{user}\\'",
    "quotes": 'user = \'\'\'"""{user}""" says "x"\\\'\'\'',
    "joiners": 'user = "🙂\\u200d🙂\\U000E0001{user}\\u0007\\u007f{{-}}"',
    "prefix": 'prefix = ["<|im_start|>"]\nuser = "{user}"',
}


@pytest.mark.parametrize("name", ODD_TEMPLATES)
def test_ollamas_parser_loses_no_sign_of_a_template(result: tuple[Path, Path], name: str) -> None:
    template = parse(name, ODD_TEMPLATES[name] + '\nassistant = "{assistant}"\n')
    text = ollama.go_template(template, open_vocabulary(result[0]))
    assert text.isprintable() and '"""' not in text  # what is not printed is dropped, unsaid
    strings = re.findall(r'(?<=\{\{- )"(?:[^"\\]|\\.)*"(?= -\}\})', text)
    told = [ast.literal_eval(string) for string in strings]  # Go's escapes are Python's too
    pieces = re.split(r"\{user\}|\{assistant\}", template.user + template.assistant)
    assert set(filter(None, [*pieces, *template.prefix])) <= set(told)


def test_a_template_that_counts_its_rounds_is_refused(result: tuple[Path, Path]) -> None:
    with pytest.raises(TemplateError, match="numbers its rounds"):
        ollama.go_template(load("chatglm2"), open_vocabulary(result[0]))


def test_the_command_prints_what_to_type_or_why_not(
    result: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = result
    words = [str(adapter), "--base", str(base), "--for", "vllm", "--out", str(tmp_path / "out")]
    assert export.main(words) == 0 and "  vllm serve" in capsys.readouterr().out
    assert export.main(words) == 3 and "exists: name a new" in capsys.readouterr().err
    assert export.main([*words, "--name", "Bad Name"]) == 3
    assert "is no name" in capsys.readouterr().err
    assert not (tmp_path / ".out.part").exists()


# -- the hub ---------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    asked: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"]))
        if "wrong" in str(self.headers["Authorization"]):
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            assert json.loads(body)["visibility"] == "private"
            self.answer(200, {"url": "https://huggingface.co/me/mine"})
        elif "/preupload/" in self.path:
            paths = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            made = {
                "commitUrl": "https://huggingface.co/me/mine/commit/" + "a" * 40,
                "commitOid": "a" * 40,
            }
            self.answer(200, made | {"success": True})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        known = "wrong" not in str(self.headers["Authorization"])
        self.answer(200 if known else 401, {"id": "me/mine", "sha": "b" * 40, "siblings": []})

    def answer(self, code: int, told: dict[str, Any]) -> None:
        text = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked, Hub.files = [], {}
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_gets_every_file_by_the_users_token(
    result: tuple[Path, Path], tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(result, "hf", tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    said = export.push(tmp_path / "out", "me/mine", endpoint=hub)
    assert said == "uploaded as aaaaaaaaaaaa, private"
    assert {token for _, token in Hub.asked} == {"Bearer hf_mine"}
    sent = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert sent == Hub.files and "base_model:" in sent["README.md"].decode()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(export.ExportError, match=r"the hub refused: .*401"):
        export.push(tmp_path / "out", "me/mine", endpoint=hub)


def test_without_a_token_nothing_is_uploaded(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(export.ExportError, match="a token of yours"):
        export.push(tmp_path, "me/mine", endpoint=hub)
    assert not Hub.asked
