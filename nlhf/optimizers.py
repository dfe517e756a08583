"""AdamW in its forms: torch's, with float32 masters of 16-bit weights, with 8-bit moments."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nlhf.algorithms import Algorithm
from nlhf.config import Config


def build(config: Config, algorithm: Algorithm, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of a configuration for these weights.

    Its state is ``state[weight][name]``, tensors or numbers, that can be saved and put back so.

    Raises:
        ValueError: bitsandbytes is needed and not installed; or master weights, and an algorithm
            that sets the policy to weights of its own, which would not be theirs.
    """
    weights = list(weights)
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(weights, settings)
    if not config.master_weights:
        # one weight after the other, as is the default there, takes two copies of the largest
        fused = all(weight.device.type == "cpu" for weight in weights) or None
        return torch.optim.AdamW(weights, **settings, fused=fused)
    if any(name == "policy" for phase in algorithm.phases for name, _ in phase.then):
        raise ValueError(
            f"config: master_weights must be off for the algorithm {config.algorithm}, which sets "
            "the policy back to earlier weights; take dtype float32, or LoRA"
        )
    return MasterAdamW(weights, **settings)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on float32 masters of weights in 16 bits.

    A step changes the masters, and the weights become the masters, rounded: steps of less than half
    a last bit add up, where without masters each would be lost. Gradients are those of the weights,
    in their dtype. Where somebody else changes a weight, the next step undoes it.

    ``state[weight]``: ``master``, ``exp_avg`` and ``exp_avg_sq`` float32 like the weight, and
    ``step`` (), on the CPU. Made in the first step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step; what ``closure`` returns, if there is one, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                # one after the other, so that one gradient at a time is in float32
                if weight.grad is not None:
                    self._move(weight, group)
        return loss

    def _move(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if "master" not in state:
            state["master"] = weight.detach().float()
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        adamw(
            [state["master"]],
            [weight.grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            fused=weight.device.type == "cpu",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weight.copy_(state["master"])


def _adamw_8bit(weights: list[Tensor], settings: dict) -> torch.optim.Optimizer:
    """That of bitsandbytes (Dettmers et al. 2022); weights of few numbers keep 32-bit moments."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"config: optimizer 'adamw_8bit' needs bitsandbytes ({error}); install it: "
            "pip install bitsandbytes"
        ) from error
    optimizer = AdamW8bit(weights, **settings)
    optimizer.register_step_pre_hook(_count)
    optimizer.register_step_post_hook(_separate)
    return optimizer


def _count(optimizer: torch.optim.Optimizer, *_) -> None:
    """The number of steps goes to C as an int; a checkpoint gives it back as a tensor."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = int(state["step"])


def _separate(optimizer: torch.optim.Optimizer, *_) -> None:
    """A table of its own for each weight: safetensors writes no tensor under two names."""
    seen = set()
    for state in optimizer.state.values():
        for name in ("qmap1", "qmap2"):
            if name in state:
                if state[name].data_ptr() in seen:
                    state[name] = state[name].clone()
                seen.add(state[name].data_ptr())
