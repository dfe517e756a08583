"""Who plays: the policy, its mixture with the reference, the reference, copies of the policy.

A copy owns what training changes and shares the rest: that of a LoRA policy has adapters alone.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import nlhf_kernels as nk
from nlhf.algorithms import Algorithm, Phase
from nlhf.rollout import Side


class Copy:
    """A frozen copy of a policy, whose own weights may be of another dtype or on another device.

    On another device they lie between uses only: inside ``present`` they are beside the policy.
    """

    def __init__(
        self,
        policy: nn.Module,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        shared = [x for x in (*policy.parameters(), *policy.buffers()) if not x.requires_grad]
        # what the memo of deepcopy holds is taken for its own copy
        model = copy.deepcopy(policy, {id(x): x for x in shared})
        own = trainable(model)
        self.model = model.requires_grad_(False).eval()
        self.names = list(own)
        self._here = _device(policy)
        self._home = torch.device(device) if device is not None else self._here
        for weight in own.values():
            weight.data = weight.data.to(self._home, dtype or weight.dtype)

    def own(self) -> dict[str, nn.Parameter]:
        """What is the copy's alone, by name; looked up, for an engine puts its own in place."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    @property
    def weights(self) -> list[nn.Parameter]:
        """The values of ``own``."""
        return list(self.own().values())

    @contextlib.contextmanager
    def present(self) -> Iterator[nn.Module]:
        """The copy as a model on the policy's device; back home afterwards."""
        self._move(self._here)
        try:
            yield self.model
        finally:
            self._move(self._home)

    def _move(self, device: torch.device) -> None:
        for weight in self.weights:
            weight.data = weight.data.to(device)

    @torch.no_grad()
    def take(self, weights: Sequence[Tensor]) -> None:
        """These weights, in the order of ``names``, cast to the copy's dtype."""
        for own, weight in zip(self.weights, weights, strict=True):
            own.copy_(weight)

    def average(self, weights: Sequence[Tensor], decay: float, seed: int) -> None:
        """own <- decay own + (1 - decay) weights, without bias where the copy is in bfloat16."""
        with self.present(), torch.no_grad():
            # where processes share the weights out, each has the same part of both
            own, new = ([_local(x) for x in xs] for xs in (self.weights, weights))
            nk.ema_update_(own, new, decay=decay, seed=seed)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class Players:
    """The players of an algorithm, and how they change from step to step.

    dtype, device: of the copies' own weights, those of the policy if None.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        policy: nn.Module,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        self.policy = policy
        # what goes back into the policy must be what it was
        exact = {
            source for phase in algorithm.phases for to, source in phase.then if to == "policy"
        }
        self.copies = {
            name: Copy(policy, None if name in exact else dtype, device)
            for name in algorithm.copies
        }

    @contextlib.contextmanager
    def side(self, name: str, mixture_coef: float, n_samples: int = 1) -> Iterator[Side]:
        """How a player answers in ``rollout.generate``; ``mixture_coef`` is that of the mixture."""
        coefs = {"mixture": mixture_coef, "ref": 1.0}
        with self.model(name) as model:
            yield Side(model, coefs.get(name, 0.0), n_samples)

    @contextlib.contextmanager
    def model(self, name: str) -> Iterator[nn.Module]:
        """A player's model; for the mixture and the reference, the policy, whose sides they are."""
        if name in self.copies:
            with self.copies[name].present() as model:
                yield model
        else:
            yield self.policy

    def advance(
        self, phase: Phase, ended: bool, ema_decay: float, seed: int, *, learned: bool = True
    ) -> None:
        """After a step: the average follows the policy; where the phase ended, copies are made.

        learned: False for a step that was skipped, in which the average stands still.
        """
        weights = list(trainable(self.policy).values())
        if learned and "ema" in self.copies:
            self.copies["ema"].average(weights, ema_decay, seed)
        for name, source in phase.then if ended else ():
            taken = weights if source == "policy" else self.copies[source].weights
            if name == "policy":
                with torch.no_grad():
                    for weight, value in zip(weights, taken, strict=True):
                        weight.copy_(value)
            else:
                self.copies[name].take(taken)
