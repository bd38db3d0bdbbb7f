"""Mixtures of experts: which rows meet which weights depends on the data."""

from typing import Any

import torch
from torch import nn

from tests.zoo.case import case, tokens
from tests.zoo.decoders import GROUPED

FAMILY = "mixture of experts"


def _mixtral(implementation: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0)
    return _with(implementation, MixtralForCausalLM(config))


@case(
    FAMILY,
    tokens(),
    refused={"*.embed_tokens.weight": "no captured graph", "*.experts.*": "no captured graph"},
    graphs=10,
    between=0,
    slow=True,
)
def mixtral_eager() -> nn.Module:
    """A loop over experts."""
    return _mixtral("eager")


@case(FAMILY, tokens())
def mixtral_batched() -> nn.Module:
    """Each row's own copy of its experts' weights."""
    return _mixtral("batched_mm")


@case(FAMILY, tokens(), dtype=torch.float32, refused={"*.experts.*": "samples are reordered"})
def mixtral_grouped() -> nn.Module:
    """Rows sorted by expert, and a product of groups, which torch has in float32 only."""
    return _mixtral("grouped_mm")


@case(FAMILY, tokens())
def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, shared_expert_intermediate_size=6
    )
    return _with("batched_mm", Qwen2MoeForCausalLM(config))


@case(FAMILY, tokens())
def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**GROUPED, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
    return _with("batched_mm", Qwen3MoeForCausalLM(config))


def _with(implementation: str, model: Any) -> nn.Module:
    model.set_experts_implementation(implementation)
    return model
