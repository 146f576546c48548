"""An adapter's files as somebody gives them, checked before anything believes them: the archive's
bounds, adapter_config.json, the tensors' names. No torch.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.wire.chain import CONFIG, MAX_TEXT, WEIGHTS
from trainer.wire.prompts import PEFT_TYPES
from trainer.wire.tensors import names as tensor_names
from trainer.wire.tensors import strict_json

# what PEFT 0.21 reads of a LoRA; a later one may write more
KNOWN = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "velora_config",
    "alora_invocation_tokens", "use_qalora", "qalora_group_size", "monteclora_config",
    "layer_replication", "runtime_config", "lora_bias", "target_parameters", "use_bdlora",
    "arrow_config", "kasa_config", "ensure_weight_tying",
)  # fmt: skip
# kinds of LoRA that add more to a weight than alpha / r * B A, or not to every token
VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the base stays as it is
TOWERS = ("vision", "visual", "image", "audio")  # parts of a model that reads more than text
PREFIX = "base_model.model."
MAX_MEMBERS = 1000
MAX_GROWTH, MAX_SMALL = 20, 64 << 20  # a file unpacks to so many times its size, and these bytes
_PAIRS = ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B"))
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class NoAdapter(ValueError):
    """The folder or archive holds no adapter of PEFT's."""


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """adapter_config.json and the tensors' names, of a folder or an archive. Raises NoAdapter."""
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise NoAdapter(f"{path} is no folder and no zip: give an adapter's folder or its zip")
    try:
        with ExitStack() as stack:
            place: Any = path
            if path.is_dir():
                size = (path / WEIGHTS).stat().st_size
            else:
                archive = stack.enter_context(zipfile.ZipFile(path))
                place, size = zipfile.Path(archive), archive.getinfo(WEIGHTS).file_size
            file = stack.enter_context((place / CONFIG).open("rb"))
            config = strict_json(file.read(MAX_TEXT))
            names = tensor_names(stack.enter_context((place / WEIGHTS).open("rb")), size)
        _validate(config)
        if config.get("peft_type") not in PEFT_TYPES.values():
            _validate_names(names)
    except (KeyError, *_UNREADABLE) as error:
        raise NoAdapter(
            f"{path} holds no LoRA of PEFT's ({CONFIG} with r and lora_alpha, {WEIGHTS}): {error}"
        ) from error
    return config, names


def _validate(config: Any) -> None:
    """Raises ValueError for settings that no LoRA and no learned prompt has."""
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is no JSON object")
    base = config.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and base.isprintable()):
        raise ValueError(f"base_model_name_or_path is {base!r:.60}, no name")
    kind = config.get("peft_type") or "LORA"
    if kind in PEFT_TYPES.values():
        return
    if kind != "LORA":
        raise ValueError(f"its peft_type is {kind!r:.40}")
    if not _is_rank(config.get("r")) or not _is_alpha(config.get("lora_alpha")):
        raise ValueError(f"r and lora_alpha of {CONFIG} are no numbers above 0")
    for name, sound in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(sound, pattern.values())):
            raise ValueError(f"{name} gives no module a number above 0")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _validate_names(names: Sequence[str]) -> None:
    """Raises ValueError for tensors that PEFT would not load, or of which half is missing."""
    held, pairs = set(names), 0
    for first, second in _PAIRS:
        for one, other in ((first, second), (second, first)):
            for name in (n for n in names if one in n and not n.endswith(".bias")):
                pairs += 1
                if name.replace(one, other) not in held:
                    raise ValueError(f"{name} has no {other.strip('.')} beside it")
    if not pairs:
        raise ValueError("it has no tensors of a LoRA")
    if odd := next((n for n in names if not n.startswith(PREFIX)), None):
        raise ValueError(f"{odd} does not begin with {PREFIX}, so PEFT would not load it")


def unknown(config: Mapping[str, Any]) -> str:
    """The settings that ask for something and that PEFT 0.21 does not know, "" without any. A later
    PEFT wrote them, and this one would leave them out."""
    odd = sorted(k for k, v in config.items() if k not in KNOWN and v not in (None, False, {}, []))
    return ", ".join(odd)


def variant(config: Mapping[str, Any]) -> str:
    """The first of VARIANTS that the settings ask for, "" without any."""
    return next((name for name in VARIANTS if config.get(name)), "")


@contextmanager
def unpacked(adapter: Path) -> Iterator[Path]:
    """The adapter's folder; an archive is unpacked into a temporary one. Raises NoAdapter for an
    archive that cannot be unpacked, or that would grow beyond what adapters do."""
    if adapter.is_dir():
        yield adapter
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(adapter) as archive:
                _validate_members(archive, adapter.stat().st_size, Path(folder))
                archive.extractall(folder)
        except FileNotFoundError as error:
            raise NoAdapter(f"there is no {adapter}") from error
        except _UNREADABLE as error:
            raise NoAdapter(f"{adapter} cannot be unpacked: {error}") from error
        yield Path(folder)


def _validate_members(archive: zipfile.ZipFile, size: int, folder: Path) -> None:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"it holds {len(members)} files, an adapter has few")
    if len({m.filename for m in members}) < len(members):
        raise ValueError("it holds two files of one name")
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
            raise ValueError(f"{member.filename!r:.80} leads out of it")
    whole = sum(m.file_size for m in members)
    if whole > MAX_GROWTH * size + MAX_SMALL:
        raise ValueError(f"{size:,} bytes would become {whole:,}: no adapter does that")
    if whole > shutil.disk_usage(folder).free:
        raise ValueError(f"{folder.parent} has no room for its {whole / 1e9:.1f} GB")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else, OSError."""
    try:
        told = strict_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no JSON object")
    return told
