"""A result in Cog's form: cog.yaml and run.py for `cog build`, and a Dockerfile that makes an image
of ours into one that `cog run` takes, without `cog build` and without a network.

Both answer alike: run.py under Cog's own server, and trainer/serve/cog.py, which speaks its HTTP.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PORT = 5000  # Cog's
PACKAGE = Path(__file__).parents[1]
NEEDS = (  # of trainer/serve, beside Cog's own
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "pydantic",
    "Jinja2",
    "psutil",
    "PyYAML",
    "aiohttp",
    "bitsandbytes",
)
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_TYPES = {str: "string", float: "number", int: "integer", bool: "boolean"}


@dataclass(frozen=True)
class CogInput:
    """One input. Without a default it has to be given."""

    name: str
    kind: type
    about: str
    default: str | float | int | bool | None = None
    least: float | None = None
    most: float | None = None


FIELDS = (
    CogInput("prompt", str, "What is asked"),
    CogInput("input", str, "What Alpaca calls the input of the question", ""),
    CogInput("system", str, "What the model is told of its task", ""),
    CogInput("max_tokens", int, "Of the answer at most", 512, 1, 1 << 16),
    CogInput("temperature", float, "0 takes the likeliest token", 0.0, 0.0, 100.0),
    CogInput("top_p", float, "Draw from the likeliest tokens that make up so much", 1.0, 1e-6, 1.0),
    CogInput("repetition_penalty", float, "1 does nothing", 1.0, 0.01, 100.0),
    CogInput("seed", int, "Of the drawing", 0, 0, 2**31 - 1),
    CogInput("base", bool, "Ask the base model, without what was trained", False),
)
OUTPUT = {
    "title": "Output",
    "type": "array",
    "items": {"type": "string"},
    "x-cog-array-type": "iterator",
    "x-cog-array-display": "concatenate",
}


def schema() -> dict[str, Any]:
    """The OpenAPI of the two servers, as `cog build` would write it."""
    inputs = {field.name: _property(n, field) for n, field in enumerate(FIELDS)}
    asked = {"$ref": "#/components/schemas/Input"}
    statuses = ["starting", "processing", "succeeded", "canceled", "failed"]
    response = {
        "title": "PredictionResponse",
        "type": "object",
        "properties": {
            "input": asked,
            "output": {"$ref": "#/components/schemas/Output"},
            "id": {"title": "Id", "type": "string"},
            "status": {"$ref": "#/components/schemas/Status"},
            "error": {"title": "Error", "type": "string"},
            "metrics": {"title": "Metrics", "type": "object"},
        },
    }
    request = {"title": "PredictionRequest", "type": "object", "properties": {"input": asked}}
    schemas = {
        "Input": {
            "title": "Input",
            "type": "object",
            "properties": inputs,
            "required": [field.name for field in FIELDS if field.default is None],
        },
        "Output": OUTPUT,
        "Status": {"title": "Status", "type": "string", "enum": statuses},
        "PredictionRequest": request,
        "PredictionResponse": response,
    }
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}
    told = {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionResponse"}}}
    post = {
        "summary": "Predict",
        "operationId": "predict_predictions_post",
        "requestBody": {"content": body},
        "responses": {"200": {"description": "Successful Response", "content": told}},
    }
    health = {"summary": "Healthcheck", "responses": {"200": {"description": "READY or not"}}}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/health-check": {"get": health}, "/predictions": {"post": post}},
        "components": {"schemas": schemas},
    }


def _property(order: int, field: CogInput) -> dict[str, Any]:
    told: dict[str, Any] = {
        "title": field.name.replace("_", " ").capitalize(),
        "type": _TYPES[field.kind],
        "description": field.about,
        "x-order": order,
    }
    more = {"default": field.default, "minimum": field.least, "maximum": field.most}
    return told | {key: value for key, value in more.items() if value is not None}


def config() -> dict[str, Any]:
    """What cog.yaml says, and the label `run.cog.config` of an image."""
    build = {"gpu": True, "python_version": "3.11", "python_requirements": "requirements.txt"}
    return {"build": build, "run": "run.py:Runner"}


def runner() -> str:
    """run.py: the trainer's own chat behind Cog's SDK."""
    arguments = "".join(f"        {field.name}: {_argument(field)},\n" for field in FIELDS)
    names = "".join(f"            {field.name}={field.name},\n" for field in FIELDS)
    return f'''"""A result of milktea under Cog: `cog run -i prompt=...`."""

from pathlib import Path

from cog import BaseRunner, ConcatenateIterator, Input

from trainer.serve.cog import CogAnswers

HERE = Path(__file__).parent


class Runner(BaseRunner):
    def setup(self) -> None:
        self.answers = CogAnswers(HERE / "result", HERE / "base")

    def run(
        self,
{arguments}    ) -> ConcatenateIterator[str]:
        yield from self.answers.pieces(
{names}        )
'''


def _argument(field: CogInput) -> str:
    said = [f"description={field.about!r}"]
    for word, value in (("default", field.default), ("ge", field.least), ("le", field.most)):
        said += [f"{word}={field.kind(value)!r}"] if value is not None else []
    return f"{field.kind.__name__} = Input({', '.join(said)})"


def dockerfile(name: str) -> str:
    """On an image of ours, which holds the trainer: COPY and two labels are all that Cog wants."""
    return f"""\
# docker build --build-arg IMAGE=milktea/train-cu130:3 -t {name} . && cog run {name} -i prompt=hello
ARG IMAGE
FROM ${{IMAGE}}
COPY base /cog/base
COPY result /cog/result
LABEL run.cog.config={_label(config())} \\
    run.cog.openapi_schema={_label(schema())}
WORKDIR /cog
EXPOSE {PORT}
CMD ["python", "-m", "trainer.serve.cog", "/cog/result", "--base", "/cog/base"]
"""


def _label(value: Any) -> str:
    """As a quoted word of a Dockerfile, in which a backslash, a quote and a dollar mean more."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for sign in ("\\", '"', "$"):
        text = text.replace(sign, f"\\{sign}")
    return f'"{text}"'


def write(adapter: Path, base: Path, part: Path, name: str) -> None:
    """Fill the folder `part`: the result, the base (linked where the disk allows it), our trainer,
    and Cog's files."""
    shutil.copytree(adapter, part / "result")
    (part / "base").mkdir()
    for pattern in MODEL_FILES:
        for path in sorted(base.glob(pattern)):
            _link(path.resolve(), part / "base" / path.name)
    shutil.copytree(PACKAGE, part / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(part / "trainer/practice/practice_model", ignore_errors=True)
    versions = {package: importlib.metadata.version(package) for package in NEEDS}
    lines = "".join(f"{package}=={v.partition('+')[0]}\n" for package, v in versions.items())
    (part / "requirements.txt").write_text(lines, encoding="utf-8")
    build = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in config()["build"].items())
    yaml = f"build:\n{build}run: {json.dumps(config()['run'])}\n"
    (part / "cog.yaml").write_text(yaml, encoding="utf-8")
    (part / "run.py").write_text(runner(), encoding="utf-8")
    (part / "Dockerfile").write_text(dockerfile(name), encoding="utf-8")
    (part / ".cog").mkdir()
    (part / ".cog/openapi_schema.json").write_text(json.dumps(schema(), indent=1), encoding="utf-8")


def _link(path: Path, there: Path) -> None:
    try:
        os.link(path, there)
    except OSError:  # another disk
        shutil.copy2(path, there)
