"""Talk to a result, with the very template that it was trained with.

    python -m trainer.serve.chat ADAPTER --base MODEL                  a conversation
    python -m trainer.serve.chat ADAPTER --base MODEL --prompt "..."   one answer

ADAPTER is a folder or an adapter.zip, MODEL a folder or a hub id.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trainer.result.command import answer, parser_of, quiet
from trainer.result.open import DEVICES, PRECISIONS, base_folder, device_of, precision_of
from trainer.serve import terminal
from trainer.serve.models import CONTEXT, Models, open_models
from trainer.serve.stream import ChatSettings
from trainer.serve.terminal import Conversation, validated

NAME = "tuned"


def main(words: list[str] | None = None) -> int:
    told = _parser().parse_args(words)
    quiet()
    found: list[Conversation] = []

    def work() -> dict[str, Any]:
        found.append(_opened(told))
        if told.prompt is None:
            return {}
        asked = [text.encode(errors="replace").decode() for text in (told.prompt, told.input)]
        pieces = [piece for _, piece in found[0].answer(*asked)]
        return {"answer": "".join(pieces).strip()}

    if told.prompt is not None:
        return answer(work, lambda made: str(made["answer"]), told.json)
    print("loading ...", file=sys.stderr, flush=True)
    code = answer(work, lambda _: _banner(told, found[0].models), False)
    if code == 0:
        terminal.run(found[0])
    return code


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("trainer.serve.chat", "Talk to a result.")
    parser.add_argument("adapter", type=Path, help="folder of the adapter, or adapter.zip")
    parser.add_argument("--base", required=True, help="folder of the base model, or its hub id")
    parser.add_argument("--prompt", help="one question, instead of a conversation")
    parser.add_argument("--input", default="", help="what Alpaca calls the input of --prompt")
    parser.add_argument("--system", default="", help="what the model is told of its task")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens at most, of all turns")
    parser.add_argument(
        "--tokens", type=int, default=ChatSettings.most, help="of an answer at most"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--penalty", type=float, default=1.0, help="of what was said already")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _opened(told: argparse.Namespace) -> Conversation:
    base, device = base_folder(told.base), device_of(told.device)
    if not told.adapter.exists():
        raise ValueError(f"there is no {told.adapter}")
    settings = validated(
        ChatSettings(told.temperature, told.top_p, told.penalty, told.seed, told.tokens)
    )
    precision = precision_of(told.precision, base, device)
    models = open_models({NAME: told.adapter}, base, device, told.context, precision)
    told.precision, told.device = precision, device.type
    return Conversation(models, NAME, settings, told.system)


def _banner(told: argparse.Namespace, models: Models) -> str:
    template = models.voices[NAME].data.template.name
    return (
        f"{told.adapter.resolve().parent.name} on {Path(told.base).name}: {told.device}, "
        f"{told.precision}, template {template}, {models.context:,} tokens. /help lists what can "
        "be typed; Ctrl-C stops an answer."
    )


if __name__ == "__main__":
    sys.exit(main())
