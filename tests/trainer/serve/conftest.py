"""Results on the practice model, and an engine that serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from served import Running, write_adapter

from trainer.practice.model import HERE as PRACTICE
from trainer.serve.engine import Engine
from trainer.serve.models import open_models


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("results")
    return {
        name: write_adapter(root / name, PRACTICE, seed)
        for seed, name in enumerate(["zh-1", "v2.5"])
    }


@pytest.fixture
def serving(results: dict[str, Path]) -> Iterator[Callable[..., Engine]]:
    """serving(width=...) -> an engine over `base` and the results; `fast` as of open_models."""
    engines: list[Engine] = []

    def get(
        chosen: dict[str, Path] | None = None,
        base: Path = PRACTICE,
        width: int = 16,
        fast: bool = False,
    ) -> Engine:
        models = open_models(chosen or results, base, torch.device("cpu"), fast=fast)
        engines.append(Engine(models, width))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def server(results: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over `base` and the results."""
    models = open_models(results, PRACTICE, torch.device("cpu"))
    running = Running(Engine(models, 8), tmp_path_factory.mktemp("feedback") / "new")
    yield running
    running.end()
