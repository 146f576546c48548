"""Cog's HTTP over our chat, for images that `cog run` takes as they are.

    python -m trainer.serve.cog RESULT --base BASE

Answers GET /health-check, POST /predictions (and PUT /predictions/ID), GET /openapi.json. There is
no token, because Cog sends none: it is for a container whose port 5000 Cog publishes, and nothing
else. OpenAI's interface and its token are trainer/serve/server.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.result.cog import FIELDS, PORT, CogInput, schema

if TYPE_CHECKING:
    from aiohttp import web

NAME = "tuned"
BODY_BYTES = 2 << 20


class CogAnswers:
    """A loaded result. One question is answered at a time; others wait."""

    def __init__(
        self, result: Path, base: Path, device: str = "auto", precision: str = "auto"
    ) -> None:
        from trainer.result.open import device_of, precision_of
        from trainer.serve.models import CONTEXT, open_models

        here = device_of(device)
        found = precision_of(precision, base, here)
        self._models = open_models({NAME: result}, base, here, CONTEXT, found)
        self._one = threading.Lock()

    def pieces(
        self,
        prompt: str,
        input: str = "",
        system: str = "",
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        base: bool = False,
    ) -> Iterator[str]:
        """The answer as it comes. Raises ValueError for what the template or the model does not
        take."""
        from trainer.serve.models import BASE
        from trainer.serve.stream import ChatSettings
        from trainer.serve.terminal import Conversation

        if base and BASE not in self._models.voices:
            raise ValueError("the result is a whole model: there is no base beside it")
        settings = ChatSettings(temperature, top_p, repetition_penalty, seed, max_tokens)
        asked = Conversation(self._models, BASE if base else NAME, settings, system)
        with self._one:
            for _, piece in asked.answer(prompt, input):
                yield piece


class WrongInput(ValueError):
    """`faults` in FastAPI's form, which Cog's clients read."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults


def read_input(body: Any) -> dict[str, Any]:
    """The arguments of `CogAnswers.pieces` in a request's body. Raises WrongInput that names each
    fault's place."""
    given = body.get("input") if isinstance(body, Mapping) else None
    if not isinstance(given, Mapping):
        raise WrongInput([_fault("", "an object is required")])
    known = {field.name: field for field in FIELDS}
    faults = [_fault(str(name), "unexpected input") for name in given if name not in known]
    found = {}
    for name, field in known.items():
        if name not in given:
            if field.default is None:
                faults.append(_fault(name, "field required"))
            continue
        value, why = _value(field, given[name])
        if why:
            faults.append(_fault(name, why))
        found[name] = value
    if faults:
        raise WrongInput(faults)
    return found


def _value(field: CogInput, given: Any) -> tuple[Any, str]:
    """(the value, "") or (None, why not)."""
    value: Any = _read(field.kind, given) if isinstance(given, str) else given
    if field.kind is float and isinstance(given, int) and not isinstance(given, bool):
        value = float(given)
    if field.kind not in {type(value)}:
        return None, f"value is not a valid {field.kind.__name__}"
    if field.least is not None and not field.least <= value:
        return None, f"ensure this value is greater than or equal to {field.least:g}"
    if field.most is not None and not value <= field.most:
        return None, f"ensure this value is less than or equal to {field.most:g}"
    return value, ""


def _read(kind: type, text: str) -> Any:
    """A text as what its field holds, since Cog's older command sends every input as a text; the
    text itself where it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        value = kind(text) if kind is not str else text
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def _fault(name: str, why: str) -> dict[str, Any]:
    return {"loc": ["body", "input", *([name] if name else [])], "msg": why, "type": "value_error"}


def application(answers: CogAnswers) -> web.Application:
    """Cog's routes over a loaded result."""
    from aiohttp import web

    began = time.time()

    async def health(request: web.Request) -> web.Response:
        setup = {"started_at": began, "completed_at": began, "status": "succeeded", "logs": ""}
        return web.json_response({"status": "READY", "setup": setup})

    async def openapi(request: web.Request) -> web.Response:
        return web.json_response(schema())

    async def predict(request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
            asked = read_input(body)
        except WrongInput as error:
            return web.json_response({"detail": error.faults}, status=422)
        except (ValueError, RecursionError):
            return web.json_response({"detail": [_fault("", "not JSON")]}, status=422)
        number = request.match_info.get("id") or str(body.get("id") or "")
        told = await asyncio.to_thread(_predicted, answers, asked)
        return web.json_response({"id": number or None, "input": asked, **told})

    app = web.Application(client_max_size=BODY_BYTES)
    app.add_routes(
        [
            web.get("/health-check", health),
            web.get("/openapi.json", openapi),
            web.post("/predictions", predict),
            web.put("/predictions/{id}", predict),
        ]
    )
    return app


def _predicted(answers: CogAnswers, asked: Mapping[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        output = list(answers.pieces(**asked))
    except ValueError as error:
        return {"status": "failed", "output": None, "error": str(error), "logs": ""}
    metrics = {"predict_time": time.monotonic() - began}
    return {"status": "succeeded", "output": output, "error": None, "logs": "", "metrics": metrics}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.serve.cog", description="Serve a result by Cog's HTTP, no token."
    )
    parser.add_argument("result", type=Path, help="adapter.zip or a folder")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--host", default="0.0.0.0", help="in a container, every address of it")
    parser.add_argument("--port", type=int, default=PORT)
    told = parser.parse_args(words)
    from aiohttp import web

    from trainer.result.command import quiet

    quiet()
    try:
        answers = CogAnswers(told.result, told.base)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"cannot serve: {error}", file=sys.stderr)
        return 3
    web.run_app(application(answers), host=told.host, port=told.port, print=None, access_log=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
