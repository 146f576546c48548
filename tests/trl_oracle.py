"""TRL 1.16 as an oracle of the stages: losses and gradients of given rows, in an environment of its
own (pip install torch==2.13.0 trl==1.16.0 transformers==5.24.0 peft==0.21.2).

    PYTHON_WITH_TRL tests/trl_oracle.py FOLDER   reads FOLDER/model, FOLDER/rows.json, writes
    FOLDER/golden.json

What both sides must have in common is here, and imports neither TRL nor our trainer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

START, POLICY = 1, 2  # seeds of the adapter that training starts from, and of it some steps later
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"label_smoothing": 0.1},
    "ipo": {},
    "hinge": {"beta": 1.0},
    "apo_zero": {},
    "apo_down": {},
    "ld": {"ld_alpha": 0.5},
    "sft": {"sft_weight": 0.5},
}
GRPO_CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "kl": {"loss_type": "dapo", "beta": 0.04},
}
ANSWER_TOKENS = 64  # at most
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def set_adapter(named: Iterable[tuple[str, Any]], seed: int) -> None:
    """Numbers for every LoRA matrix that depend on its name and the seed alone."""
    for name, parameter in named:
        if "lora_" not in name:
            continue
        name = name.replace(".ref.", ".default.")
        dice = np.random.default_rng([seed, *name.encode()])
        made = torch.from_numpy(dice.normal(0, 0.15, tuple(parameter.shape))).float()
        parameter.data.copy_(made)


def head(hidden: int) -> torch.Tensor:
    """The weight of a reward model's score, (1, hidden)."""
    return torch.from_numpy(np.random.default_rng(7).normal(0, 0.3, (1, hidden))).float()


def gradients(named: Iterable[tuple[str, Any]]) -> dict[str, list[float]]:
    """name -> norm, and product with fixed random numbers, of each trained matrix's gradient."""
    told = {}
    for name, parameter in sorted(named):
        if parameter.grad is None:
            continue
        name = name.split("base_model.model.")[-1].replace(".modules_to_save.default", "")
        dice = np.random.default_rng([3, *name.encode()])
        gradient = parameter.grad.double().cpu()
        other = torch.from_numpy(dice.normal(0, 1, tuple(gradient.shape)))
        told[name] = [float(gradient.norm()), float((gradient * other).sum())]
    return told


# -- TRL's side ------------------------------------------------------------------------------------


def padded(rows: list[dict[str, Any]], key: str = "ids", begin: str = "begin") -> dict[str, Any]:
    """input_ids, attention_mask and completion_mask of rows, padded at the right."""
    longest = max(len(row[key]) for row in rows)
    made = {
        k: torch.zeros(len(rows), longest, dtype=torch.long)
        for k in ("input_ids", "attention_mask", "completion_mask")
    }
    for k, row in enumerate(rows):
        n = len(row[key])
        made["input_ids"][k, :n] = torch.tensor(row[key])
        made["attention_mask"][k, :n] = 1
        made["completion_mask"][k, row[begin] : n] = 1
    return made


def told(loss: torch.Tensor, model: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    found = gradients(model.named_parameters())
    return {"loss": float(loss.detach()), "gradients": found}


def base(folder: Path) -> tuple[Any, Any]:
    """(model with the adapter at its start, tokenizer)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    set_adapter(peft.named_parameters(), START)
    return peft, AutoTokenizer.from_pretrained(folder / "model")


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
    }


def policy(trainer: Any) -> Any:
    named = [(n, p) for n, p in trainer.model.named_parameters() if ".default." in n]
    set_adapter(named, POLICY)
    trainer.model.train()
    return trainer.model


def dpo(folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    found = {}
    for name, settings in DPO_CASES.items():
        told_ = dict(settings)
        weight = told_.pop("sft_weight", None)
        kind = name if name not in ("ld", "sft") else "sigmoid"
        kinds = (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]}
            if weight
            else {"loss_type": [kind]}
        )
        pairs = rows["pairs"][:2] if weight else rows["pairs"]
        data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
        model, tokenizer = base(folder)
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**common(folder), **kinds, **told_),
            train_dataset=data,
            processing_class=tokenizer,
        )
        batch = padded(pairs[::2] + pairs[1::2])
        found[name] = told(trainer.compute_loss(policy(trainer), batch), trainer.model)
    return found


def kto(folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    data = Dataset.from_list(
        [{"prompt": "a", "completion": "b", "label": k % 2 == 0} for k in range(8)]
    )
    model, tokenizer = base(folder)
    args = KTOConfig(**common(folder), desirable_weight=1.3, undesirable_weight=0.8)
    trainer = KTOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = padded(rows["tagged"]) | {"label": torch.tensor([r["wanted"] for r in rows["tagged"]])}
    batch |= {f"KL_{k}": v for k, v in padded(rows["mismatched"]).items()}
    return {"kto": told(trainer.compute_loss(policy(trainer), batch), trainer.model)}


def rm(folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    found = {}
    for name, center in (("rm", None), ("rm, centred", 0.01)):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "model", num_labels=1, dtype=torch.float32
        )
        model.config.pad_token_id = 0
        peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA))
        data = Dataset.from_list([{"chosen": "b", "rejected": "c"}] * 8)
        args = RewardConfig(**common(folder), center_rewards_coefficient=center)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        trainer = RewardTrainer(peft, args=args, train_dataset=data, processing_class=tokenizer)
        with torch.no_grad():
            set_adapter(trainer.model.named_parameters(), POLICY)
            for key, parameter in trainer.model.named_parameters():
                if "score.modules_to_save" in key:
                    parameter.copy_(head(parameter.shape[1]))
        batch = padded(rows["pairs"][::2] + rows["pairs"][1::2])
        del batch["completion_mask"]
        batch["margin"] = torch.tensor(rows["margins"])
        trainer.model.train()
        found[name] = told(trainer.compute_loss(trainer.model, batch), trainer.model)
    return found


def grpo(folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    """The answers of all pairs, drawn from the start, with the policy moved since."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    found, answers = {}, rows["pairs"]
    prompts = [row["ids"][: row["begin"]][::-1] for row in answers]
    ends = [row["ids"][row["begin"] :] for row in answers]
    asked = padded([{"ids": p, "begin": 0} for p in prompts])
    said = padded([{"ids": e, "begin": 0} for e in ends])
    batch = {
        "prompt_ids": asked["input_ids"].flip(1),
        "prompt_mask": asked["attention_mask"].flip(1),
        "completion_ids": said["input_ids"],
        "completion_mask": said["attention_mask"],
        "advantages": torch.tensor(rows["advantages"]),
        "num_items_in_batch": said["attention_mask"].sum().float(),
    }
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    for name, settings in GRPO_CASES.items():
        model, tokenizer = base(folder)
        args = GRPOConfig(
            **common(folder), num_generations=2, max_completion_length=ANSWER_TOKENS, **settings
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
            processing_class=tokenizer,
        )
        trainer.current_gradient_accumulation_steps = 1
        with torch.no_grad():
            old = trainer._get_per_token_logps_and_entropies(
                trainer.model, whole, mask, batch["completion_ids"].shape[1]
            )[0]
        moved = batch | {"old_per_token_logps": old, "ref_per_token_logps": old}
        found[name] = told(trainer._compute_loss(policy(trainer), moved), trainer.model)
    return found


def of_means(rows: dict[str, Any]) -> dict[str, Any]:
    """ORPO's term and SimPO of mean log-probabilities (pairs, 2)."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    means = torch.tensor(rows["means"])
    here = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=0.0,
        beta=2.0,
        loss_type="simpo",
        simpo_gamma=1.0,
        label_smoothing=0.0,
    )
    simpo = CPOTrainer.cpo_loss(here, means[:, 0], means[:, 1])[0]
    here.beta = 0.1
    orpo = -ORPOTrainer.odds_ratio_loss(here, means[:, 0], means[:, 1])[0]
    return {"simpo": simpo.tolist(), "orpo_term": orpo.tolist()}


def main(folder: Path) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    found: dict[str, Any] = {"rows": rows}
    found |= {"dpo": dpo(folder, rows), "kto": kto(folder, rows), "rm": rm(folder, rows)}
    found |= {"grpo": grpo(folder, rows), "means": of_means(rows)}
    (folder / "golden.json").write_text(json.dumps(found, indent=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
