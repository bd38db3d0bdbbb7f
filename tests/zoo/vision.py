"""Models of images."""

from typing import Any

import torch
from torch import nn

from tests.zoo.case import VOCABULARY, case, images

FAMILY = "vision"
TINY: dict[str, Any] = dict(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=8,
    num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


@case(FAMILY, images(), fallback=("*.cls_token", "*.position_embeddings"))
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**TINY))


@case(FAMILY, images(), fallback=("*_token", "*.position_embeddings"))
def deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**TINY))


@case(FAMILY, images(), fallback=("*.cls_token", "*.relative_position_bias_table"))
def beit() -> nn.Module:
    """A table of relative positions, looked up without samples, and LayerScale."""
    from transformers import BeitConfig, BeitForImageClassification

    return BeitForImageClassification(
        BeitConfig(**TINY, use_relative_position_bias=True, layer_scale_init_value=0.1, drop_path_rate=0.0)
    )


@case(FAMILY, images(), fallback=("*.cls_token", "*.position_embeddings"), unused=("*.mask_token",))
def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    kept = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(**kept, mlp_ratio=2, drop_path_rate=0.0))


@case(FAMILY, images(), fallback=("*.relative_position_bias_table",))
def swin() -> nn.Module:
    """Windows: (windows * samples) rows, shifted, with a bias of relative positions."""
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=4,
            depths=[2],
            num_heads=[2],
            window_size=4,
            mlp_ratio=2,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0,
        )
    )


@case(FAMILY, images())
def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(patch_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=4, drop_path_rate=0.0)
    )


@case(FAMILY, images(), mixes=True)
def resnet() -> nn.Module:
    """Batch normalisation: the statistics of the batch are taken as given."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    )


@case(FAMILY, images(32), mixes=True, graphs=2)
def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[4, 8],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
        )
    )


def _images_and_texts(num: int) -> dict[str, Any]:
    ids = torch.randint(2, VOCABULARY - 1, (num, 5))
    ids[:, -1] = VOCABULARY - 1  # the end of the text, whose row stands for the text
    return {"input_ids": ids, **images()(num)}


@case(
    FAMILY,
    _images_and_texts,
    ["image_embeds", "text_embeds"],
    refused={"logit_scale": "samples meet on different axes"},
)
def clip() -> nn.Module:
    """Two towers. The similarities of all images to all texts have no samples of their own, nor has their temperature."""
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, projection_dim=6)
    text = dict(vocab_size=VOCABULARY, max_position_embeddings=8, eos_token_id=VOCABULARY - 1, bos_token_id=1)
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, **text},
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            projection_dim=6,
        )
    )
