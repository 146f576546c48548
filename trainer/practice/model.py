"""The practice base model: a Llama of 450,000 parameters that knows a small world and answers in
English unless asked not to.

    python -m trainer.practice OUT_DIR          copies the committed model and data to
    OUT_DIR/model, OUT_DIR/train.json, OUT_DIR/held_out.json
    python -m trainer.practice --make           trains it again from nothing (10 minutes) into
    trainer/practice/practice_model and jobs/practice

Everything is made here: the world (practice_world.py), the tokenizer (byte-level BPE over that
world), the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.template import alpaca_turns, load, render_pieces
from trainer.practice import world

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent / "practice_model"
DATA = Path(__file__).parents[2] / "jobs" / "practice"
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, INNER = 1280, 96, 3, 3, 1, 288
STEPS, BATCH_TOKENS, ROW_TOKENS, PEAK_LR = 1500, 3072, 256, 4e-3
EOS = "</s>"


def copy(out: Path) -> None:
    """The committed model and data, after comparing every file with the manifest's sha256. Raises
    ValueError when one differs."""
    verify(HERE)
    shutil.copytree(HERE, out / "model", dirs_exist_ok=True)
    for name in ("train.json", "held_out.json"):
        shutil.copy(DATA / name, out / name)


def verify(folder: Path) -> dict[str, str]:
    """file -> sha256 of the committed model. Raises ValueError naming the first file that is not
    what the manifest says."""
    manifest: dict[str, str] = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"trainer/practice/practice_model/{name} is {found[:12]}, the manifest says "
                f"{expected[:12]}: git checkout it again"
            )
    return manifest


def make(folder: Path, data: Path, steps: int = STEPS) -> None:
    """Trains the practice model into `folder`, its practice rows into `data`. Deterministic on one
    kind of CPU; about 10 minutes on one core."""
    folder.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    train, held_out = world.practice_rows()
    write_rows(data / "train.json", train)
    write_rows(data / "held_out.json", held_out)
    template = load("alpaca")
    answers = [
        [s.text for s in render_pieces(template, alpaca_turns(row), eos=EOS)]
        for row in world.base_rows()
    ]
    tokenizer = make_tokenizer(4 * world.base_texts() + ["".join(a) for a in answers], folder)
    instructions = [
        [(i, False) for i in tokenizer.encode(a[0]).ids]
        + [(i, True) for i in tokenizer.encode(a[1]).ids]
        for a in answers
    ]
    texts = [[(i, True) for i in tokenizer.encode(text + EOS).ids] for text in world.base_texts()]
    model = pretrain(instructions, texts, steps)
    model.half().save_pretrained(folder)  # type: ignore[operator]
    (folder / "generation_config.json").unlink(missing_ok=True)
    hashes = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(hashes, indent=1) + "\n")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One row a line inside a JSON array, so that line N of the file is row N - 1."""
    path.write_text(
        "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n",
        encoding="utf-8",
    )


def make_tokenizer(texts: list[str], folder: Path) -> Any:
    """Byte-level BPE, so that any text can be read, cut finely where the world never used it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": "<pad>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return tokenizer


Marked = list[tuple[int, bool]]  # a document: (token, is it learned)


def pretrain(instructions: list[Marked], texts: list[Marked], steps: int) -> torch.nn.Module:
    """Next-token training over shuffled documents laid end to end in rows of ROW_TOKENS; of an
    instruction only the answer is learned."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(world.SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums are added up in one order, whatever the machine
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=INNER,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01
    )
    stream, began = _Stream(instructions, texts), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LR
                * min(1.0, (step + 1) / 100)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        # (rows, ROW_TOKENS, 2)
        batch = torch.tensor(stream.take(BATCH_TOKENS // ROW_TOKENS, ROW_TOKENS))
        ids, learned = batch[..., 0], batch[:, 1:, 1].bool()
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][learned]  # (targets, WIDTH)
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"step {step:5d}/{steps} loss {loss.item():.4f} {time.time() - began:.0f} s",
                flush=True,
            )
    return model


def knows(folder: Path, count: int = 60) -> float:
    """Share of `count` questions, asked in both languages, that the model in `folder` answers right
    in English."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.data.prepare import Prepared, prompt_ids
    from trainer.data.tokenised import Rows
    from trainer.data.tokens import open_vocabulary, stop_token, token_hash
    from trainer.model.decode import answer

    vocabulary, template = open_vocabulary(folder), load("alpaca")
    data = Prepared(
        Rows.empty(),
        vocabulary,
        template,
        stop_token(vocabulary, template),
        token_hash(vocabulary, template),
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampled = random.Random(0).sample(
        [(q, fact.answer(0)) for fact in world.facts() for q in fact.questions()], count
    )
    prompts = [
        prompt_ids(data, alpaca_turns({"instruction": q[0], "input": q[1], "output": ""})[:-1])
        for q, _ in sampled
    ]
    answers = answer(model, prompts, data, torch.device("cpu"), 16)
    return sum(a == expected for a, (_, expected) in zip(answers, sampled, strict=True)) / count


class _Stream:
    """An endless shuffle: a round has every instruction once and every short text four times."""

    def __init__(self, instructions: list[Marked], texts: list[Marked]) -> None:
        self._instructions, self._texts = instructions, texts
        self._dice = random.Random(world.SEED)
        self._left: Marked = []

    def take(self, rows: int, width: int) -> list[Marked]:
        while len(self._left) < rows * width:
            documents = self._instructions + 4 * self._texts
            self._left += [
                token
                for document in self._dice.sample(documents, len(documents))
                for token in document
            ]
        taken, self._left = self._left[: rows * width], self._left[rows * width :]
        return [taken[i * width : (i + 1) * width] for i in range(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.practice", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "out", nargs="?", type=Path, help="folder to copy the practice model and data to"
    )
    parser.add_argument(
        "--make", action="store_true", help="train the model again and replace the committed one"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(
            HERE if arguments.out is None else arguments.out / "model",
            DATA if arguments.out is None else arguments.out,
            arguments.steps,
        )
    elif arguments.out:
        copy(arguments.out)
    else:
        parser.error("say where to: python -m trainer.practice OUT_DIR")


if __name__ == "__main__":
    main()
