"""Muon for the matrices, AdamW for the rest, one learning-rate schedule, and the average of the weights."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a batch of matrices towards 1 by Newton-Schulz steps. (N, R, C) -> (N, R, C)"""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, Newton-Schulz, step: for matrices and for stacks of matrices such as the experts."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters; equal shapes go through Newton-Schulz together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(tuple(param.shape[-2:]), []).append(param)
            for (rows, columns), params in by_shape.items():
                updates = [self._nesterov(p, group["momentum"]).view(-1, rows, columns) for p in params]
                counts = [len(update) for update in updates]
                scale = 0.2 * max(rows, columns) ** 0.5  # the size of an AdamW update
                for param, update in zip(params, orthogonalize(torch.cat(updates)).split(counts), strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update.view_as(param), alpha=-group["lr"] * scale)

    def _nesterov(self, param: nn.Parameter, momentum: float) -> Tensor:
        if param.grad is None:
            raise ValueError(f"gradient: got None for a parameter of shape {tuple(param.shape)}, expected a tensor")
        buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
        buffer.lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(buffer, momentum)


def is_tower(name: str) -> bool:
    """Tell whether a parameter belongs to the vision tower or its projector."""
    return "vision" in name


def build_optimizers(model: nn.Module, lr: float, muon_lr: float, tower: bool) -> list[torch.optim.Optimizer]:
    """Give the matrices of the layers of the text model, or of the tower, to Muon, and the rest of it to AdamW.

    A `muon_lr` of 0 gives all to AdamW.
    """
    matrices, decayed, rest = [], [], []
    for name, param in model.named_parameters():
        if is_tower(name) != tower or not param.requires_grad:
            continue
        if param.ndim >= 2 and "embed" not in name and "router" not in name:
            (matrices if muon_lr else decayed).append(param)
        else:
            rest.append(param)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98), foreach=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr))
    return optimizers


def learning_rate_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """Rise over `warmup` steps, hold, fall to zero over the last `decay` steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


class WeightAverage:
    """Exponential moving average of the parameters that train."""

    def __init__(self, model: nn.Module, decay: float = 0.998):
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        self.include(model)

    @torch.no_grad()
    def include(self, model: nn.Module) -> None:
        """Take in the parameters that train since now."""
        for name, param in model.named_parameters():
            if param.requires_grad and name not in self.weights:
                self.weights[name] = param.detach().clone()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model's weights, faster in the first steps."""
        decay = min(self.decay, (step + 1) / (step + 10))
        parameters = dict(model.named_parameters())
        names = list(self.weights)
        torch._foreach_lerp_([self.weights[n] for n in names], [parameters[n].detach() for n in names], 1 - decay)
