"""Models of sequences, in torch alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import NUM_SAMPLES, VOCABULARY, case, rows

FAMILY = "plain torch, sequences"


def ids(*shape: int) -> Any:
    return lambda num: {"x": torch.randint(0, VOCABULARY, (num, *shape))}


class _LSTMLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(VOCABULARY, 6), nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(x))[0])


@case(FAMILY, ids(5))
def lstm_language_model() -> nn.Module:
    return _LSTMLanguageModel()


class _GRUClassifier(nn.Module):
    """Both directions; time first, as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, bidirectional=True), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.transpose(0, 1))[0].mean(0))


@case(FAMILY, rows(6, 4))
def gru_classifier() -> nn.Module:
    return _GRUClassifier()


class _CellByCell(nn.Module):
    """A recurrence written out: the same cell at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 5)
        for step in x.unbind(1):
            hidden, cell = self.cell(step, (hidden, cell))
        return self.head(hidden)


@case(FAMILY, rows(4, 4), fallback=("cell.weight_*",))
def lstm_cells() -> nn.Module:
    return _CellByCell()


@case(FAMILY, lambda num: {"src": torch.randn(num, 5, 8)})
def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@case(FAMILY, lambda num: {"src": torch.randn(5, num, 8), "tgt": torch.randn(4, num, 8)}, sample_axis=1, output_axis=1)
def transformer_sequence_first() -> nn.Module:
    """Encoder and decoder of torch; samples on the second axis."""
    return nn.Transformer(8, 2, 1, 1, 12, dropout=0.0)


class _WaveNet(nn.Module):
    """Causal dilated convolutions with normalised weights and gates."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.inward = norm(nn.Conv1d(2, 4, 1))
        self.gates = nn.ModuleList(norm(nn.Conv1d(4, 8, 2, dilation=d)) for d in (1, 2))
        self.outward = nn.ModuleList(norm(nn.Conv1d(4, 4, 1)) for _ in range(2))
        self.head = nn.Conv1d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for gate, outward in zip(self.gates, self.outward, strict=True):
            filtered, gated = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, dim=1)
            x = x + outward(filtered.tanh() * gated.sigmoid())
        return self.head(x)


@case(FAMILY, rows(2, 9), fallback=("*.parametrizations.weight.*",))
def weight_normed_wavenet() -> nn.Module:
    return _WaveNet()


class _TextCNN(nn.Module):
    """One bag of words and filters of several widths."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.filters = nn.ModuleList(nn.Conv1d(6, 4, width) for width in (2, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).transpose(1, 2)
        return self.head(torch.cat([F.relu(f(x)).amax(2) for f in self.filters], 1))


@case(FAMILY, ids(7))
def text_cnn() -> nn.Module:
    return _TextCNN()


class _Seq2Seq(nn.Module):
    """Additive attention: parameters in an einsum and as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.randn(4, 6)), nn.Linear(4, 6, bias=False)
        self.score, self.bilinear = nn.Parameter(torch.randn(6)), nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("btd,de->bte", y, self.query)[:, :, None] + self.key(x)[:, None])
        weights = torch.einsum("bqke,e->bqk", hidden, self.score).softmax(-1)
        return self.bilinear(y, weights @ x)


@case(FAMILY, lambda num: {"x": torch.randn(num, 5, 4), "y": torch.randn(num, 2, 4)})
def additive_attention() -> nn.Module:
    return _Seq2Seq()


class _AsManyPositionsAsSamples(nn.Module):
    """Nothing but symbols can tell the axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(NUM_SAMPLES, 4))
        self.across, self.along = nn.Linear(NUM_SAMPLES, NUM_SAMPLES), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x + self.table)
        return self.along(self.across(x.transpose(1, 2)).transpose(1, 2).reshape(-1, 4)).view(x.shape)


@case(FAMILY, rows(NUM_SAMPLES, 4), fallback=("table",))
def as_many_positions_as_samples() -> nn.Module:
    return _AsManyPositionsAsSamples()
