"""Train a GPT-2 on the Python standard library, saving without stopping; resume bit for bit.

    python examples/train_gpt2.py --config tiny --steps 200 --save-every 20 --root runs/tiny
    kill -9 <its pid>                     # any time; or `kill`, which saves one more step and leaves
    python examples/train_gpt2.py --config tiny --steps 200 --save-every 20 --root runs/tiny

The second command goes on from the newest durable checkpoint, and its losses equal those of a run
that was never killed, bit for bit. For that, everything that decides the next step is in the state:
parameters, moments, schedule, random generators (dropout draws from them) and the position in the data.

Nothing is downloaded: the text is the ``.py`` files of the running Python, read as bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asyncckpt as ac


# --------------------------------------------------------------------------------------------- model
@dataclass(frozen=True)
class Config:
    """Shape of a GPT-2. ``vocab_size`` may exceed the 256 byte values that occur in the text."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int = 256
    dropout: float = 0.1


CONFIGS = {
    "tiny": Config(n_layer=2, n_head=2, n_embd=64, block_size=64),
    "mini": Config(n_layer=4, n_head=4, n_embd=256, block_size=64),
    "small": Config(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "124M": Config(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257),
}


class Attention(nn.Module):
    """Causal self-attention over ``(batch, time, n_embd)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        batch, time_steps, width = x.shape
        q, k, v = (
            part.view(batch, time_steps, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed = self.c_proj(mixed.transpose(1, 2).reshape(batch, time_steps, width))
        return F.dropout(mixed, self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    """One transformer block, normalised before each half (GPT-2, section 2.3)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019); the output layer shares its weight with the token embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: one storage under two names
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # residual layers start smaller (GPT-2, section 2.3)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of predicting *targets*, both ``(batch, time)`` of int64."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------- data
def read_corpus(max_bytes: int = 8 << 20) -> Tensor:
    """The standard library's sources, in name order, as one uint8 tensor."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


class TextLoader:
    """Endless shuffled batches; its position is two integers, so it resumes exactly.

    Args:
        text: one-dimensional uint8 tensor.
        batch_size: sequences per batch.
        block_size: tokens per sequence.
        seed: of the order; epoch ``e`` is shuffled by ``seed + e``.
    """

    def __init__(self, text: Tensor, batch_size: int, block_size: int, seed: int) -> None:
        self.text = text
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.digest = hashlib.sha256(text.numpy().data).hexdigest()
        self.num_batches = (len(text) - 1) // block_size // batch_size
        if self.num_batches == 0:
            raise ValueError(f"{len(text)} bytes of text are too few for one batch of {batch_size} x {block_size}")
        self._start_epoch(0, 0)

    def _start_epoch(self, epoch: int, position: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        self.epoch, self.position = epoch, position
        self._order = torch.randperm((len(self.text) - 1) // self.block_size, generator=generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == self.num_batches:
            self._start_epoch(self.epoch + 1, 0)
        first = self.position * self.batch_size
        starts = self._order[first : first + self.batch_size] * self.block_size
        self.position += 1
        rows = self.text[starts[:, None] + torch.arange(self.block_size + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["digest"] != self.digest:
            raise ValueError("the checkpoint was made with another text (another Python?), so it cannot resume exactly")
        self._start_epoch(state["epoch"], state["position"])


# ------------------------------------------------------------------------------------------ training
def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def warmup_cosine(step: int, *, warmup: int, total: int) -> float:
    """Factor of the learning rate: linear up over *warmup* steps, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


class Trainer:
    """Everything one training step needs, and the state that a checkpoint must hold."""

    def __init__(self, config: Config, *, steps: int, batch_size: int, seed: int, device: str) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.device = device
        self.model = GPT(config).to(device)
        self.optimizer = make_optimizer(self.model, learning_rate=1e-3)
        warmup = max(1, steps // 10)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, warmup=warmup, total=steps)
        )
        self.loader = TextLoader(read_corpus(), batch_size, config.block_size, seed)

    def state(self) -> ac.TrainingState:
        return ac.TrainingState(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, loader=self.loader
        )

    def step(self) -> float:
        """One optimizer step; returns the loss."""
        tokens, targets = (part.to(self.device) for part in next(self.loader))
        loss: Tensor = self.model(tokens, targets)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class LossLog:
    """Losses as JSON lines; floats also as hex, to be compared bit for bit."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, loss: float) -> None:
        self._file.write(json.dumps({"step": step, "loss": loss, "hex": loss.hex()}) + "\n")
        self._file.flush()  # a killed process keeps the lines it wrote


def say(message: str) -> None:
    print(message, flush=True)


def report_save(saving: ac.SaveFuture) -> None:
    """Print what a save cost: at once the time it blocked, later the time until it was durable."""
    say(f"save {saving.step} staged: blocked {saving.stats.blocked_s * 1e3:.1f} ms")

    def when_done(done: ac.SaveFuture) -> None:
        stats = done.stats
        if done.outcome != "durable":
            say(f"save {done.step} {done.outcome}: {done.exception()}")
            return
        say(
            f"save {done.step} durable after {stats.durable_s:.2f} s: {stats.raw_bytes / 1e6:.1f} MB stored as"
            f" {stats.stored_bytes / 1e6:.1f} MB"
        )

    saving.add_done_callback(when_done)


def train(options: argparse.Namespace) -> None:
    config = CONFIGS[options.config]
    config = replace(config, block_size=options.block_size or config.block_size)
    trainer = Trainer(
        config, steps=options.steps, batch_size=options.batch_size, seed=options.seed, device=options.device
    )
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    say(f"GPT-2 {options.config}: {num_parameters / 1e6:.1f} M parameters on {options.device}, pid {os.getpid()}")
    with ExitStack() as stack:
        ckpt = stack.enter_context(
            ac.Checkpointer(options.root, state=trainer.state(), when=ac.Every(steps=options.save_every))
        )
        log = stack.enter_context(LossLog(options.losses)) if options.losses else None
        if options.fresh and ckpt.latest is not None:
            sys.exit(f"{options.root} already holds step {ckpt.latest.step}: leave out --fresh, or take another --root")
        found = ckpt.restore()
        first = found.step + 1 if found else 0
        say(f"resumed after step {found.step}" if found else "started from scratch")
        started = time.perf_counter()
        step = first - 1
        for step in range(first, options.steps):
            loss = trainer.step()
            if log:
                log.write(step, loss)
            if step % options.log_every == 0 or step == options.steps - 1:
                say(f"step {step} loss {loss:.4f}")
            saving = ckpt.step(step, metrics={"loss": loss})
            if saving is None and step == options.steps - 1 and not ckpt.preempted:
                saving = ckpt.save(step, metrics={"loss": loss}, kind="final")
            if saving is not None:
                report_save(saving)
            if ckpt.preempted:
                say(f"told to stop: leaving after step {step}")
                break
        elapsed = time.perf_counter() - started
    say(f"done: {max(0, step + 1 - first)} steps in {elapsed:.1f} s")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", choices=CONFIGS, default="tiny", help="size of the model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--root", default="runs/gpt2", help="directory of the checkpoints")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", dest="fresh", action="store_false", help="go on where the root ends (default)")
    start.add_argument("--fresh", action="store_true", help="refuse a root that already holds checkpoints")
    parser.set_defaults(fresh=False)  # argparse would take the default of --resume, which is the opposite
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--block-size", type=int, help="tokens per sequence (default: the config's)")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="append each loss to this JSON lines file")
    parser.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="print every so many losses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    # cuBLAS reads this when it starts; without it, deterministic matrix products are refused on CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    train(parse_arguments(arguments))


if __name__ == "__main__":
    main()
