"""Encoders of text."""

from torch import nn

from tests.zoo.case import VOCABULARY, case, tokens

FAMILY = "encoder"
TINY = dict(
    vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=16, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


@case(FAMILY, tokens(mask=True))
def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TINY))


@case(FAMILY, tokens(mask=True), dropout=True)
def bert_with_dropout() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{**TINY, "hidden_dropout_prob": 0.2}, num_labels=4))


@case(FAMILY, tokens(mask=True))
def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**TINY))


@case(FAMILY, tokens(mask=True))
def electra() -> nn.Module:
    from transformers import ElectraConfig, ElectraForPreTraining

    return ElectraForPreTraining(ElectraConfig(**TINY, embedding_size=6))


@case(FAMILY, tokens(mask=True), fallback=("*.albert_layers.0.attention.[qkvd]*.weight", "*.ffn*.weight"))
def albert() -> nn.Module:
    """One layer for all depths."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(AlbertConfig(**TINY, embedding_size=6, classifier_dropout_prob=0.0))


@case(FAMILY, tokens(mask=True))
def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForTokenClassification

    return DistilBertForTokenClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=8,
            n_layers=2,
            n_heads=2,
            hidden_dim=12,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )


@case(FAMILY, tokens(mask=True), fallback=("*.query_proj.weight", "*.key_proj.weight", "*.rel_embeddings.weight"))
def deberta_v2() -> nn.Module:
    """Content and positions attend to each other through shared projections."""
    from transformers import DebertaV2Config, DebertaV2ForTokenClassification

    return DebertaV2ForTokenClassification(
        DebertaV2Config(
            **TINY,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
            position_biased_input=False,
            pooler_dropout=0.0,
        )
    )


@case(FAMILY, tokens(mask=True))
def modernbert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            cls_token_id=1,
            sep_token_id=1,
            local_attention=4,
            global_attn_every_n_layers=2,
            reference_compile=False,
            attn_implementation="sdpa",
        )
    )


@case(FAMILY, tokens(), unused=("fnet.pooler.*",))
def fnet() -> nn.Module:
    """Fourier transforms in place of attention."""
    from transformers import FNetConfig, FNetForMaskedLM

    kept = {key: TINY[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    return FNetForMaskedLM(FNetConfig(**kept, max_position_embeddings=16, hidden_dropout_prob=0.0, pad_token_id=0))


@case(FAMILY, tokens(), fallback=("*.r_[rw]_bias",), unused=("*.r_s_bias", "*.seg_embed", "*.mask_emb"))
def xlnet() -> nn.Module:
    """Sequence first inside: (T, B, D)."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    return XLNetLMHeadModel(
        XLNetConfig(vocab_size=VOCABULARY, d_model=8, n_layer=2, n_head=2, d_inner=12, dropout=0.0, pad_token_id=0)
    )
