"""What a run is made of: models, tokenizer, prompts, preference and judge."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nlhf_kernels as nk
from nlhf import data, losses, memory, policy, preference, rollout, serving
from nlhf.config import Config
from nlhf.distributed import ALONE, World, engine_name, join


@dataclass(frozen=True)
class Parts:
    config: Config
    policy: torch.nn.Module
    ref: torch.nn.Module | None
    """``None``: the policy's base with its adapters off"""
    tokenizer: object
    prompts: list
    eval_prompts: list
    preference: preference.Preference
    judge: preference.Preference
    lexicon: Callable[[str], float] | None
    device: torch.device
    world: World = ALONE
    engine: str = ""
    """of nlhf.engines.ENGINES"""
    chunks: memory.Chunks = dataclasses.field(
        default_factory=lambda: memory.Chunks("rollout", "set a shorter max_new_tokens")
    )
    """prompts at a time of a rollout"""

    def encode(self, prompts: list) -> tuple[Tensor, Tensor]:
        return encode(self.tokenizer, prompts, self.device)

    def decode(self, completion: rollout.Completion) -> list[str]:
        return decode(self.tokenizer, completion)

    def end_tokens(self) -> list[int]:
        return end_tokens(self.policy, self.tokenizer)

    @functools.cached_property
    def server(self) -> serving.Server:
        return serving.from_config(self.config)

    def generate_pair(self, prompts: list, seeds: Tensor, policy=None, **settings) -> rollout.Pair:
        """y of a policy and y' of its mixture; ``settings`` override those of the configuration."""
        policy = self.policy if policy is None else policy
        coef = settings.pop("mixture_coef", self.config.mixture_coef)
        sides = [rollout.Side(policy), rollout.Side(policy, coef)]
        return self.generate(prompts, sides, seeds, **settings)[0]

    def generate(
        self,
        prompts: list,
        sides: list[rollout.Side],
        seeds: Tensor,
        *,
        served: bool = False,
        **settings,
    ) -> tuple[rollout.Pair, list[rollout.Completion]]:
        """y and y' of the first two sides for each prompt, and the responses of the other sides.

        ``served``: those of the policy without a mixture come from the server.
        """
        c = self.config
        chosen = {
            "max_new_tokens": c.max_new_tokens,
            "temperature": c.temperature,
            "top_k": c.top_k,
            "top_p": c.top_p,
            "min_p": c.min_p,
            "eos_token_id": self.end_tokens(),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        ids = self.encode(prompts)
        elsewhere = [served and x.model is self.policy and not x.mixture_coef for x in sides]
        here = [side for side, there in zip(sides, elsewhere, strict=True) if not there]
        drawn = iter(())
        if here:
            chosen |= settings

            def draw(rows: slice) -> list[rollout.Completion]:
                some = (x[rows] for x in ids)
                return rollout.generate(here, self.ref, *some, seed=seeds[rows], **chosen)

            pieces = self.chunks.each(len(prompts), draw)
            pad = chosen["pad_token_id"]
            drawn = iter([rollout.joined(side, pad) for side in zip(*pieces, strict=True)])
        y, y_other, *more = [
            self._served(ids, nk.fold_in(seeds, s), side.n_samples) if elsewhere[s] else next(drawn)
            for s, side in enumerate(sides)
        ]
        return rollout.Pair(*ids, y, y_other), more

    def _served(self, ids: tuple[Tensor, Tensor], seeds: Tensor, n: int) -> rollout.Completion:
        """The server's responses, with what the policy and the reference say of them now."""
        y = self.server.complete(
            *ids,
            serving.sampling(self.config, self.end_tokens()),
            seeds=seeds,
            n_samples=n,
            pad_token_id=self.tokenizer.pad_token_id,
            vocabulary=policy.vocabulary(self.policy),
        )
        pair = rollout.Pair(*(x.repeat_interleave(n, 0) for x in ids), y, y)
        c, rows = self.config, torch.arange(len(pair.input_ids), device=pair.input_ids.device)
        pieces = [pair.rows(index) for index in rows.split(c.micro_batch_size or len(rows))]
        how = {"head": c.head, "packing": c.packing}
        scores = [losses.score(self.policy, self.ref, x, x.y, c.temperature, **how) for x in pieces]
        own, ref = map(torch.cat, zip(*scores, strict=True))
        return dataclasses.replace(y, policy_logprobs=own, ref_logprobs=ref)


def encode(tokenizer, prompts: list, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, (B, P) on the device; conversations through the chat template."""
    batch = tokenizer(
        [data.render_prompt(prompt, tokenizer) for prompt in prompts],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        # a chat template writes its own special tokens
        add_special_tokens=all(isinstance(prompt, str) for prompt in prompts),
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def decode(tokenizer, completion: rollout.Completion) -> list[str]:
    rows = zip(completion.tokens.tolist(), completion.mask.tolist(), strict=True)
    ids = [[t for t, real in zip(*row, strict=True) if real] for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def end_tokens(model: torch.nn.Module, tokenizer) -> list[int]:
    """The tokenizer's end of sequence, and those that the model's generation config adds."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = [own] if isinstance(own, int) else list(own or [])
    return sorted({tokenizer.eos_token_id, *more})


def plain(prompts: list) -> list[str]:
    """What a preference reads: no tokenizer's markup."""
    return [data.plain_text(prompt) for prompt in prompts]


def seeds(run_seed: int, stream: int, ids: list[int], device: torch.device) -> Tensor:
    """(B,) one seed a prompt; ``stream`` is the step, or a negative number for a measurement."""
    return nk.fold_in(nk.fold_in(run_seed, stream), torch.tensor(ids, device=device))


def device_of(name: str) -> torch.device:
    if name == "auto":
        # one of several processes has a GPU of its own
        here = ("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else ("cpu",)
        return torch.device(*here)
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()
    # torch imports what belongs to some kinds of device
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"config: device {name!r} cannot be used here: {first}") from None
    return device


def build(config: Config) -> Parts:
    """Load everything that the configuration names; the seed fixes the adapters' first values.

    As one of the processes of a launcher, where there is one.
    """
    # before the first look at a device: each process has its own
    join()
    if config.assets == "quickstart":
        return _quickstart(config)
    for name in ("model", "prompts", "preference"):
        if not getattr(config, name):
            raise ValueError(f"config: {name} must be given (or assets: quickstart)")
    device = device_of(config.device)
    # the cheap things come first, so that a wrong path fails before a model is read
    prompts = data.read_prompts(config.prompts)
    eval_prompts = data.read_prompts(config.eval_prompts) if config.eval_prompts else []
    opinion = preference.as_preference(config.preference, device=device)
    judge = preference.as_preference(config.judge, device=device) if config.judge else opinion
    return _assemble(config, device, prompts, eval_prompts, opinion, judge, None)


def _quickstart(config: Config) -> Parts:
    # it needs gguf, which nothing else does
    from nlhf import quickstart

    device = device_of(config.device)
    assets = quickstart.build(device=device)
    logging.getLogger(__name__).info(quickstart.describe(assets.report))
    return _assemble(
        dataclasses.replace(config, model=str(assets.model_path)),
        device,
        assets.train_prompts,
        assets.eval_prompts,
        assets.preference,
        assets.judge,
        assets.lexicon,
    )


def _assemble(config, device, prompts, eval_prompts, opinion, judge, lexicon) -> Parts:
    tokenizer = policy.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if config.apply_chat_template:
        prompts, eval_prompts = data.as_messages(prompts), data.as_messages(eval_prompts)
    elif not config.assets:
        data.note_plain_prompts(prompts, tokenizer)
    model = trained_model(config, device)
    ref = None
    if config.ref or not config.lora_r:
        frozen = getattr(torch, config.copies_dtype or config.dtype)
        code = {"trust_remote_code": config.trust_remote_code}
        ref = policy.load_model(config.ref or config.model, frozen, device, **code)
        policy.check_same_vocabulary(model, ref)
        ref.requires_grad_(False).eval()
    return Parts(
        config,
        model,
        ref,
        tokenizer,
        prompts,
        eval_prompts,
        opinion,
        judge,
        lexicon,
        device,
        join(),
        engine_name(config.parallel),
        # where all processes run each layer together, none may run it more often
        memory.Chunks(
            "rollout",
            "set a shorter max_new_tokens or a smaller batch_size",
            fixed=join().size > 1 and config.gather == "layer",
        ),
    )


def trained_model(config: Config, device: torch.device) -> torch.nn.Module:
    """The policy before its first step."""
    dtype = getattr(torch, config.dtype)
    code = {"trust_remote_code": config.trust_remote_code}
    model = policy.load_model(config.model, dtype, device, **code)
    if config.lora_r:
        torch.manual_seed(config.seed)
        model = policy.lora(
            model, config.lora_r, config.lora_alpha, config.lora_layers, config.dora
        )
    return model


def trunks(*preferences) -> list[torch.nn.Module]:
    """The language models that preferences are made of, each once."""
    found = {}
    for opinion in preferences:
        while not hasattr(opinion, "trunk") and hasattr(opinion, "preference"):
            opinion = opinion.preference
        trunk = getattr(opinion, "trunk", None)
        if trunk is not None:
            found[id(trunk)] = trunk
    return list(found.values())
