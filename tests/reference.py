"""Attention by its definition, and the model as the original computes it.

The tests compare our attention with these, and benchmark.py compares the time.
"""

import torch
from torch import Tensor, nn


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax_j(scale q_i k_j) v_j for q, k, v of shape (B, n_head, d_head)."""
    weights = attention_weights(q, k, scale)
    return torch.einsum("bhij,bhj->bhi", weights, v)


def attention_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return softmax_j(scale q_i k_j), the whole matrix (B, n_head, d_head, d_head)."""
    scores = scale * torch.einsum("bhi,bhj->bhij", q, k)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


class Head(nn.Module):
    """One head. Its (d_head, d_head) attention matrix is kept for the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.scale = config.n_embd**-0.5
        self.q = nn.Linear(config.n_embd, config.d_head, bias=False)
        self.k = nn.Linear(config.n_embd, config.d_head, bias=False)
        self.v = nn.Linear(config.n_embd, config.d_head, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, n_embd)
        q = self.q(x).unsqueeze(-1)  # (B, d_head, 1)
        k = self.k(x).unsqueeze(-1)
        v = self.v(x).unsqueeze(-1)
        scores = q @ k.mT * self.scale  # (B, d_head, d_head)
        weights = self.dropout(scores.softmax(-1))
        return (weights @ v).squeeze(-1)  # (B, d_head)


class HeadByHead(nn.Module):
    """The original's attention, a loop over heads. It can replace a script's MultiHead."""

    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, n_embd)
        out = torch.cat([head(x) for head in self.heads], -1)
        return self.dropout(self.proj(out))


class NoAttention(nn.Module):
    """MultiHead without attention: o = v. All that it costs is its matrix products."""

    def __init__(self, config):
        super().__init__()
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (..., n_embd)
        _, _, v = self.qkv(x).chunk(3, -1)
        return self.dropout(self.proj(v))


def with_attention(model: nn.Module, config, attention: type[nn.Module]) -> nn.Module:
    """Return the model with the attention of every block replaced, newly initialised."""
    for block in model.blocks:
        block.attn = attention(config)
    return model
