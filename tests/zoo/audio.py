"""Models of sound."""

from typing import Any

from torch import nn

from tests.zoo.case import VOCABULARY, case, rows

FAMILY = "audio"
_WAVES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
    conv_dim=(4, 4), conv_kernel=(4, 3), conv_stride=(3, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
    feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0,
    apply_spec_augment=False, pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip


@case(FAMILY, rows(60, name="input_values"), fallback=("*.parametrizations.weight.*",), graphs=4, between=0)
def wav2vec2() -> nn.Module:
    """Convolutions over the wave, weight norm on the convolution of positions."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return Wav2Vec2ForCTC(Wav2Vec2Config(**_WAVES))


@case(FAMILY, rows(60, name="input_values"), fallback=("*.parametrizations.weight.*",), graphs=4, between=0)
def hubert() -> nn.Module:
    from transformers import HubertConfig, HubertForCTC

    return HubertForCTC(HubertConfig(**_WAVES, feat_extract_norm="layer", do_stable_layer_norm=True))


@case(FAMILY, rows(12, 8, name="input_values"), fallback=("*_token", "*.position_embeddings"))
def audio_spectrogram_transformer() -> nn.Module:
    from transformers import ASTConfig, ASTForAudioClassification

    return ASTForAudioClassification(
        ASTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            patch_size=4,
            frequency_stride=4,
            time_stride=4,
            max_length=12,
            num_mel_bins=8,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
