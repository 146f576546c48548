"""A result is talked to from a program: our own server in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from results import write_both

from ops.declare.chat import Chat
from ops.errors import PreflightError
from ops.use.found import Found


@pytest.mark.slow
def test_an_answer_comes_in_pieces_and_the_next_question_knows_it(tmp_path: Path) -> None:
    base, adapter = write_both(tmp_path)
    with Chat(Found("tea", adapter, str(base)), device="cpu", precision="fp32") as chat:
        pieces = list(chat.stream("a b", max_tokens=5))
        assert "".join(pieces) == chat.turns[1]["content"]
        assert chat.ask("c", max_tokens=5) == chat.turns[3]["content"]
        assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
        with pytest.raises(PreflightError, match="was refused"):
            chat.ask("d", temperature=-1)
        assert len(chat.turns) == 4, "a refused question is not kept"
        server = chat._server
    assert server.poll() is not None
    with pytest.raises(PreflightError, match=r"cannot be talked to: .*cannot serve"):
        Chat(Found("tea", tmp_path / "gone", str(base)), device="cpu")
