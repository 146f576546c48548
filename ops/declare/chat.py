"""Talk to a result on this computer: a server of ours in a process of its own, on loopback."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from ops.errors import PreflightError
from ops.use import words
from ops.use.found import Found

OPENS_S = 600.0  # a large base is read from a slow disk


class Chat:
    """One conversation: what was asked and answered before goes along. Close it, or use it in
    `with`: the model is in memory until then."""

    def __init__(self, found: Found, *, device: str = "auto", precision: str = "auto") -> None:
        """Returns once the model is loaded. Raises PreflightError where it cannot be."""
        self.turns: list[dict[str, str]] = []
        self._model, self._token = found.name, secrets.token_urlsafe(24)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        with open(os.open(folder / "token", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(self._token)
        options = ["--port=0", f"--token-file={folder / 'token'}", f"--address={folder / 'where'}"]
        options += [f"--device={device}", f"--precision={precision}"]
        self._log = open(folder / "log", "w+")  # noqa: SIM115 - closed with the process
        self._server = subprocess.Popen(
            words.serve([found], options).command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=words.environment(),
        )
        try:
            self._api = self._opened(folder)
        except BaseException:
            self.close()
            raise

    def _opened(self, folder: Path) -> str:
        ends = time.monotonic() + OPENS_S
        while not (folder / "where").is_file() or not (folder / "where").stat().st_size:
            if self._server.poll() is not None or time.monotonic() > ends:
                self._log.seek(0)
                said = "; ".join(self._log.read()[-500:].splitlines())
                raise PreflightError(f"the result cannot be talked to: {said or 'no answer'}")
            time.sleep(0.05)
        return str(json.loads((folder / "where").read_text("utf-8"))["api"])

    def stream(self, question: str, **settings: Any) -> Iterator[str]:
        """The answer, piece by piece. `settings` are OpenAI's: temperature, top_p, max_tokens.
        Raises PreflightError where the server refuses."""
        asked = [*self.turns, {"role": "user", "content": question}]
        body = {"model": self._model, "messages": asked, "stream": True, **settings}
        key = {"Authorization": f"Bearer {self._token}"}
        url, said = f"{self._api}/chat/completions", ""
        with requests.post(url, json=body, headers=key, stream=True, timeout=OPENS_S) as answer:
            if answer.status_code != 200:
                raise PreflightError(f"the question was refused: {answer.text[:300]}")
            for line in answer.iter_lines():
                text = line.decode("utf-8", "replace").removeprefix("data: ")
                if not text.startswith("{"):
                    continue
                for choice in json.loads(text).get("choices", []):
                    if piece := (choice.get("delta") or {}).get("content"):
                        said += piece
                        yield piece
        self.turns = [*asked, {"role": "assistant", "content": said}]

    def ask(self, question: str, **settings: Any) -> str:
        """The whole answer; as `stream`."""
        return "".join(self.stream(question, **settings))

    def close(self) -> None:
        """End the server. Twice is as once."""
        self._server.terminate()
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
