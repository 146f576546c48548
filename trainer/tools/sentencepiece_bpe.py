"""A sentencepiece model of byte-pair encoding (tokenizer.model) as a tokenizer of the `tokenizers`
library, which the trainer reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from trainer.tools.checkpoint import InvalidCheckpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces


def read(
    path: Path,
    special: Sequence[str],
    before: Sequence[str],
    hint: str,
    written: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a sentencepiece model. ``special`` tokens are numbered after its pieces; one
    that is a piece too, as sop, is called <sop>. ``before`` are put before every text; ``written``
    are those of ``special`` that a text may hold, as a chat template does.

    Raises InvalidCheckpoint, with ``hint``, where the file is of another kind.
    """
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, or a missing file
        raise InvalidCheckpoint(f"{path.name} is no sentencepiece model: {error}", hint) from error
    spec, pieces = proto.normalizer_spec, proto.pieces
    vocab = {piece.piece: number for number, piece in enumerate(pieces)}
    unknown = next((x.piece for x in pieces if x.type == UNKNOWN), None)
    named = {token: token if token not in vocab else f"<{token}>" for token in special}
    first = [named.get(token, token) for token in before]
    whole = unknown is not None and vocab.keys() | named.values() >= set(first)
    if proto.trainer_spec.model_type != 2 or spec.remove_extra_whitespaces or not whole:
        raise InvalidCheckpoint(f"{path.name} is no sentencepiece model of byte pairs", hint)
    scores = {x.piece: x.score for x in pieces if x.type in (NORMAL, USER_DEFINED)}
    merges = generate_merges(vocab, scores, {x.piece for x in pieces if x.piece not in scores})
    vocab |= {token: len(pieces) + number for number, token in enumerate(named.values())}
    made = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    if spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(spec.precompiled_charsmap))
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single=[*first, "$A"],
        pair=[*first, "$A", "$B"],
        special_tokens=[(token, vocab[token]) for token in first],
    )
    known = [x.piece for x in pieces if x.type in (CONTROL, UNKNOWN)]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in (*known, *written)])
    made.add_tokens(
        [AddedToken(x.piece, normalized=False) for x in pieces if x.type == USER_DEFINED]
    )
    return made
