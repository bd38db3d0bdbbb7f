"""Mixtures of experts: which rows meet which weights depends on the data."""

from typing import Any

import torch
from torch import nn

from tests.zoo.case import case, token_pairs, tokens
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


@case(
    FAMILY,
    token_pairs,
    refused={"*": "graph"},  # rows are chosen by expert in eager code, between 28 graphs
    unused=("decoder.block.1.layer.2.mlp.experts.expert_3.*",),
    graphs=28,
    slow=True,
)
def switch_transformers() -> nn.Module:
    """A router with a capacity, large enough that no row is dropped."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes: dict[str, Any] = dict(vocab_size=50, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            **sizes,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
            expert_capacity=64,
            relative_attention_num_buckets=8,
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def _with(implementation: str, model: Any) -> nn.Module:
    model.set_experts_implementation(implementation)
    return model
