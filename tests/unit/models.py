"""Tiny random models for tests."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class TinyAttention(nn.Module):
    """Query, key, value and output projections with grouped heads, like a decoder layer's."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        d = width // heads
        self.q_proj = nn.Linear(width, heads * d, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * d, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * d, bias=True)
        self.o_proj = nn.Linear(heads * d, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q_proj(x).tanh().sum(-1, keepdim=True) * self.k_proj(x).tanh().mean(-1, keepdim=True)
        wide = torch.cat([self.v_proj(x)] * (self.q_proj.out_features // self.v_proj.out_features), dim=-1)
        return self.o_proj(wide * mixed)


class TinyDecoder(nn.Module):
    """Embedding, attention, a wide layer, norm and a tied or untied output; any device, milliseconds a step."""

    def __init__(self, *, width: int = 32, heads: int = 4, kv_heads: int = 2, vocabulary: int = 50, tied: bool = True):
        super().__init__()
        self.config = SimpleNamespace(
            model_type="tiny", num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=width
        )
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.self_attn = TinyAttention(width, heads, kv_heads)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.self_attn(x)
        return self.lm_head(self.norm(x + self.down_proj(self.up_proj(x).relu())))


def tiny_decoder(seed: int = 0, **options: object) -> TinyDecoder:
    torch.manual_seed(seed)
    return TinyDecoder(**options)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    """The same batch for the same step number."""
    tokens = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
