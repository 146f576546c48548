"""The result: adapter.zip that stock PEFT loads, re-opened and compared before it counts, and
result/manifest.json, written last."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from trainer.data.prepare import Prepared
from trainer.model.prompts import is_prompted
from trainer.result.engines import loads_in
from trainer.result.engines import table as engines_table
from trainer.result.files import read as read_adapter
from trainer.result.words import write_words
from trainer.wire.chain import CHAIN, Chain, Link, chain_of, weights_sha256
from trainer.wire.chain import How as LinkHow
from trainer.wire.digest import listed
from trainer.wire.job import WIRE, Job
from trainer.wire.prompts import PROMPT_METHODS

SAMPLES, SAMPLE_BYTES = 256, 4096  # of a file of the base


class ResultError(RuntimeError):
    """What was saved is not what was trained."""


def save_model(
    model: Any, job: Job, folder: Path, initial: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Writes the adapter (or, for full and freeze, the whole model) into `folder` and returns the
    tensors that must be in it, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    if job.training.trains_base:
        model.save_pretrained(folder, max_shard_size="1TB")
        held = {k: v for k, v in model.state_dict().items() if not _tied(k, model)}
        # a file has the experts of a mixture one by one, and older names
        return {k: v.detach().to("cpu") for k, v in revert_weight_conversion(model, held).items()}
    tensors = {  # tied ones too have a memory of their own in a file
        k: v.detach().to("cpu", copy=True).contiguous()
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    config = copy.deepcopy(model.peft_config["default"])
    if is_prompted(model):
        _without_start(config, job)
    elif config.use_rslora:  # others read it as plain LoRA, too weak by sqrt(r)
        tensors = _folded(model, tensors)
        config.use_rslora = False
    # PiSSA changed the base: written as a LoRA of twice the rank that takes the start values away
    # again, for the base as it is
    if initial:
        tensors |= {k: _less_start(k, tensors[k], start) for k, start in initial.items()}
        config.rank_pattern = {k: 2 * r for k, r in config.rank_pattern.items()}
        config.alpha_pattern = {k: 2 * a for k, a in config.alpha_pattern.items()}
        config.r, config.lora_alpha, config.init_lora_weights = (
            2 * config.r,
            2 * config.lora_alpha,
            True,
        )
    if hasattr(model, "score"):  # a reward model's head, named as SequenceClassification has it
        tensors["base_model.model.score.weight"] = model.score.weight.detach().to("cpu")
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    # PEFT puts the folder here, which means nothing on another machine
    config.base_model_name_or_path = job.model.base
    config.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    # PEFT writes a set, in any order: sorted, equal runs give equal bytes
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(settings.get(key), list):
            settings[key].sort()
    (folder / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )
    return tensors


def _without_start(config: Any, job: Job) -> None:
    """Names the base's tokenizer where PEFT names a folder of this machine."""
    if getattr(config, "tokenizer_name_or_path", None):
        config.tokenizer_name_or_path = job.model.base


def _folded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same adapter for a scale of alpha / r: what each layer scales by more goes into its B."""
    folded = dict(tensors)
    for name, layer in model.named_modules():
        key = f"{name}.lora_B.weight"
        if key in tensors and isinstance(layer, LoraLayer):
            more = layer.scaling["default"] * layer.r["default"] / layer.lora_alpha["default"]
            folded[key] = tensors[key] * more
    if missed := sum("lora_B" in k and folded[k] is tensors[k] for k in tensors):
        raise ResultError(f"{missed} tensors of lora_B belong to no layer: rsLoRA is not folded")
    return folded


def rehearse(model: Any, job: Job) -> None:
    """Saves a model and opens it again, in a folder that is gone afterwards: so a model that cannot
    be saved is refused before it is trained. Raises ResultError."""
    with tempfile.TemporaryDirectory() as folder:
        expected = save_model(model, job, Path(folder), {})
        for path in sorted(Path(folder).glob("*.safetensors")):
            compare(path, expected)


def _less_start(name: str, value: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, start], 0) if "lora_A" in name else torch.cat([value, -start], 1)


def _tied(name: str, model: nn.Module) -> bool:
    return name == "lm_head.weight" and bool(getattr(model.config, "tie_word_embeddings", False))


def compare(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Re-opens a safetensors file: same names, shapes, bytes as in memory, finite, not all zero.
    Returns name -> shape and dtype."""
    found: dict[str, dict[str, Any]] = {}
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        if expected and names != set(expected):
            raise ResultError(
                f"{path.name} holds {len(names)} tensors, {len(expected)} were trained: "
                f"{sorted(names ^ set(expected))[:3]}"
            )
        for name in sorted(names):
            tensor = file.get_tensor(name)
            if name in expected and not torch.equal(tensor, expected[name]):
                raise ResultError(f"{path.name}: {name} on disk differs from the one in memory")
            if not torch.isfinite(tensor).all():
                raise ResultError(f"{path.name}: {name} holds a number that is not finite")
            found[name] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
        if not any(file.get_tensor(n).any() for n in names if "lora_B" in n or "lora_" not in n):
            raise ResultError(f"{path.name}: everything that was to be trained is still zero")
    return found


def write_result(
    root: Path,
    model: nn.Module,
    job: Job,
    base: Path,
    data: Prepared,
    facts: dict[str, Any],
    home: dict[str, bytes],
    beside: dict[str, bytes],
    initial: dict[str, torch.Tensor],
) -> str:
    """result/adapter.zip and, last of all, result/manifest.json. Returns the zip's sha256. `facts`
    goes into the manifest as it is; the files of `home` are listed in it and come home with the
    zip, those of `beside` stay with the trainer; `initial` is model.start_values. Raises
    ResultError when what was written is not what was trained."""
    stage, result = root / ".result", root / "result"
    shutil.rmtree(stage, ignore_errors=True)
    expected = save_model(model, job, stage / "adapter", initial)
    tensors: dict[str, Any] = {}
    for path in sorted((stage / "adapter").glob("*.safetensors")):
        tensors |= compare(path, expected)
    proof = write_words(base, stage / "adapter", data)
    (stage / "adapter" / "README.md").write_text(
        card(job, facts, stage / "adapter"), encoding="utf-8"
    )
    chain = None
    if not job.training.trains_base:
        chain = chain_after(root, job, base, data, stage / "adapter", facts)
        (stage / "adapter" / CHAIN).write_text(chain.model_dump_json(indent=1), encoding="utf-8")
    members = zip_folder(stage / "adapter", stage / "adapter.zip")
    for name, content in (home | beside).items():
        (stage / name).write_bytes(content)
    shutil.rmtree(stage / "adapter")
    files = {name: listed(stage / name) for name in ("adapter.zip", *sorted(home))}
    manifest = {
        "wire": WIRE,
        "run_id": job.run_id,
        "stages": [s.model_dump(exclude_defaults=True) for s in job.stages],
        "base_model": job.model.base,
        "method": job.training.method,
        "files": files,
        "members": members,
        "tensors": tensors,
        "lora": job.lora.model_dump(),
        **_prompt_facts(job),
        "chain": None if chain is None else chain.model_dump(),
        "judge": None if job.judge is None else job.judge.model_dump(),
        "chat_template": proof,
        **facts,
    }
    shutil.rmtree(result, ignore_errors=True)
    stage.rename(result)
    part = result / ".manifest.part"
    part.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    part.rename(result / "manifest.json")
    return cast(str, files["adapter.zip"]["sha256"])


def _prompt_facts(job: Job) -> dict[str, Any]:
    """What the manifest says of a learned prompt: its settings, and the position of a row's first
    token. PEFT counts from 0 at the first learned place; ChatGLM's own files at the first token."""
    if job.training.method not in PROMPT_METHODS:
        return {}
    settings = job.prompt_learning.model_dump()
    return {"prompt_learning": settings | {"position_offset": settings["num_virtual_tokens"]}}


def chain_after(
    root: Path, job: Job, base: Path, data: Prepared, adapter: Path, facts: dict[str, Any]
) -> Chain:
    """The chain of the adapter in the folder `adapter`, this run last."""
    start, before = job.start or (job.merged[-1] if job.merged else None), None
    if start is not None:
        before = chain_of(root / start.path)
    links = [] if before is None else before.links
    if start is not None and before is None:  # another program made it: its stage is unknown
        links = [Link(stage="sft", run_id=start.name, how="new", sha256=start.sha256)]
    how: LinkHow = "merge" if job.merged else "new"
    if job.start is not None:
        how = job.start.how
    numbers = {name: after for name, (_, after) in facts.get("held_out", {}).items()}
    link = Link(
        stage=job.stage,
        run_id=job.run_id,
        how=how,
        sha256=weights_sha256(adapter),
        numbers=numbers,
    )
    return Chain(
        base=job.model.base,
        base_sha256=identity(base),
        template=data.token_hash,
        links=[*links, link],
    )


def merged_defect(adapter: Path, base: Path) -> str:
    """Why an adapter must not be used on `base`: it was trained on one with another merged into it.
    Empty where it may."""
    chain = chain_of(adapter)
    merged = [link for link in chain.links if link.how == "merge"] if chain else []
    if chain is None or not merged or identity(base) == chain.base_sha256:
        return ""
    before = chain.links[chain.links.index(merged[-1]) - 1]
    return (
        f"the adapter stands on {chain.base} with the adapter of {before.run_id} ({before.stage}) "
        "merged into it: merge that one first (`milktea merge`), and name what it makes as the base"
    )


def base_defect(adapter: Path, base: Path) -> str:
    """Why `base` is not the very model that an adapter was trained on. Empty where it is, and for
    an adapter that does not say."""
    chain = chain_of(adapter)
    if chain is None or identity(base) == chain.base_sha256:
        return ""
    return (
        f"{base.name}/ holds other weights or settings than the {chain.base} that the adapter was "
        "trained on: name that one (--base, or ID@REVISION of the hub)"
    )


def identity(base: Path) -> str:
    """The identity of a base model: a sha256 over its settings, the header of each of its files and
    SAMPLES places in each. It differs for another training, type or precision."""
    digest = hashlib.sha256((base / "config.json").read_bytes())
    for path in sorted(base.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(8)
            digest.update(header + file.read(min(int.from_bytes(header, "little"), size)))
            for k in range(SAMPLES):
                file.seek(max(0, size * (k + 1) // SAMPLES - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def zip_folder(folder: Path, archive: Path) -> dict[str, dict[str, Any]]:
    """Names sorted, times fixed: equal contents give equal archives. Weights are stored as they
    are: to make them 8 % smaller takes a minute a GB, on a box that is paid for. Returns name ->
    sha256 and bytes of the members."""
    members = {}
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = (
                zipfile.ZIP_STORED if path.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
            )
            entry.external_attr = 0o644 << 16
            with open(path, "rb") as source, out.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            members[name] = listed(path)
    return members


def card(job: Job, facts: dict[str, Any], folder: Path) -> str:
    """The model card that Hugging Face's hub shows, of what `folder` holds; nothing in it changes
    between equal runs."""
    training, lora, library = job.training, job.lora, "peft"
    adapter = f"| LoRA | r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout} |\n"
    if training.method in PROMPT_METHODS:
        k = job.prompt_learning.num_virtual_tokens
        adapter = f"| learned places | {k}; a row's first token stands at position {k} |\n"
    use = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{job.model.base}")
model = PeftModel.from_pretrained(base, "this folder")"""
    if job.stage == "rm":
        use = use.replace("CausalLM", "SequenceClassification")
        use = use.replace(f'("{job.model.base}")', f'("{job.model.base}", num_labels=1)')
    if training.trains_base:
        library, adapter = "transformers", ""
        use = (
            "from transformers import AutoModelForCausalLM\n\nmodel = "
            'AutoModelForCausalLM.from_pretrained("this folder")'
        )
    asked = (
        "The score of a conversation is read at the token that ends its last answer.\n"
        if job.stage == "rm"
        else "`milktea chat FOLDER` asks it questions with the template that it was trained with.\n"
    )
    engines = "" if training.trains_base else engines_table(loads_in(*read_adapter(folder)))
    return f"""---
base_model: {job.model.base}
library_name: {library}
tags: [{training.method}, {job.stage}, milktea]
---
# {job.run_id}

A {training.method} fine-tuning of `{job.model.base}` made by milktea.

| | |
|---|---|
| steps | {facts["steps"]} of {training.batch_size} rows |
| loss | {facts["curve"][0][1]:.4f} at first, {facts["final_loss"]:.4f} at last |
| learning rate | {training.learning_rate} ({training.lr_scheduler_type}) |
{adapter}| prompt template | {facts["template"]["name"]} (`template.json`) |
| data, sha256 | {", ".join(f"`{h[:12]}`" for h in facts["data_sha256"])} |

```python
{use}
```
{asked}
{engines}
"""
