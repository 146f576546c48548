"""Read a safetensors file from a stream without torch: its header checked to the byte, every number
looked at once.

Format: https://github.com/huggingface/safetensors#format - 8 bytes little-endian header length, a
JSON object, then the tensors' bytes without hole or overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

MAX_HEADER = 16 << 20  # bytes; a hundred thousand tensors take that much
MAX_DIMENSIONS, MAX_LENGTH = 8, 1 << 40  # of a shape
_PIECE = 1 << 24  # bytes looked at at a time; a multiple of every item's size

# safetensors' name -> torch's name, bytes an item, bits that are all set in a number that is not
# finite (None: integers)
DTYPES: dict[str, tuple[str, int, int | None]] = {
    "F64": ("float64", 8, 0x7FF0_0000_0000_0000),
    "F32": ("float32", 4, 0x7F80_0000),
    "F16": ("float16", 2, 0x7C00),
    "BF16": ("bfloat16", 2, 0x7F80),
    "F8_E4M3": ("float8_e4m3fn", 1, 0x7F),
    "F8_E5M2": ("float8_e5m2", 1, 0x7C),
    "I64": ("int64", 8, None),
    "I32": ("int32", 4, None),
    "I16": ("int16", 2, None),
    "I8": ("int8", 1, None),
    "U8": ("uint8", 1, None),
    "BOOL": ("bool", 1, None),
}


Entry = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, begin, end


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Tensor:
    """`dtype` by torch's name. `finite`: no NaN, no infinity. `zero`: every number is 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    finite: bool
    zero: bool


def read(source: Readable, size: int) -> Iterator[Tensor]:
    """The tensors of a safetensors file of `size` bytes, in the order in which they lie there; the
    stream is read to its end.

    Raises ValueError, naming the tensor, where header and bytes do not fit together."""
    entries, length = _entries(source, size)
    at = 0
    for name, dtype, shape, begin, end in entries:
        if begin != at:
            raise ValueError(f"{name} begins at byte {begin}, the tensor before it ends at {at}")
        finite, zero = _look(source, dtype, end - begin)
        yield Tensor(name, DTYPES[dtype][0], shape, finite, zero)
        at = end
    if at != size - 8 - length:
        raise ValueError(f"its tensors take {at} bytes, the file has {size - 8 - length}")


def names(source: Readable, size: int) -> list[str]:
    """The tensors' names in a safetensors file of `size` bytes, by its header alone. Raises
    ValueError, also for a file that ends before its tensors do."""
    entries, length = _entries(source, size)
    end, held = (entries[-1][-1] if entries else 0), size - 8 - length
    if end != held:
        raise ValueError(f"its tensors take {end} bytes, the file has {held}")
    return [entry[0] for entry in entries]


def _entries(source: Readable, size: int) -> tuple[list[Entry], int]:
    """The header's rows in the order of the bytes, and its own length. Raises ValueError."""
    length = int.from_bytes(_exactly(source, 8), "little")
    if length > MAX_HEADER or length > size - 8:
        raise ValueError(f"its header claims {length} bytes of a file of {size}")
    return _header(_exactly(source, length)), length


def _header(text: bytes) -> list[Entry]:
    """In the order of the bytes. Raises ValueError."""
    rows = strict_json(text)
    if not isinstance(rows, dict):
        raise ValueError("its header is not a JSON object")
    found = []
    for name, row in rows.items():
        if name == "__metadata__":
            if not isinstance(row, dict) or not all(isinstance(v, str) for v in row.values()):
                raise ValueError("__metadata__ is not a map of texts")
            continue
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {dtype!r:.40}, which nothing here reads")
        if (
            not _counts(shape, MAX_DIMENSIONS)
            or not _counts(offsets, 2)
            or len(offsets) != 2
            or offsets[0] > offsets[1]
        ):
            raise ValueError(f"{name} has shape {shape!r:.80} and data_offsets {offsets!r:.80}")
        if math.prod(shape) * DTYPES[dtype][1] != offsets[1] - offsets[0]:
            raise ValueError(
                f"{name} is {dtype} {shape}, yet takes {offsets[1] - offsets[0]} bytes"
            )
        found.append((name, dtype, tuple(shape), offsets[0], offsets[1]))
    return sorted(found, key=lambda entry: entry[3:])


def strict_json(text: bytes) -> Any:
    """JSON in UTF-8 without a key twice. Raises ValueError, also for nesting that Python cannot
    follow."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            raise ValueError("it has a key twice")
        return row

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _counts(value: Any, most: int) -> bool:
    """Whether `value` is a list of at most `most` whole numbers, each small enough to multiply."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(n) is int and 0 <= n <= MAX_LENGTH for n in value)
    )


def _look(source: Readable, dtype: str, count: int) -> tuple[bool, bool]:
    """Are `count` bytes of `dtype` all finite, and all zero? By bit pattern, since numpy has
    neither bf16 nor fp8."""
    import numpy as np

    _, item, mask = DTYPES[dtype]
    without_sign = np.array((1 << (8 * item - 1)) - 1 if mask else (1 << 8 * item) - 1, f"<u{item}")
    largest = 0
    while count:
        data = np.frombuffer(_exactly(source, min(count, _PIECE)), f"<u{item}")
        count -= data.nbytes
        largest = max(largest, int((data & without_sign).max()))
    # The bits of a float without its sign grow with its size; infinity and NaN have every exponent
    # bit set and come last. (fp8 e4m3 has no infinity: 0x7f alone is NaN, and the largest.)
    return mask is None or largest < mask, largest == 0


def _exactly(source: Readable, count: int) -> bytes:
    data = source.read(count)
    if len(data) == count:
        return data
    pieces = [data]
    have = len(data)
    while have < count:
        data = source.read(count - have)
        if not data:
            raise ValueError(f"it ends {count - have} bytes too early")
        pieces.append(data)
        have += len(data)
    return b"".join(pieces)
