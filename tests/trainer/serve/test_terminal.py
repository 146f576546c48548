"""Talking to a result in a terminal: in a real one (a pty), and token for token as transformers."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from results import write_both, write_result
from tiny import write_model
from transformers import AutoModelForCausalLM

from trainer.data.prepare import prompt_ids
from trainer.data.template import Turn
from trainer.model.load import ModelError
from trainer.practice.model import HERE as PRACTICE
from trainer.result.open import load_plain
from trainer.serve import chat as command
from trainer.serve.models import Models, open_models
from trainer.serve.speech import Speech
from trainer.serve.stream import ChatSettings, TooLong, stream
from trainer.serve.terminal import ChatLoop, Conversation, run, shown

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_both(tmp_path_factory.mktemp("result"))


@pytest.fixture
def models(result: tuple[Path, Path]) -> Models:
    return open_models({"tuned": result[1]}, result[0], CPU, 400)


class Typed:
    """A process on a pty of its own that runs `run(conversation)`; what it wrote is kept."""

    def __init__(self, conversation: Conversation) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ["TERM"] = "xterm"
                sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")  # pytest has its own
                run(conversation)
                code = 0
            finally:
                os._exit(code)
        self.text, self.at = "", 0

    def until(self, wanted: str, seconds: float = 60) -> str:
        """What is written up to `wanted`, from behind what was waited for last."""
        ends = time.monotonic() + seconds
        while wanted not in self.text[self.at :]:
            self._read(ends - time.monotonic())
        begin, self.at = self.at, self.text.index(wanted, self.at) + len(wanted)
        return self.text[begin : self.at]

    def more(self) -> None:
        """Return once something is written behind what was waited for last."""
        if not self.text[self.at :]:
            self._read(60)

    def _read(self, seconds: float) -> None:
        assert seconds > 0 and select.select([self.fd], [], [], seconds)[0], self.text[self.at :]
        self.text += os.read(self.fd, 4096).decode("utf-8", "replace")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press_until(self, key: str, wanted: str) -> str:
        """Type `key` again each second until `wanted` is written: Python hears a signal only when
        it waits for the line, just after its prompt."""
        for _ in range(60):
            self.type(key)
            with suppress(AssertionError):
                return self.until(wanted, 1)
        raise AssertionError(self.text)

    def end(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:  # the other end is gone
                break
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return code


@pytest.fixture
def typed(models: Models) -> Iterator[Typed]:
    for module in models.model.modules():  # a model as slow as a large one on a laptop
        if type(module).__name__ == "LlamaModel":
            module.register_forward_hook(lambda *_: time.sleep(0.02))
    child = Typed(Conversation(models, "tuned", ChatSettings(most=12)))
    child.until("you> ")
    yield child
    os.kill(child.pid, signal.SIGKILL) if _runs(child.pid) else None


def _runs(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def test_a_question_is_answered_as_it_comes_and_ctrl_d_ends(typed: Typed) -> None:
    typed.type("hello\n")
    assert typed.until("you> ").count("\n") >= 2
    typed.type("/nothing\n")
    assert "/nothing is no command" in typed.until("you> ")
    typed.type("\x04")
    assert typed.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_conversation(typed: Typed) -> None:
    typed.type("/tokens 300\n")
    typed.until("you> ")
    typed.type("hello\n")
    typed.until("hello\r\n")
    typed.more()  # the answer has begun; 300 tokens take 6 s
    typed.type("\x03")
    typed.until("[stopped]")
    typed.until("you> ")
    typed.press_until("\x03", "Ctrl-D ends")
    typed.until("you> ")
    typed.type("/exit\n")
    assert typed.end() == 0


def test_the_arrow_brings_the_last_line_back(typed: Typed) -> None:
    typed.type("/seed 7\n")
    typed.until("you> ")
    typed.type("\x1b[A\n")
    assert "seed 7" in typed.until("seed 7\r\n")
    typed.until("you> ")
    typed.type("/exit\n")
    assert typed.end() == 0


# -- without a terminal ----------------------------------------------------------------------------


def lines_of(talk: Conversation, *lines: str) -> str:
    said: list[str] = []
    terminal = ChatLoop(talk, said.append)
    assert all(terminal.line(line) for line in lines)
    return "".join(said)


def whole(
    models: Models, names: list[str], question: str, settings: ChatSettings
) -> list[list[int]]:
    voices = [models.voices[name] for name in names]
    prompts = [prompt_ids(v.data, [Turn("user", question)]) for v in voices]
    found: list[list[int]] = [[] for _ in voices]
    for step in stream(models, voices, prompts, settings):
        for ids, token in zip(found, step, strict=True):
            ids += [] if token is None else [token]
    return found


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_answers_are_those_of_stock_transformers(
    result: tuple[Path, Path], models: Models, penalty: float
) -> None:
    settings = ChatSettings(repetition_penalty=penalty, most=20)
    [tuned] = whole(models, ["tuned"], "say it", settings)
    base, adapter = result
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    prompt = prompt_ids(models.voices["tuned"].data, [Turn("user", "say it")])
    ids = torch.tensor([prompt])
    more = {"repetition_penalty": penalty, "do_sample": False, "max_new_tokens": 20}
    stops = sorted(models.voices["tuned"].stops)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=stops,
        pad_token_id=0,
        **more,
    )[0, len(prompt) :].tolist()
    assert tuned == [i for i in made if i not in stops] and len(tuned) > 5


def test_side_by_side_each_answers_as_alone(models: Models) -> None:
    for settings in (
        ChatSettings(most=15),
        ChatSettings(temperature=0.8, top_p=0.9, seed=3, most=15),
    ):
        both = whole(models, ["tuned", "base"], "say it", settings)
        alone = [whole(models, [name], "say it", settings)[0] for name in ("tuned", "base")]
        assert both == alone and both[0] != both[1]


def test_the_base_hears_its_own_answers_and_the_result_its_own(models: Models) -> None:
    talk = Conversation(models, "tuned", ChatSettings(most=4))
    said = lines_of(talk, "one", "/compare", "two")
    assert "[tuned] " in said and "[base] " in said
    tuned, base = talk.turns["tuned"], talk.turns["base"]
    assert [t.text for t in tuned[::2]] == [t.text for t in base[::2]] == ["one", "two"]
    assert tuned[1] == base[1] and tuned[3] != base[3]
    assert lines_of(talk, "/compare", "three").count("[base]") == 0 and "base" not in talk.turns


def test_what_was_said_until_the_stop_is_kept(models: Models) -> None:
    talk = Conversation(models, "tuned", ChatSettings(most=50))
    with closing(talk.answer("hello")) as told:
        pieces = [next(iter(told))[1] for _ in range(3)]
    assert talk.turns["tuned"][0].text == "hello"
    assert talk.turns["tuned"][1].text.startswith("".join(pieces).strip()[:3])


def test_commands_set_what_they_name_and_refuse_what_is_no_number(
    models: Models, tmp_path: Path
) -> None:
    talk = Conversation(models, "tuned", ChatSettings(most=4))
    lines_of(talk, "/temperature 0.5", "/top-p 0.9", "/penalty 1.2", "/seed 3", "/tokens 5")
    assert talk.settings == ChatSettings(0.5, 0.9, 1.2, 3, 5)
    assert "give a number from 0 to 100" in lines_of(talk, "/temperature warm")
    assert "/compare" in lines_of(talk, "/help") and "once something" in lines_of(talk, "/save x")
    lines_of(talk, "/system be brief", "hello", f"/save {tmp_path}/talk.jsonl")
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert "not saved" in lines_of(talk, f"/save {tmp_path}/no/where")
    assert "not saved" in lines_of(talk, f"/save {tmp_path}/a\0b")
    lines_of(talk, "/again")
    assert talk.settings.seed == 4 and len(talk.turns["tuned"]) == 2
    lines_of(talk, "/new")
    assert not talk.turns and "nothing was asked" in lines_of(talk, "/again")


def test_a_conversation_that_is_too_long_is_told_and_not_kept(models: Models) -> None:
    talk = Conversation(models, "tuned", ChatSettings(most=4))
    assert "begin a new one" in lines_of(talk, "word " * 400)
    assert not talk.turns.get("tuned")
    with pytest.raises(TooLong):
        list(stream(models, [models.voices["tuned"]], [[5] * 400], ChatSettings()))


def test_characters_of_several_tokens_are_shown_once_they_are_whole(models: Models) -> None:
    tokenizer = models.voices["tuned"].data.vocabulary.tokenizer
    text, wanted = Speech(tokenizer), "a 你好 🙂 b"
    pieces = [text.add(i) for i in tokenizer.encode(wanted).ids]
    assert "".join(pieces) == wanted == text.whole and "\ufffd" not in "".join(pieces)
    assert "" in pieces


def test_a_pipe_may_hold_what_is_no_text_and_may_close(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation(models, "tuned", ChatSettings(most=4))
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"a \xff b\nmore\n"), "utf-8"))
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        run(talk)
    assert talk.turns["tuned"][0].text == "a \ufffd b"


def test_nothing_that_a_model_says_steers_the_terminal() -> None:
    assert shown("a\x1b[2Jb\r\n\t\u202e\x9b") == "a\\x1b[2Jb\\x0d\n\t\\x202e\\x9b"
    assert not re.search("[\x00-\x08\x0b-\x1f]", shown("".join(map(chr, range(32)))))


def test_the_command_answers_one_question_or_says_why_not(
    result: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, adapter = result
    words = [str(adapter), "--base", str(base), "--prompt", "hello", "--tokens", "3"]
    assert command.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"]
    assert command.main([*words[:4], "a\udcff", *words[5:]]) == 0, "half a byte of another encoding"
    for wrong, why in (
        ([str(tmp_path / "none.zip"), *words[1:]], "there is no"),
        ([*words[:2], str(tmp_path / "none"), *words[3:]], "there is no folder"),
        ([*words[:4], "word " * 5000], "begin a new one"),
        ([*words, "--temperature", "nan"], "give a number from 0 to 100"),
        ([*words, "--penalty", "0"], "give a number from 0.01 to 100"),
    ):
        assert command.main(wrong) == 3
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_result_answers_on_a_smaller_base_too(tmp_path: Path, precision: str) -> None:
    write_model(tmp_path / "base", "gqa", hidden_size=64)  # bitsandbytes quantises blocks of 64
    adapter = write_result(tmp_path / "adapter", tmp_path / "base")
    models = open_models({"tuned": adapter}, tmp_path / "base", CPU, 400, precision)
    [ids] = whole(models, ["tuned"], "hello", ChatSettings(most=3))
    assert 0 < len(ids) <= 3


def test_a_width_that_nf4_does_not_take_on_a_cpu_is_refused_with_what_to_type() -> None:
    """The practice model is 96 wide, and bitsandbytes' CPU code counts in blocks of 64."""
    with pytest.raises(ModelError, match=r"96 inputs.*multiples of 64.*--precision int8"):
        load_plain(PRACTICE, torch.device("cpu"), "nf4")
