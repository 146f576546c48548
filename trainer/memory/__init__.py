"""Pure: how much GPU memory a training needs, before any weight is loaded. No torch: ops uses it to
choose cards. From `peak` down: the peak and the cards that hold it, its terms in bytes, the
dimensions of a model."""

from trainer.memory.counts import (
    active_in_experts,
    active_parameters,
    adapter_parameters,
    expert_parameters,
    linear_parameters,
    parameters,
    saved_parameters,
)
from trainer.memory.learned import Learned
from trainer.memory.peak import (
    BEFORE_AMPERE,
    CPU_TOKENS,
    GIB,
    MARGIN,
    RESERVED_GIB,
    Memory,
    base_splits,
    method_of,
    min_gpu_memory_gib,
    needed_gib,
    predict,
    solve,
    takes_fused_layer,
)
from trainer.memory.shape import Mixture, Shape, Targets
from trainer.memory.terms import holds_experts, weight_bytes

__all__ = [
    "BEFORE_AMPERE",
    "CPU_TOKENS",
    "GIB",
    "MARGIN",
    "RESERVED_GIB",
    "Learned",
    "Memory",
    "Mixture",
    "Shape",
    "Targets",
    "active_in_experts",
    "active_parameters",
    "base_splits",
    "adapter_parameters",
    "expert_parameters",
    "holds_experts",
    "linear_parameters",
    "method_of",
    "min_gpu_memory_gib",
    "needed_gib",
    "parameters",
    "predict",
    "saved_parameters",
    "solve",
    "takes_fused_layer",
    "weight_bytes",
]
