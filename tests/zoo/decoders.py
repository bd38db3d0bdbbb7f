"""Language models that read from left to right."""

from torch import nn

from tests.zoo.case import VOCABULARY, case, tokens

FAMILY = "decoder"
TINY = dict(
    vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, use_cache=False,
)  # fmt: skip
GROUPED = {**TINY, "num_key_value_heads": 1, "attention_dropout": 0.0}


@case(FAMILY, tokens(mask=True))
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


@case(FAMILY, tokens(mask=True))
def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, hidden_dropout=0.0, attention_dropout=0.0))


@case(FAMILY, tokens(mask=True))
def gptj() -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=8,
            n_layer=2,
            n_head=2,
            rotary_dim=4,
            bos_token_id=1,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


@case(FAMILY, tokens(mask=True))
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED))


@case(FAMILY, tokens(mask=True))
def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4))


@case(FAMILY, tokens(mask=True))
def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True))


@case(FAMILY, tokens(mask=True))
def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=4))


@case(FAMILY, tokens(mask=True))
def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=4))


@case(FAMILY, tokens())
def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=4, sliding_window=4))


@case(FAMILY, tokens(mask=True))
def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    kept = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    return OPTForCausalLM(
        OPTConfig(**kept, ffn_dim=12, word_embed_proj_dim=6, dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
    )


@case(FAMILY, tokens(mask=True), refused={"*": "torch.autograd.Function"})
def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCABULARY, hidden_size=8, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0
        )
    )


@case(FAMILY, tokens(mask=True))
def falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    kept = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    return FalconForCausalLM(FalconConfig(**kept, ffn_hidden_size=12, hidden_dropout=0.0, attention_dropout=0.0))


@case(FAMILY, tokens(mask=True))
def phi() -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**TINY, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0))


@case(FAMILY, tokens(mask=True))
def llama_with_lora() -> nn.Module:
    """A frozen model with trainable factors, by the library that most people use for it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(llama(), config)
