"""The original LLaMA layout (params.json, consolidated.NN.pth, tokenizer.model) to what
transformers loads, without torch.

A .pth file is a zip: a pickle that names tensors, and each tensor's bytes beside it. The pickle is
read by an unpickler that knows three names and refuses the rest, so nothing in it can run. The
bytes are mapped, regrouped and written as safetensors, one shard a layer group, in the precision
that they have.

What changes: names; model-parallel shards joined; and rows of wq and wk, because Meta's code
rotates neighbouring pairs of a head's dimensions (2i, 2i+1) and transformers' rotates halves (i, i
+ d/2). Formula: row 2i+j of a head goes to j*d/2 + i.
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ops.errors import PreflightError

DTYPES = {
    "HalfStorage": ("F16", np.uint16),
    "BFloat16Storage": ("BF16", np.uint16),
    "FloatStorage": ("F32", np.uint32),
}
CONFIG_DTYPE = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
ROWS, COLUMNS, WHOLE = 0, 1, None  # how a tensor was cut for model parallelism
TOP = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "norm.weight": ("model.norm.weight", WHOLE),
    "output.weight": ("lm_head.weight", ROWS),
}
LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "attention_norm.weight": ("input_layernorm.weight", WHOLE),
    "ffn_norm.weight": ("post_attention_layernorm.weight", WHOLE),
}
SHARD_BYTES = 4 << 30
Progress = Callable[[str], None]


def convert(
    source: Path, target: Path, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write config.json, safetensors and the tokenizer into the new folder ``target``; returns the
    shards.

    Raises PreflightError for a missing or torn file, a tensor that the layout does not have, or a
    pickle that names anything but tensors. Memory: one tensor at a time.
    """
    params, checkpoints = _read_params(source), sorted(source.glob("consolidated.*.pth"))
    if not checkpoints:
        raise PreflightError(
            f"{source} has no consolidated.NN.pth", hint="name the folder of one size, as LLaMA/7B"
        )
    if target.exists() and any(target.iterdir()):
        raise PreflightError(f"{target} is not empty", hint="name a new folder")
    with _Parts(checkpoints) as parts:
        names = parts.common_names()
        sizes = {name: parts.shape(name) for name in names}
        plan = [(name, *_new_name(name)) for name in sorted(names, key=_order)]
        target.mkdir(parents=True, exist_ok=True)
        shards = _write_shards(parts, plan, params, target, progress, shard_bytes)
        config = _config(params, sizes, parts)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in ("tokenizer.model", "LICENSE", "LICENSE.txt", "USE_POLICY.md"):
        for folder in (source, source.parent):
            if (folder / name).is_file() and not (target / name).exists():
                shutil.copyfile(folder / name, target / name)
    return shards


class _Tensor:
    """A tensor as the pickle names it: which storage, which part of it, its shape."""

    def __init__(
        self, storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.kind, self.key = storage
        self.offset, self.shape, self.stride = offset, shape, stride


class _Unpickler(pickle.Unpickler):
    """Knows tensors, ordered dictionaries and storages; refuses every other name before it is
    looked up.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(
                storage, offset, shape, stride
            )
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in DTYPES:
            return name
        raise PreflightError(
            f"the checkpoint's pickle names {module}.{name}, which is no tensor: it is refused",
            hint="get the weights from where they were published; this file can run code",
        )

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, storage, key, *_ = pid
        if kind != "storage" or storage not in DTYPES:
            raise PreflightError(
                f"the checkpoint holds a {storage}, expected one of {', '.join(DTYPES)}",
                hint="convert it to bf16 first",
            )
        return storage, key


class _Part:
    """One consolidated.NN.pth, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise PreflightError(
                f"{path.name} is not a whole checkpoint: {error}",
                hint="download it again: it broke off",
            ) from error
        pickled = next(name for name in self.zip.namelist() if name.endswith("/data.pkl"))
        self.root = pickled.removesuffix("data.pkl")
        with self.zip.open(pickled) as file:
            self.tensors: dict[str, _Tensor] = _Unpickler(file).load()
        self.file = path.open("rb")
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """The tensor's bits as unsigned integers of its width: no value is touched."""
        tensor = self.tensors[name]
        bits = np.dtype(DTYPES[tensor.kind][1])
        info = self.zip.getinfo(f"{self.root}data/{tensor.key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise PreflightError(
                f"{self.path.name}: {name} is compressed, which torch.save never does",
                hint="download it again",
            )
        local = self.map[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        storage = np.frombuffer(self.map, bits, info.file_size // bits.itemsize, start)
        strides = tuple(step * bits.itemsize for step in tensor.stride)
        return np.lib.stride_tricks.as_strided(
            storage[tensor.offset :], tensor.shape, strides, writeable=False
        )

    def close(self) -> None:
        self.zip.close()
        self.file.close()  # the map goes with its last array


class _Parts:
    """All model-parallel parts of one checkpoint."""

    def __init__(self, paths: list[Path]) -> None:
        self.parts = [_Part(path) for path in paths]

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self.parts:
            part.close()

    def common_names(self) -> list[str]:
        first = self.parts[0].tensors.keys()
        for part in self.parts[1:]:
            if odd := first ^ part.tensors.keys():
                raise PreflightError(
                    f"{part.path.name} and {self.parts[0].path.name} differ in {sorted(odd)[0]}",
                    hint="download them again",
                )
        return [name for name in first if not name.endswith("rope.freqs")]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the joined tensor."""
        shapes = [part.tensors[name].shape for part in self.parts]
        axis = self.axis(name)
        if axis is WHOLE or len(shapes) == 1:
            return shapes[0]
        return tuple(
            sum(shape[i] for shape in shapes) if i == axis else shapes[0][i]
            for i in range(len(shapes[0]))
        )

    def axis(self, name: str) -> int | None:
        """Along which the parts are cut. The embedding is cut by columns in LLaMA 1 and 2, by rows
        from 3 on: its width tells.
        """
        tensors = self.parts[0].tensors
        if (
            name == "tok_embeddings.weight"
            and tensors[name].shape[1] == tensors["norm.weight"].shape[0]
        ):
            return ROWS
        return _new_name(name)[1]

    def joined(self, name: str) -> np.ndarray:
        arrays = [part.read(name) for part in self.parts]
        axis = self.axis(name)
        return arrays[0] if axis is WHOLE or len(arrays) == 1 else np.concatenate(arrays, axis)

    def dtype(self, name: str) -> str:
        return DTYPES[self.parts[0].tensors[name].kind][0]


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """wq or wk, (heads * d, in): within each head, row 2i + j moves to j * d/2 + i."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _write_shards(
    parts: _Parts,
    plan: list[tuple[str, str, int | None]],
    params: dict[str, Any],
    target: Path,
    progress: Progress,
    shard_bytes: int,
) -> list[Path]:
    groups: list[list[tuple[str, str]]] = [[]]
    filled = 0
    for old, new, _ in plan:
        size = (
            int(np.prod(parts.shape(old)))
            * np.dtype(DTYPES[parts.parts[0].tensors[old].kind][1]).itemsize
        )
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((old, new))
        filled += size
    paths: list[Path] = []
    where: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        progress(f"writing {name}: {len(group)} tensors")
        total += _write_shard(parts, group, params, target / name)
        where |= {new: name for _, new in group}
        paths.append(target / name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
    return paths


def _write_shard(
    parts: _Parts, group: list[tuple[str, str]], params: dict[str, Any], path: Path
) -> int:
    """Write one safetensors file (8 bytes of length, JSON, data); returns the bytes of data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for old, new in group:
        shape = list(parts.shape(old))
        size = int(np.prod(shape)) * np.dtype(DTYPES[parts.parts[0].tensors[old].kind][1]).itemsize
        header[new] = {"dtype": parts.dtype(old), "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for old, _ in group:
            out.write(np.ascontiguousarray(_rotated(old, parts.joined(old), params)).data)
    return end


def _rotated(name: str, weight: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    if name.endswith("attention.wq.weight"):
        return halves_from_pairs(weight, params["n_heads"])
    if name.endswith("attention.wk.weight"):
        return halves_from_pairs(weight, params.get("n_kv_heads") or params["n_heads"])
    return weight


def _read_params(source: Path) -> dict[str, Any]:
    try:
        params = json.loads((source / "params.json").read_text())
        return {
            **params,
            "dim": int(params["dim"]),
            "n_layers": int(params["n_layers"]),
            "n_heads": int(params["n_heads"]),
        }
    except (OSError, ValueError, KeyError) as error:
        raise PreflightError(
            f"{source / 'params.json'} cannot be read: {error}",
            hint="name the folder of one size, as LLaMA/7B",
        ) from error


def _new_name(name: str) -> tuple[str, int | None]:
    if name in TOP:
        return TOP[name]
    if (found := re.fullmatch(r"layers\.(\d+)\.(.+)", name)) and found[2] in LAYER:
        new, axis = LAYER[found[2]]
        return f"model.layers.{found[1]}.{new}", axis
    raise PreflightError(
        f"the checkpoint has a tensor {name!r}, which LLaMA's layout has not",
        hint="only LLaMA's own .pth files are converted",
    )


def _order(name: str) -> tuple[int, str]:
    found = re.match(r"layers\.(\d+)\.", name)
    return (int(found[1]) if found else -1 if name.startswith("tok") else 1 << 20), name


def _config(
    params: dict[str, Any], sizes: dict[str, tuple[int, ...]], parts: _Parts
) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM. The vocabulary is counted, because params.json of LLaMA 1
    says -1.
    """
    vocabulary = sizes["output.weight"][0]
    layers = {int(found[1]) for name in sizes if (found := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) != params["n_layers"]:
        raise PreflightError(
            f"params.json says {params['n_layers']} layers, the checkpoint has {len(layers)}",
            hint="download it again",
        )
    theta, epsilon = float(params.get("rope_theta", 10000.0)), float(params["norm_eps"])
    context = (
        8192 if vocabulary > 32000 else 2048 if epsilon <= 1e-6 else 4096
    )  # params.json does not say: LLaMA 3, 1, 2
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": params["dim"],
        "intermediate_size": sizes["layers.0.feed_forward.w1.weight"][0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": int(params.get("n_kv_heads") or params["n_heads"]),
        "rms_norm_eps": epsilon,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": CONFIG_DTYPE[parts.dtype("output.weight")],
    }
