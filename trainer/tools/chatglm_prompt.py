"""Converts a P-Tuning checkpoint of ChatGLM2 or ChatGLM3, its `prefix_encoder`, to an adapter of
PEFT's.

    python -m trainer.tools.chatglm_prompt CHECKPOINT BASE TARGET

CHECKPOINT is the folder that ChatGLM's ptuning/main.py left (pytorch_model.bin), BASE the model
that trainer/tools/convert_chatglm.py made. `milktea chat`, `evaluate` and `serve` take TARGET with
--base, and a job with training.method = "p_tuning_v2" takes it as its `start`. The way back is
`milktea adapter export --for chatglm`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.data.prepare import Prepared
from trainer.data.template import load
from trainer.data.tokenised import Rows
from trainer.data.tokens import open_vocabulary, stop_token, token_hash
from trainer.result import chatglm
from trainer.result.chatglm import NotChatGlm
from trainer.result.words import write_words
from trainer.tools import checkpoint
from trainer.tools.checkpoint import InvalidCheckpoint, Progress
from trainer.tools.convert_chatglm import ROLES, weight_files
from trainer.wire.chain import WEIGHTS

HINT = "give a folder of ChatGLM's ptuning/main.py with --pre_seq_len, and its own base, converted"


def convert(source: Path, base: Path, target: Path, progress: Progress) -> list[Path]:
    """Write the adapter into the new folder `target`; returns its weights' file. Other tensors of
    the checkpoint are left out, as ChatGLM's code leaves them out. Raises InvalidCheckpoint."""
    found = {n: t for file in weight_files(source) for n, t in checkpoint.read(file).items()}
    try:
        heads = chatglm.Heads.of(base)
        prompt = heads.to_ours(chatglm.prefix_in(found))
    except (NotChatGlm, OSError) as why:
        raise InvalidCheckpoint(str(why), HINT) from why
    checkpoint.new_folder(target)
    chatglm.write_ours(prompt, heads, base.resolve().name, target)
    if others := sum(not name.startswith(chatglm.THEIRS) for name in found):
        progress(f"{others} other tensors are left out")
    _write_words(base, target, progress)
    return [target / WEIGHTS]


def _write_words(base: Path, target: Path, progress: Progress) -> None:
    """The template that the model's own training asks in."""
    vocabulary = open_vocabulary(base)
    has_roles = vocabulary.id_of(ROLES[1]) is not None
    if has_roles and ROLES[1] not in vocabulary.special_texts:
        progress("BASE has no chat template: convert it again, or train on from the adapter")
        return
    template = load("chatglm3" if has_roles else "chatglm2")
    found = token_hash(vocabulary, template)
    stop = stop_token(vocabulary, template)
    write_words(base, target, Prepared(Rows.empty(), vocabulary, template, stop, found))


if __name__ == "__main__":
    sys.exit(checkpoint.main(convert, __doc__ or "", 3))
