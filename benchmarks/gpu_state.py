"""What is trained on the GPU: a GPT-2 in bfloat16, its AdamW moments in float32.

Random weights and tokens: what a save costs on the GPU depends on sizes, not on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from state import GPT, SIZES, Size, TrainingState
from torch import Tensor

__all__ = ["GPU_SIZES", "MixedAdamW", "build_gpu_state", "train_step"]

GPU_SIZES: dict[str, Size] = {
    **SIZES,
    "774M": Size(num_layers=36, num_heads=20, width=1280, block_size=1024, vocab_size=50257),
    "1558M": Size(num_layers=48, num_heads=25, width=1600, block_size=1024, vocab_size=50257),
}
"""GPT-2's own sizes; 1558M is GPT-2 XL, 15.6 GB with its moments."""


class MixedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose moments are float32 although the parameters are not.

    Torch's own requires one type for both. No weight decay: it would change nothing of what is measured.
    """

    def __init__(self, parameters: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    moments = {
                        name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")
                    }
                    self.state[parameter] = {"step": torch.tensor(0.0), **moments}
            states = [self.state[parameter] for parameter in parameters]
            _update(parameters, states, group["lr"], group["betas"], group["eps"])


def _update(
    parameters: list[Tensor], states: list[dict[str, Tensor]], lr: float, betas: tuple[float, float], eps: float
) -> None:
    if not parameters:
        return
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states]
    torch._foreach_add_([state["step"] for state in states], 1.0)
    count = float(states[0]["step"])
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - betas[1])
    root = torch._foreach_sqrt(second)
    torch._foreach_div_(root, (1 - betas[1] ** count) ** 0.5)
    torch._foreach_add_(root, eps)
    for parameter, moment, scale in zip(parameters, first, root, strict=True):
        parameter.sub_((moment / scale * (lr / (1 - betas[0] ** count))).to(parameter.dtype))


def build_gpu_state(size: str, device: str) -> TrainingState:
    """A model on *device* and its optimizer, with moments: two steps were taken."""
    torch.manual_seed(0)
    shape = GPU_SIZES[size]
    with torch.device(device):
        model = GPT(shape).to(torch.bfloat16)
    optimizer = MixedAdamW(model.parameters())
    state = TrainingState(model, optimizer)  # type: ignore[arg-type]
    tokens = make_tokens(shape, device, batch=1)
    for _ in range(2):
        train_step(state, tokens)
    return state


def make_tokens(shape: Size, device: str, batch: int) -> Tensor:
    """A batch of uniform tokens, ``(batch, time)``."""
    return torch.randint(shape.vocab_size, (batch, min(shape.block_size, 512) + 1), device=device)


def train_step(state: TrainingState, tokens: Tensor, guard: Callable[[], Any] | None = None) -> None:
    """Forward, backward, update; *guard* is entered around the update."""
    torch.autograd.backward(state.model(tokens))
    if guard is None:
        state.optimizer.step()
    else:
        with guard():
            state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
