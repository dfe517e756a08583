"""How the weights of a policy lie on several processes: torch's DDP and FSDP2, DeepSpeed's ZeRO-3.

The engines are those libraries'; what is here is how a run with rollouts uses them. A step of
training is a pass through the engine. A rollout is not: there a process runs as many passes as its
own rows need, so the weights are gathered for its duration, and no process waits for another. Where
a model does not fit whole, a layer is gathered at a time, and all run it equally often.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from nlhf.algorithms import Algorithm
from nlhf.config import Config
from nlhf.distributed import ALONE, World
from nlhf.policy import layers


class Engine:
    """One process, the case in which there is nothing to do, and what all engines can do."""

    # nobody else looks at the weights and their gradients
    alone = True
    # every process has all the weights
    whole = True

    def __init__(self, policy: nn.Module, world: World = ALONE, by_layer: bool = False):
        # what a training pass calls, and the model inside
        self.policy: nn.Module = policy
        self.model = policy
        self.world = world
        self._by_layer = by_layer

    def prepare(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """To be called once, with what a step is made by; ``max_norm`` of the gradient."""
        self.optimizer, self._max_norm = optimizer, max_norm

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around the passes of a part of the step; gradients are complete after the last."""
        yield

    def shard(self, model: nn.Module) -> None:
        """Lay the weights of a frozen model out over the processes, in place."""

    @contextlib.contextmanager
    def gathered(self, *models: nn.Module | None) -> Iterator[None]:
        """Inside it these models have all their weights here, for passes without a gradient."""
        yield

    @property
    def together(self) -> Callable[[bool], bool] | None:
        """What a rollout needs where no process may run a model more often than another."""
        return self.world.any if self._by_layer else None

    @contextlib.contextmanager
    def decoding(self, *models: nn.Module | None) -> Iterator[None]:
        """For a rollout: as ``gathered``, or layer by layer where a model does not fit whole."""
        with contextlib.nullcontext() if self._by_layer else self.gathered(*models):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient; that of the mean over the processes."""
        loss.backward()

    def norm(self) -> Tensor:
        """Clip the gradient of the step; its norm before, the same everywhere."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(weights, self._max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        """The optimiser's step; gradients are 0 after it."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Take the gradients away, as if there had been no pass."""
        self.optimizer.zero_grad()

    def full(self, weight: Tensor) -> Tensor:
        """The whole of a weight, to be asked for by every process."""
        return weight.detach()

    # what a checkpoint holds of a weight, which may be this process's part of it

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """Of the whole weight."""
        return tuple(weight.shape)

    def value(self, weight: Tensor) -> Tensor:
        """The weight as it is trained."""
        return weight.detach()

    def moments(self, weight: Tensor) -> dict[str, Any]:
        """The optimiser's state for it, by field; empty before the first step."""
        return self.optimizer.state.get(weight, {})

    def restore(self, weight: Tensor, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Take what ``value`` and ``moments`` once returned."""
        weight.copy_(value)
        for field, x in moments.items():
            # AdamW keeps its step counter on the CPU and its moments beside the weights
            beside = "cpu" if field == "step" else weight.device
            self.optimizer.state[weight][field] = x.to(beside)


class DDP(Engine):
    """Every process has all weights; gradients are averaged while they are made."""

    alone = False

    def __init__(self, policy: nn.Module, world: World, by_layer: bool = False):
        # there is nothing to gather
        super().__init__(policy, world)
        device = next(policy.parameters()).device
        self._ddp = nn.parallel.DistributedDataParallel(
            policy,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        self.policy = self._ddp

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Gradients are averaged in the last part alone."""
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield


class FSDP2(Engine):
    """Every process has a part of every weight, gradient and moment; layers are gathered to run."""

    alone = whole = False

    def __init__(
        self,
        policy: nn.Module,
        world: World,
        by_layer: bool = False,
        vocabulary_parallel: bool = False,
    ):
        super().__init__(policy, world, by_layer)
        self._roots: list[FSDPModule] = []
        if vocabulary_parallel:
            head = policy.get_output_embeddings()
            if head.weight is policy.get_input_embeddings().weight:
                raise ValueError(
                    "config: vocabulary_parallel needs a head of its own, and that of this model "
                    "is tied to its embeddings; leave it off"
                )
            # apart from the rest, so that no pass that leaves it out gathers it
            fully_shard(head)
        self.shard(policy)

    def shard(self, model: nn.Module) -> None:
        """A layer at a time, and the rest: embeddings, norm and head."""
        for layer in layers(model)[0]:
            fully_shard(layer)
        # torch would leave the rest whole after a pass without a gradient
        fully_shard(model, reshard_after_forward=True)
        self._roots.append(model)

    @contextlib.contextmanager
    def gathered(self, *models: nn.Module | None) -> Iterator[None]:
        """All parts of these models at once: it is the most that a process ever holds."""
        parts = [m for model in models if model for m in model.modules()]
        with _stay([part for part in parts if isinstance(part, FSDPModule)]) as parts:
            for part in parts:
                part.unshard()
            yield

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Gradients are averaged and laid out in the last part alone; a loss finds whole heads."""
        self.model.set_requires_gradient_sync(last)
        with _stay(self._roots):
            yield

    def full(self, weight: Tensor) -> Tensor:
        """Gathered from all processes, and nothing kept."""
        return weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()


@contextlib.contextmanager
def _stay(parts: list[FSDPModule]) -> Iterator[list[FSDPModule]]:
    """What runs inside it keeps its weights until the end."""
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield parts
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


class ZeRO3(FSDP2):
    """DeepSpeed's layout of the policy; frozen models lie as with FSDP2, which it has no name for.

    Its optimiser works on flat float32 parts of its own: weights and moments go through DeepSpeed.
    """

    def __init__(self, policy: nn.Module, world: World, by_layer: bool = False):
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("config: parallel = 'zero3' needs pip install deepspeed")
        Engine.__init__(self, policy, world, by_layer)
        self._roots = []

    def prepare(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """DeepSpeed takes the policy and its optimiser over."""
        import deepspeed

        super().prepare(optimizer, max_norm)
        settings = {
            # it divides by the second, which is what the learner does itself
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_norm,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.model.dtype == torch.bfloat16},
        }
        self._engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.policy = self._engine

    @contextlib.contextmanager
    def gathered(self, *models: nn.Module | None) -> Iterator[None]:
        """As with FSDP2; the policy loses DeepSpeed's hooks meanwhile, which would take it away."""
        import deepspeed

        others = [model for model in models if model is not self.model]
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().gathered(*others))
            if len(others) < len(models):
                offload = self._engine.optimizer.parameter_offload
                weights = list(self.model.parameters())
                stack.enter_context(deepspeed.zero.GatheredParameters(weights))
                offload._remove_module_hooks()
                stack.callback(offload.setup_zero_stage3_hooks)
            yield

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """DeepSpeed adds up gradients until it is told of the last part."""
        self._engine.set_gradient_accumulation_boundary(last)
        with _stay(self._roots):
            yield

    def backward(self, loss: Tensor) -> None:
        """As DeepSpeed does it."""
        self._engine.backward(loss)

    def norm(self) -> Tensor:
        """It clips in its step, and says then what the norm was."""
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        if not norm.isfinite():
            raise ValueError(
                f"train: the norm of the gradient is {norm.item()}, which DeepSpeed has stepped "
                "with; go on from the last checkpoint with --resume and a lower learning_rate"
            )
        return norm

    def step(self) -> None:
        """Done with the norm."""

    def forget(self) -> None:
        """DeepSpeed's own."""
        self._engine.zero_grad()
        self._engine.optimizer.zero_grad()

    def full(self, weight: Tensor) -> Tensor:
        """The float32 master."""
        flat, here = self._place(weight)
        return self._whole(weight, flat[here])

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """DeepSpeed leaves nothing of the weight itself."""
        return tuple(weight.ds_shape)

    def value(self, weight: Tensor) -> Tensor:
        """The whole master: DeepSpeed's parts are flat, and no other engine could read them."""
        return self.full(weight)

    def moments(self, weight: Tensor) -> dict[str, Any]:
        """Whole ones, as those of the other engines."""
        flat, here = self._place(weight)
        return {
            field: x.clone() if x.dim() == 0 else self._whole(weight, x[here])
            for field, x in self.optimizer.state.get(flat, {}).items()
        }

    def restore(self, weight: Tensor, value: Tensor, moments: dict[str, Tensor]) -> None:
        """This process's part of each, into DeepSpeed's flat ones."""
        flat, here = self._place(weight)
        count = here.stop - here.start

        def part(x: Tensor) -> Tensor:
            # the last process's part may end in padding
            padded = nn.functional.pad(x.flatten(), (0, count * self.world.size - x.numel()))
            return padded[count * self.world.rank :][:count]

        flat.data[here] = part(value)
        weight.ds_tensor.data.copy_(part(value))
        state = self.optimizer.state[flat]
        for field, x in moments.items():
            if x.dim() == 0:
                state[field] = x
            else:
                state.setdefault(field, torch.zeros_like(flat))[here] = part(x)

    def _place(self, weight: Tensor) -> tuple[Tensor, slice]:
        """The flat tensor that holds this process's part of a weight, and where."""
        zero = self._engine.optimizer
        group, start, count = zero.grad_position[zero.get_param_id(weight)]
        return zero.fp32_partitioned_groups_flat[group], slice(start, start + count)

    def _whole(self, weight: Tensor, part: Tensor) -> Tensor:
        return self._engine.optimizer._fp32_state_allgather(weight, part)


ENGINES = {"": Engine, "ddp": DDP, "fsdp2": FSDP2, "zero3": ZeRO3}


def check(config: Config, name: str, world: World, algorithm: Algorithm) -> None:
    """ValueError for settings that an engine, or so many processes, cannot serve."""
    if config.batch_size % world.size:
        raise ValueError(
            f"config: batch_size must be a multiple of the {world.size} processes, got "
            f"{config.batch_size}"
        )
    if name == "zero3" and algorithm.copies:
        raise ValueError(
            f"config: {config.algorithm} keeps copies of the policy, which zero3 does not know: "
            "take parallel = 'fsdp2'"
        )
    if not ENGINES[name].whole and config.copies_device:
        raise ValueError(
            f"config: copies_device needs all weights in one place, and {name} shares them out: "
            "leave it out"
        )
    if config.vocabulary_parallel and name != "fsdp2":
        raise ValueError(
            f"config: vocabulary_parallel needs parallel = 'fsdp2', got {name or 'one process'}; "
            "leave it off"
        )


def make(config: Config, name: str, policy: nn.Module, world: World) -> Engine:
    """The engine of a run; copies of the policy are made before, since afterwards none can be."""
    how = {"vocabulary_parallel": True} if config.vocabulary_parallel else {}
    return ENGINES[name](policy, world, config.gather == "layer", **how)
