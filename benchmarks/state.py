"""The state that is saved: GPT-2 124M with AdamW, as it is in training.

What matters for a checkpoint is the number and sizes of the tensors and how well their values compress.
The model has GPT-2's shapes: 12 layers of 768, vocabulary 50257, 1024 positions, an output layer that
reuses the token embedding (not listed a second time, so that no peer writes it twice), and a final
normalisation without parameters. That makes 146 parameters; with AdamW's two moments 438 tensors of
more than 512 bytes and 1.493 GB, plus 146 step counters.

The values come from training, not from a generator: GPT-2's initialisation (normal, 0.02, residual
projections 0.02 / sqrt(2 * layers)), then a few real AdamW steps on Zipf-distributed tokens. So weights
have the exponents of weights, and moments the exponents of moments. Position embeddings beyond the
short sequences keep zero moments: 0.4 % of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "HEADER_BYTES", "SIZES", "TrainingState", "build_state", "iter_tensors", "new_state", "training", "with_optimizer",
]  # fmt: skip

HEADER_BYTES = 512
"""Tensors up to this size lie in the header of a step, not in files of their own (format 1)."""


@dataclass(frozen=True)
class Size:
    """Shape of a GPT-2."""

    num_layers: int
    num_heads: int
    width: int
    block_size: int
    vocab_size: int


SIZES = {
    "tiny": Size(num_layers=2, num_heads=2, width=64, block_size=64, vocab_size=512),
    "124M": Size(num_layers=12, num_heads=12, width=768, block_size=1024, vocab_size=50257),
}


class Block(nn.Module):
    """One transformer block with GPT-2's twelve parameters."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.ln_1 = nn.LayerNorm(size.width)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(size.width, 3 * size.width), "c_proj": nn.Linear(size.width, size.width)}
        )
        self.ln_2 = nn.LayerNorm(size.width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(size.width, 4 * size.width), "c_proj": nn.Linear(4 * size.width, size.width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.attn["c_attn"](self.ln_1(x)).split(width, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attn["c_proj"](mixed)
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return cast(Tensor, x + self.mlp["c_proj"](hidden))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), the output layer tied to ``wte``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocab_size, size.width)
        self.wpe = nn.Embedding(size.block_size, size.width)
        self.h = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * size.num_layers) if residual else 1.0))
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of predicting each next token of *tokens*, ``(batch, time)`` of int64."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.wte(inputs) + self.wpe.weight[: inputs.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(F.layer_norm(x, x.shape[-1:]), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class TrainingState:
    """A model and its optimizer, with moments."""

    model: GPT
    optimizer: torch.optim.AdamW

    def objects(self) -> dict[str, Any]:
        """For savers that take objects with ``state_dict``."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        """For savers that take plain dictionaries."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, step counters included."""
        return [tensor for _, tensor in iter_tensors(self.state_dict())]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def num_large(self) -> int:
        """How many tensors are too large for a header."""
        return sum(tensor.nbytes > HEADER_BYTES for tensor in self.tensors())


def iter_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries and lists, with its ``/``-joined path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iter_tensors(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from iter_tensors(item, f"{path}/{index}")


def new_state(size: str, seed: int = 0) -> TrainingState:
    """An untrained model and an optimizer without moments: what a run restores into."""
    torch.manual_seed(seed)
    return with_optimizer(GPT(SIZES[size]))


def with_optimizer(model: GPT) -> TrainingState:
    """*model* and the optimizer it is trained with, without moments."""
    return TrainingState(model, torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1))


def build_state(size: str = "124M", *, num_steps: int = 2, seed: int = 0) -> TrainingState:
    """The state after *num_steps* real steps; the same bits for the same machine, threads and seed."""
    state = new_state(size, seed)
    for _ in training(state, size, num_steps):
        pass
    return state


def training(state: TrainingState, size: str, num_steps: int, num_sequences: int = 2) -> Iterator[int]:
    """Train *state*, a step for each item taken, and yield how many steps were taken."""
    shape = SIZES[size]
    # Token frequencies of text fall off like 1/rank (Zipf); uniform tokens would leave the embedding's moments flat.
    frequencies = 1.0 / torch.arange(1, shape.vocab_size + 1, dtype=torch.float64)
    length = min(shape.block_size, 64) + 1
    for step in range(1, num_steps + 1):
        tokens = torch.multinomial(frequencies, num_sequences * length, replacement=True).view(num_sequences, length)
        torch.autograd.backward(state.model(tokens))
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        yield step
