"""Ask a trained adapter, with the very template that it was trained with.

    python -m trainer.serve.chat ADAPTER --base MODEL                  a chat: one question a line
    python -m trainer.serve.chat ADAPTER --base MODEL --prompt "..."   one answer

ADAPTER is a folder or an adapter.zip.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

from trainer.data.template import TemplateError
from trainer.model.load import ModelError
from trainer.result.open import open_adapter, unpacked


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.serve.chat", description="Ask a trained adapter."
    )
    parser.add_argument("adapter", type=Path, help="folder of the adapter, or adapter.zip")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--prompt",
        help="one question; without it, a chat: one question a line, an empty line begins anew",
    )
    parser.add_argument("--input", default="", help="what Alpaca calls the input of --prompt")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(unpacked(arguments.adapter))
            chat = open_adapter(folder, arguments.base)
        except (TemplateError, ModelError, OSError, zipfile.BadZipFile) as error:
            print(f"cannot answer: {error}", file=sys.stderr)
            return 3
        if arguments.prompt is not None:
            print(chat.ask(arguments.prompt, arguments.input))
            return 0
        for line in sys.stdin:
            if line.strip():
                print(chat.ask(line.strip()), flush=True)
            else:
                chat.turns.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
