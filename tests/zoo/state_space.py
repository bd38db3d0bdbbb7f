"""State-space models and linear recurrences."""

import torch
from torch import nn

from tests.zoo.case import VOCABULARY, case, tokens

FAMILY = "state space"


def _mamba(use_associative_scan: bool) -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            state_size=4,
            num_hidden_layers=2,
            expand=2,
            conv_kernel=3,
            use_associative_scan=use_associative_scan,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            use_cache=False,
        )
    )


@case(FAMILY, tokens(4), fallback=("*.A_log",))
def mamba() -> nn.Module:
    """The recurrence step by step."""
    return _mamba(use_associative_scan=False)


@case(FAMILY, tokens(4), dtype=torch.float32, refused={"*": "operator of higher order"})
def mamba_by_associative_scan() -> nn.Module:
    """The recurrence by an operator of higher order; only when it is compiled, and not with the roundings of the loop."""
    return _mamba(use_associative_scan=True)


@case(FAMILY, tokens())
def mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=8,
            state_size=4,
            num_hidden_layers=2,
            expand=2,
            conv_kernel=3,
            num_heads=4,
            head_dim=4,
            n_groups=1,
            chunk_size=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            use_cache=False,
        )
    )


@case(FAMILY, tokens(3), fallback=("*.time_mix_*",))
def rwkv() -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(
        RwkvConfig(
            vocab_size=VOCABULARY,
            context_length=8,
            hidden_size=8,
            attention_hidden_size=8,
            num_hidden_layers=2,
            intermediate_size=12,
            bos_token_id=1,
            eos_token_id=1,
            use_cache=False,
        )
    )
