"""The model as the original computes it, and attention by its definition: what ours is compared with."""

import torch
from torch import Tensor, nn


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax_j(scale q_i k_j) v_j of (B, n_head, d_head) tensors, by the whole matrix."""
    return ((scale * q.unsqueeze(-1) * k.unsqueeze(-2)).softmax(-1) @ v.unsqueeze(-1)).squeeze(-1)


class Head(nn.Module):
    """One head, its (d_head, d_head) attention matrix materialised and kept for the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.scale = config.n_embd**-0.5
        self.q, self.k, self.v = (nn.Linear(config.n_embd, config.d_head, bias=False) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (projection(x).unsqueeze(-1) for projection in (self.q, self.k, self.v))  # (B, d_head, 1)
        attention = self.dropout((q @ k.mT * self.scale).softmax(-1))
        return (attention @ v).squeeze(-1)


class HeadByHead(nn.Module):
    """The original's attention: a loop over heads. Takes the place of MultiHead."""

    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], -1)))


class NoAttention(nn.Module):
    """MultiHead with attention left out, o = v: the floor that the matrix products set."""

    def __init__(self, config):
        super().__init__()
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(self.qkv(x).chunk(3, -1)[2]))


def with_attention(model: nn.Module, config, attention: type[nn.Module]) -> nn.Module:
    """Return the model with every block's attention replaced, newly initialised."""
    for block in model.blocks:
        block.attn = attention(config)
    return model
