"""State-space models and linear recurrences."""

from torch import nn

from tests.zoo.case import VOCABULARY, case, tokens

FAMILY = "state space"


@case(FAMILY, tokens())
def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=2, expand=2, conv_kernel=3,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, use_cache=False,
        )  # fmt: skip
    )


@case(FAMILY, tokens())
def mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=2, expand=2, conv_kernel=3, num_heads=4,
            head_dim=4, n_groups=1, chunk_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=1, use_cache=False,
        )  # fmt: skip
    )


@case(FAMILY, tokens())
def rwkv() -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(
        RwkvConfig(
            vocab_size=VOCABULARY, context_length=8, hidden_size=8, attention_hidden_size=8, num_hidden_layers=2,
            intermediate_size=12, bos_token_id=1, eos_token_id=1, use_cache=False,
        )  # fmt: skip
    )
