"""A BERT encoder of MiniLM-L6's shape (Wang et al. 2020): 6 layers of ``x = norm(x + f(x))``, 384 wide.

Weights are random; the graph is that of Hugging Face's ``BertModel`` without the pooler: learned positions, one token
type, post-norm, exact GELU, attention with an additive mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The sizes of an encoder; those of MiniLM-L6 by default."""

    layers: int = 6
    hidden: int = 384
    heads: int = 12
    intermediate: int = 1536
    vocabulary: int = 30_522
    positions: int = 512
    eps: float = 1e-12


class Attention(nn.Module):
    """``softmax(q k^T / sqrt(d) + mask) v``, projected."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(shape.hidden, shape.hidden) for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.output(y.transpose(1, 2).flatten(2))
        return y  # type: ignore[no-any-return]  # modules are untyped


class Layer(nn.Module):
    """Attention and a feed-forward block, each with its residual sum and norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.attention_norm = nn.LayerNorm(shape.hidden, shape.eps)
        self.intermediate = nn.Linear(shape.hidden, shape.intermediate)
        self.output = nn.Linear(shape.intermediate, shape.hidden)
        self.output_norm = nn.LayerNorm(shape.hidden, shape.eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, mask))
        y = self.output(F.gelu(self.intermediate(x)))
        x = self.output_norm(x + y)
        return x


class Bert(nn.Module):
    """``(input_ids, attention_mask)``, both int64 [N, T], to the last hidden state [N, T, hidden]."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        shape = shape or Shape()
        self.word = nn.Embedding(shape.vocabulary, shape.hidden)
        self.position = nn.Embedding(shape.positions, shape.hidden)
        self.token_type = nn.Embedding(2, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, shape.eps)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        x = self.word(input_ids) + self.position.weight[:tokens] + self.token_type.weight[0]
        x = self.norm(x)
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask)
        return x  # type: ignore[no-any-return]  # modules are untyped
