"""Models that read one sequence and write another."""

from typing import Any

import torch
from torch import nn

from tests.zoo.case import VOCABULARY, case, token_pairs

FAMILY = "encoder-decoder"


def spoken(channels: int, frames: int) -> Any:
    """Sound features for the encoder, tokens for the decoder."""
    return lambda num: {
        "input_features": torch.randn(num, channels, frames),
        "decoder_input_ids": torch.randint(2, VOCABULARY, (num, 5)),
    }


@case(FAMILY, token_pairs)
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


@case(FAMILY, token_pairs)
def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**_BART))


@case(FAMILY, token_pairs)
def pegasus() -> nn.Module:
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    return PegasusForConditionalGeneration(PegasusConfig(**_BART))


@case(FAMILY, spoken(6, 12))
def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(**_BART, num_mel_bins=6, max_source_positions=6, max_target_positions=16)
    )


@case(FAMILY, lambda num: {**spoken(12, 6)(num), "attention_mask": torch.ones(num, 12).long()})
def speech_to_text() -> nn.Module:
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    return Speech2TextForConditionalGeneration(
        Speech2TextConfig(
            **_BART, input_feat_per_channel=6, max_source_positions=16, max_target_positions=16, conv_channels=8
        )
    )


_BART: dict[str, Any] = dict(
    vocab_size=VOCABULARY, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16, dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    decoder_start_token_id=1, forced_eos_token_id=1, use_cache=False,
)  # fmt: skip
