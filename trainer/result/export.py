"""Exports a result for another program, with the command that starts it.

    python -m trainer.result.export ADAPTER --base MODEL --for vllm --out FOLDER

vllm, sglang   the adapter's folder, or, where the engine does not load it, the merged model
llama.cpp      one GGUF file of the merged model, F16 or Q8_0
ollama         that, and a Modelfile with the trained template and its stop token
cog            cog.yaml, run.py and a Dockerfile, with result, base and trainer
hf             the adapter's folder with its card; with --repo it is uploaded, by the user's token
chatglm        a prefix as ChatGLM's own code loads it, the checkpoint of its P-Tuning v2

What is merged is certified (trainer/result/certificate.py); certificate.json lies beside it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.data.prepare import Prepared
from trainer.data.template import TemplateError
from trainer.data.words import number_of
from trainer.result import chatglm, cog, gguf_file, ollama
from trainer.result.certificate import NotCertified
from trainer.result.command import StatusLine, answer, parser_of
from trainer.result.engines import EngineSupport, loads_in
from trainer.result.files import read, unpacked
from trainer.result.merge import certified_merge
from trainer.result.open import base_folder, open_words

TARGETS = ("vllm", "sglang", "llama.cpp", "ollama", "cog", "hf", "chatglm")
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
Tell = Callable[[str], None]


class ExportError(ValueError):
    """What cannot be exported, and what to do instead."""


@dataclass(frozen=True)
class ExportSettings:
    """`name` is what the model will be called, `kind` f16 or q8_0, `repo` a name on the hub."""

    target: str
    name: str
    kind: str = "f16"
    merged: bool = False
    repo: str = ""
    public: bool = False


def export(
    adapter: Path, base: Path, out: Path, asked: ExportSettings, tell: Tell = lambda line: None
) -> dict[str, Any]:
    """Write the new folder `out`. Returns {"folder", "commands", "notes"}. Raises ExportError,
    MergeError, NotCertified, NoGguf, TemplateError, OSError of the hub."""
    if out.exists():
        raise ExportError(f"{out} exists: name a new folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        if asked.target in _ENGINES:
            commands, notes = _for_engine(adapter, base, part, out, asked, tell)
        elif asked.target == "cog":
            cog.write(adapter, base, part, asked.name)
            commands, notes = _for_cog(out, asked)
        elif asked.target == "chatglm":
            commands, notes = _for_chatglm(adapter, base, part, out)
        elif asked.target == "hf":
            shutil.copytree(adapter, part, dirs_exist_ok=True)
            commands, notes = _for_hub(part, out, asked)
        else:
            commands, notes = _for_llama_cpp(adapter, base, part, out, asked, tell)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    part.rename(out)
    return {"folder": str(out), "commands": commands, "notes": notes}


Told = tuple[list[str], list[str]]


def _for_engine(
    adapter: Path, base: Path, part: Path, out: Path, asked: ExportSettings, tell: Tell
) -> Told:
    engine, notes = _verdict(adapter, base, _ENGINES[asked.target]), list[str]()
    if engine is None or asked.merged or not engine.loads:
        if engine is not None and not engine.loads:
            notes.append(f"merged, because {engine.name} does not load the adapter: {engine.why}")
        _model(adapter, base, part, "bf16", tell)
        start = {
            "vllm": "vllm serve {} --served-model-name {}",
            "sglang": "python -m sglang.launch_server --model-path {} --served-model-name {}",
        }[asked.target]
        return [start.format(_quoted(out), shlex.quote(asked.name))], notes
    shutil.copytree(adapter, part, dirs_exist_ok=True)
    named = json.loads((part / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    command = engine.command
    if not (part / "chat_template.jinja").is_file():
        command = re.sub(r" --chat-template \S+", "", command)
        notes.append("the trained template could not be said in Jinja: ask by /v1/completions")
    if not (part / "generation_config.json").is_file():
        command = re.sub(r" --generation-config \S+", "", command)
    command = command.replace("NAME=FOLDER", f"{shlex.quote(asked.name)}={_quoted(out)}")
    command = command.replace("FOLDER", _quoted(out))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(named)):  # a local folder, not an id of the hub
        command = command.replace(f" {named} ", f" {_quoted(base)} ", 1)
    if asked.target == "sglang":
        notes += _unknown_ends(part, base)
    return [command], notes


def _unknown_ends(adapter: Path, base: Path) -> list[str]:
    """What to tell of trained stop tokens that are none of the base's."""
    ours, theirs = (_ends(folder) for folder in (adapter, base))
    missed = [n for n in ours if n not in theirs]
    told = f'send "stop_token_ids": {missed} with each question, or export it --merged'
    return [f"it does not end at the trained stop token by itself: {told}"] if missed else []


def _ends(folder: Path) -> list[int]:
    """The ids at which an answer ends, by generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = json.loads((folder / name).read_bytes()).get("eos_token_id")
            if ends is not None:
                return [ends] if isinstance(ends, int) else list(ends)
    return []


def _verdict(adapter: Path, base: Path, name: str) -> EngineSupport | None:
    """None for a whole model."""
    if not (adapter / "adapter_config.json").is_file():
        return None
    config, tensors = read(adapter)
    kind = json.loads((base / "config.json").read_bytes()).get("model_type")
    return next(e for e in loads_in(config, tensors, kind) if e.name == name)


def _model(adapter: Path, base: Path, folder: Path, dtype: str, tell: Tell) -> None:
    """The merged model in `folder`, with its certificate; a whole model as it is."""
    if not (adapter / "adapter_config.json").is_file():
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        return
    inner = folder / "merging"
    certified_merge(adapter, base, inner, dtype, [], _device(), tell)
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def _for_llama_cpp(
    adapter: Path, base: Path, part: Path, out: Path, asked: ExportSettings, tell: Tell
) -> Told:
    file, notes = f"{asked.name}-{asked.kind}.gguf", list[str]()
    words = open_words(adapter, base)
    made = _modelfile(file, words) if asked.target == "ollama" else ""
    model = part / asked.name  # a GGUF is named by its folder
    model.mkdir()
    _model(adapter, base, model, "fp16", tell)
    written = gguf_file.write(model, part / file, asked.kind, tell)
    if (model / "certificate.json").is_file():
        (model / "certificate.json").rename(part / "certificate.json")
    shutil.rmtree(model)
    notes.append(
        f"{file}: {number_of(written.tensors, 'tensor')}, {written.bytes / 1e9:.2f} GB, "
        "read back and compared"
        + (f"; {written.largest_error:.2%} off at most" if written.largest_error else "")
    )
    if made:
        (part / "Modelfile").write_text(made, encoding="utf-8")
        if words.template.name == "chat":
            notes.append(
                "Modelfile has no TEMPLATE: Ollama finds the model's own by the one in the GGUF; "
                f"`ollama show --modelfile {asked.name}` shows what it found"
            )
        create = f"ollama create {asked.name} -f {_quoted(out / 'Modelfile')}"
        return [create, create.replace("create ", "create --quantize q4_K_M ", 1)], notes
    path = out / file
    smaller = out / f"{asked.name}-Q4_K_M.gguf"
    return [
        f"llama-server -m {_quoted(path)} --jinja",
        f"llama-quantize {_quoted(path)} {_quoted(smaller)} Q4_K_M",
    ], notes


def _modelfile(file: str, words: Prepared) -> str:
    stop = str(words.vocabulary.tokenizer.id_to_token(words.stop_id))
    return ollama.modelfile(file, words.template, words.vocabulary, stop)


def _for_cog(out: Path, asked: ExportSettings) -> Told:
    folder, name = _quoted(out), asked.name
    image = "--build-arg IMAGE=milktea/train-cu130:3"
    return [
        f"cd {folder} && cog build -t {name} && cog run {name} -i prompt=hello",
        f"docker build {image} -t {name} {folder} && cog run {name} -i prompt=hello",
    ], ["the second needs no network and no `cog build`: it stands on an image of milktea's"]


def _for_chatglm(adapter: Path, base: Path, part: Path, out: Path) -> Told:
    try:
        places = chatglm.write_theirs(adapter, base, part)
    except chatglm.NotChatGlm as why:
        raise ExportError(str(why)) from why
    words = adapter / "template.json"
    name = json.loads(words.read_bytes())["name"] if words.is_file() else "chatglm2"
    asks = 'ChatGLM2\'s own code asks as [Round 1], which data.template = "chatglm2" trains'
    command = "python web_demo.py --model_name_or_path THUDM/chatglm2-6b --ptuning_checkpoint"
    return [f"{command} {_quoted(out)} --pre_seq_len {places}"], [
        "the command is of the folder ptuning/ of ChatGLM2-6B's repository",
        *([] if name == "chatglm2" else [f"it was trained in the template {name}: {asks}"]),
    ]


# -- the hub ---------------------------------------------------------------------------------------


def _for_hub(part: Path, out: Path, asked: ExportSettings) -> Told:
    if not (part / "README.md").is_file():
        base = json.loads((part / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        card = f"---\nbase_model: {base}\nlibrary_name: peft\n---\n# {asked.name}\n"
        (part / "README.md").write_text(card, encoding="utf-8")
    if not asked.repo:
        return [f"hf upload USER/{asked.name} {_quoted(out)}"], [
            "nothing was uploaded: --repo USER/NAME uploads, by the token in HF_TOKEN or of "
            "`hf auth login`"
        ]
    return [f"https://huggingface.co/{asked.repo}"], [push(part, asked.repo, asked.public)]


def push(folder: Path, repo: str, public: bool = False, endpoint: str | None = None) -> str:
    """Upload the folder to the model `repo`, which is made where it is not, private unless
    `public`. Returns what was done. Raises ExportError without a token, OSError of the hub."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = os.environ.get("HF_TOKEN") or get_token()
    if not token:
        raise ExportError("the hub needs a token of yours: export HF_TOKEN=..., or `hf auth login`")
    hub = HfApi(endpoint=endpoint, token=token)
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        made = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="A result")
    except HfHubHTTPError as error:
        raise ExportError(f"the hub refused: {str(error).strip().splitlines()[0]}") from error
    return f"uploaded as {made.oid[:12]}, {'public' if public else 'private'}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path.resolve()))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# -- the command -----------------------------------------------------------------------------------


def text(told: dict[str, Any]) -> str:
    """The lines for a terminal: what was written, and what to type."""
    return "\n".join([told["folder"], *told["notes"], *(f"  {c}" for c in told["commands"])])


def main(words: list[str] | None = None) -> int:
    parser = parser_of("trainer.result.export", "Write a result as another program takes it.")
    parser.add_argument("adapter", type=Path, help="folder of the adapter, or adapter.zip")
    parser.add_argument("--base", required=True, help="folder of the base model, or its hub id")
    parser.add_argument("--for", dest="target", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--type", choices=sorted(gguf_file.KINDS), default="f16", help="of a GGUF")
    parser.add_argument("--name", default="tuned", help="what the model will be called")
    parser.add_argument("--merged", action="store_true", help="for vllm and sglang: merged anyway")
    parser.add_argument("--repo", default="", help="for hf: USER/NAME to upload to")
    parser.add_argument("--public", action="store_true", help="for hf: not private")
    told, tell = parser.parse_args(words), StatusLine()

    def work() -> dict[str, Any]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", told.name):
            raise ExportError(f"{told.name!r} is no name: take small letters, digits, . _ -")
        asked = ExportSettings(
            told.target, told.name, told.type, told.merged, told.repo, told.public
        )
        with unpacked(told.adapter) as adapter:
            try:
                return export(adapter, base_folder(told.base), told.out, asked, tell)
            finally:
                tell.end()

    return answer(work, text, told.json, (NotCertified, TemplateError))


if __name__ == "__main__":
    sys.exit(main())
