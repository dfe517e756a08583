"""Nash-MD as a ``transformers.Trainer`` with the interface of TRL's, which later TRLs lack."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer

import nlhf_kernels as nk
from nlhf import data, losses, parts, rollout
from nlhf import policy as policies
from nlhf.trl_compat import arguments, batches, card, rewards
from nlhf.trl_compat.config import NashMDConfig, of_epoch
from nlhf.trl_compat.wrapper import Through, with_prompts

# the stream of an evaluation's draws, the same in each
_EVALUATION = -1


class NashMDTrainer(Trainer):
    """Nash-MD-PG (Munos et al. 2023) with the constructor and the methods of TRL 1.13's trainer.

    A prompt gets y from the policy and y' from its geometric mixture with the reference, in one
    decode loop with a cache a model; P(y > y') is that of a judge, or the sigmoid of a difference
    of rewards; the loss is ``nk.pairwise_pg_loss``'s, of the policy at the sampling temperature.
    ``kl="token"`` in the configuration gives TRL's, at temperature 1. Logging, saving, resuming,
    callbacks, schedules and DDP are those of ``transformers.Trainer``.

    The draws of a prompt follow from ``args.seed``, the step and its place in the step's batch:
    two processes, or two micro-batches, of b draw what one of 2b does, and a run that is resumed
    goes on as it would have. ``evaluate`` draws the same noise each time, and reports the loss and
    the metrics of training. ``compute_metrics`` gets the tokens of y and y' (-100 after their end)
    as predictions and P(y > y') as labels.

    Args:
        model: a causal language model, a PEFT model, or the name of one.
        ref_model: the reference, a model or a name. None: the base of a PEFT model with its
            adapters off, else a frozen copy of ``model``.
        reward_funcs: a sequence classifier with one label or its name, or a function (prompts,
            completions, completion_ids, **columns) -> rewards; alone or in a list of one. The same
            as ``reward_model``, its old name.
        args: the configuration.
        data_collator: makes a dict of lists of rows of the data; ``prompt`` must be among them.
        train_dataset, eval_dataset: rows with ``prompt``, a string or messages, and optionally
            ``chat_template_kwargs``.
        processing_class: the tokenizer, or a processor that has one. Once ``tokenizer``.
        peft_config: of the adapters to put on ``model``.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics: as in ``Trainer``.
        judge: instead of ``reward_funcs``, a pairwise preference, which need not be transitive: a
            judge of TRL up to 1.0, or a callable (prompts, first, second) -> P; ``preference`` is
            the same.
        reward_processing_classes: the tokenizer of a reward model that does not share the policy's.

    Raises:
        ValueError: bad input; a setting, FSDP or DeepSpeed ZeRO-3, that is not served.
    """

    # TRL's two, by which the hub finds such models, and ours
    _tag_names = ["trl", "nash-md", "nlhf"]  # noqa: RUF012
    _name = "Nash-MD"
    _paper = card.PAPER

    def __init__(
        self,
        model: nn.Module | str | None = None,
        ref_model: nn.Module | str | None = None,
        reward_funcs: Any = None,
        args: NashMDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        judge: Any = None,
        preference: Callable | None = None,
        reward_processing_classes: Any = None,
        reward_model: Any = None,
        tokenizer: Any = None,
    ):
        processing_class = processing_class if tokenizer is None else tokenizer
        if args is not None and not isinstance(args, NashMDConfig):
            raise ValueError(
                "NashMDTrainer: args must be a NashMDConfig of nlhf.trl_compat, got "
                f"{type(args).__module__}.{type(args).__name__}"
            )
        needed = {"model": model, "args": args, "processing_class": processing_class}
        for name, value in (needed | {"train_dataset": train_dataset}).items():
            if value is None:
                raise ValueError(f"NashMDTrainer: {name} must be given")
        if ref_model is not None and ref_model is model:
            raise ValueError(
                "NashMDTrainer: ref_model must be a model of its own, got model; leave it out, "
                "and a frozen copy is made"
            )
        self._tokenizer = arguments.tokenizer_of(processing_class)
        model, self.ref_model = arguments.models(model, ref_model, peft_config, args)
        found = [x for x in (reward_funcs, reward_model) if x is not None]
        if not found and judge is None and preference is None and args.reward_model_path:
            found = [args.reward_model_path]
        self.judge, self.reward_funcs = arguments.opinion(found, judge, preference, args)
        if isinstance(train_dataset, IterableDataset):
            config = args.accelerator_config
            # one process would slice the batches of all, and cannot slice strings
            config.dispatch_batches = config.dispatch_batches or False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or batches.columns,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        plugin = self.accelerator.state.deepspeed_plugin
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError(
                "NashMDTrainer: FSDP and DeepSpeed ZeRO-3 split the weights, which the cached "
                "rollout needs whole; use DDP"
            )
        # the loss of a micro-batch is divided by the prompts of the step, and by nothing else
        self.model_accepts_loss_kwargs = True
        self.model.config.pad_token_id = self._tokenizer.pad_token_id
        self.model.generation_config.pad_token_id = self._tokenizer.pad_token_id
        self.model.add_model_tags(self._tag_names)
        self._settings = arguments.sampling(args, self._tokenizer)
        self._ends = policies.end_tokens(self.model, self._settings["eos_token_id"])
        if self.ref_model is not None:
            self.ref_model.to(self.accelerator.device)
        if self.reward_funcs is not None:
            self.reward_funcs = arguments.reward(
                self.reward_funcs, reward_processing_classes, self._tokenizer, args
            )
        if isinstance(self.reward_funcs, rewards.ModelReward):
            self.reward_funcs.model.to(self.accelerator.device)
        # sums over the rows since they were last logged
        self.stats: dict[str, Tensor] = {}
        self._rows = 0
        # the step whose draws come next, None: that of training; and the micro-batches before
        self._stream: int | None = None
        self._micro = 0

    # ---- settings that change with the epoch

    @property
    def mixture_coef(self) -> float:
        """Weight of the reference in the mixture, in this epoch."""
        return of_epoch(self.args.mixture_coef, self.state.epoch)

    @property
    def beta(self) -> float:
        """Strength of the KL term, in this epoch."""
        return of_epoch(self.args.beta, self.state.epoch)

    # ---- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """The micro-batches of a step, and the number of their prompts on all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro = 0
        count = torch.tensor(sum(len(batches.prompts_of(x)) for x in samples), device=device)
        return samples, self.accelerator.reduce(count, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the prompts in ``inputs``, for which responses are drawn.

        Their mean, or with ``num_items_in_batch`` what they add to the mean over the step.
        """
        prompts = self._encode(inputs)
        L = prompts["input_ids"].shape[1]
        y, y_other = self._process_completions(*self._generate_completions(model, prompts), prompts)
        if self.judge is None:
            scores = self._compute_rewards(y, y_other, L)
            probability = torch.sigmoid(scores[0] - scores[1])
        else:
            scores = None, None
            probability = self._compute_judge(y, y_other, L)
        logprobs, ref_logprobs = self._compute_logprobs(model, y, L)
        loss, score, kl = self._compute_losses(logprobs, ref_logprobs, probability)
        self._log_statistics(
            y,
            y_other,
            logprobs.detach(),
            ref_logprobs,
            probability,
            score.detach(),
            kl,
            L,
            *scores,
        )
        if num_items_in_batch is not None:
            # the gradient is a mean over the processes
            share = len(probability) * self.accelerator.num_processes
            loss = loss * share / num_items_in_batch
        if not return_outputs:
            return loss
        tokens = [
            x["input_ids"][:, L:].masked_fill(x["attention_mask"][:, L:] == 0, -100)
            for x in (y, y_other)
        ]
        return loss, {"tokens": tuple(tokens), "probability": probability}

    def _encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Padded ids and mask (B, L) of the prompts, seeds, and the data as it came."""
        raw = batches.prompts_of(inputs)
        columns = {name: x for name, x in inputs.items() if name != "prompt"}
        templates = columns.get("chat_template_kwargs") or [None] * len(raw)
        rows = []
        for prompt, template in zip(raw, templates, strict=True):
            text = data.render_prompt(prompt, self._tokenizer, **(template or {}))
            row = self.tokenize_row({"prompt": text}, False, self._tokenizer)["prompt_input_ids"]
            # a generated token follows each row, so an empty one cannot be
            if not row:
                raise ValueError(
                    "NashMDTrainer: a prompt is empty, and the tokenizer has no bos token"
                )
            room = self.args.max_length - self._settings["max_new_tokens"]
            rows.append(row[-room:] if room > 0 else row)
        ids, mask = batches.padded(rows, self._tokenizer.pad_token_id, "left")
        device = self.accelerator.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "raw": raw,
            "columns": columns,
            "seeds": self._seeds(len(raw), device),
        }

    def _seeds(self, count: int, device: torch.device) -> Tensor:
        """Those of the next micro-batch, whose place is the one it has in the whole batch."""
        evaluating = self._stream is not None
        size = self.args.eval_batch_size if evaluating else self._train_batch_size
        micro, self._micro = self._micro, self._micro + 1
        first = (micro * self.accelerator.num_processes + self.accelerator.process_index) * size
        stream = self._stream if evaluating else self.state.global_step
        return parts.seeds(self.args.seed, stream, list(range(first, first + count)), device)

    @staticmethod
    def tokenize_row(feature: dict, is_encoder_decoder: bool, tokenizer: Any) -> dict[str, list]:
        """``prompt_input_ids`` and ``prompt_attention_mask``, the bos token in front if any."""
        if is_encoder_decoder:
            raise ValueError("tokenize_row: Nash-MD needs a decoder, got an encoder and a decoder")
        ids = tokenizer(feature["prompt"], add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return {"prompt_input_ids": ids, "prompt_attention_mask": [1] * len(ids)}

    def _generate_completions(self, model: nn.Module, prompts: dict) -> tuple[Tensor, Tensor]:
        """Ids (B, L + T) of the prompts with y, and with y', each padded to the right."""
        ids = prompts["input_ids"]
        # around the whole loop, so that weights are cast once and all passes of a model are alike
        with self.accelerator.autocast():
            pair = rollout.generate_pair(
                self.model,
                self.ref_model,
                ids,
                prompts["attention_mask"],
                mixture_coef=self.mixture_coef,
                seed=prompts["seeds"],
                **self._settings,
            )
        prompts["drawn"] = pair.y
        return with_prompts(ids, pair.y), with_prompts(ids, pair.y_other)

    def _process_completions(
        self, model_output: Tensor, mixture_output: Tensor, prompts: dict
    ) -> tuple[dict, dict]:
        """Of each, ``input_ids`` and ``attention_mask`` that end with the end of sequence.

        What comes after it becomes padding.
        """
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        L = ids.shape[1]
        ends = torch.tensor(self._ends, device=ids.device)
        results = []
        for output in (model_output, mixture_output):
            tokens = output[:, L:]
            ended = torch.isin(tokens, ends).long()
            real = ended.cumsum(1) - ended == 0
            tokens = tokens.masked_fill(~real, self._tokenizer.pad_token_id)
            results.append(
                {
                    "input_ids": torch.cat([ids, tokens], 1),
                    "attention_mask": torch.cat([mask, real.to(mask.dtype)], 1),
                    "raw": prompts["raw"],
                    "columns": prompts.get("columns", {}),
                }
            )
        y, drawn = results[0]["input_ids"][:, L:], prompts.get("drawn")
        # what the rollout knows of its own tokens says nothing of others that came in between
        if drawn is not None and torch.equal(y, drawn.tokens[:, : y.shape[1]]):
            results[0]["ref_logprobs"] = drawn.ref_logprobs[:, : y.shape[1]]
        return tuple(results)

    def _compute_rewards(
        self, model_data: dict, mixture_data: dict, context_length: int
    ) -> tuple[Tensor, Tensor]:
        """(B,) each: the rewards of y and of y', those without an end fined."""
        args, scores = self.args, []
        for x in (model_data, mixture_data):
            completion = batches.completion(x, context_length)
            texts = parts.decode(self._tokenizer, completion)
            ids = batches.rows_of(completion.tokens, completion.mask)
            if not isinstance(self.reward_funcs, rewards.ModelReward):
                columns = x["columns"] | {"trainer_state": self.state}
                score = rewards.call_reward(self.reward_funcs, x["raw"], texts, ids, **columns)
            else:
                whole = batches.rows_of(x["input_ids"], x["attention_mask"])
                with self.accelerator.autocast():
                    score = self.reward_funcs(x["raw"], texts, whole)
            score = score.to(completion.tokens.device)
            score = score * (args.reward_weights[0] if args.reward_weights else 1)
            if args.missing_eos_penalty is not None:
                score = score - args.missing_eos_penalty * ~self._has_end(completion)
            scores.append(score)
        return tuple(scores)

    def _compute_judge(self, model_data: dict, mixture_data: dict, context_length: int) -> Tensor:
        """(B,) P(y > y')."""
        texts = [
            parts.decode(self._tokenizer, batches.completion(x, context_length))
            for x in (model_data, mixture_data)
        ]
        found = self.judge(parts.plain(model_data["raw"]), *texts)
        return found.to(model_data["input_ids"].device)

    def _compute_logprobs(
        self, model: nn.Module, model_data: dict, context_length: int
    ) -> tuple[Tensor, Tensor]:
        """(B, T) each: log-probabilities of y under the policy and the reference, 0 after its end.

        Of the distributions that were sampled from; with kl "token" at temperature 1, as in TRL.
        """
        y = batches.completion(model_data, context_length)
        prompts = (model_data[k][:, :context_length] for k in ("input_ids", "attention_mask"))
        pair = rollout.Pair(*prompts, y, y)
        sampled = self._settings["temperature"]
        temperature = 1.0 if self.args.kl == "token" else sampled
        ref = model_data.get("ref_logprobs") if temperature == sampled else None
        if ref is None:
            with self.accelerator.autocast():
                logits = losses.ref_logits(self.model, self.ref_model, pair, y)
            ref = nk.token_logprobs(logits, y.tokens, mask=y.mask, temperature=temperature).logprobs
        logprobs = nk.token_logprobs(
            losses.response_logits(Through(model, self.model), pair, y),
            y.tokens,
            mask=y.mask,
            temperature=temperature,
            inplace_backward=True,
        ).logprobs
        return logprobs, ref

    def _compute_losses(
        self,
        model_logprobs_model_data: Tensor,
        ref_logprobs_model_data: Tensor,
        probability: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss (), and (B,) each: (P - 1/2) log policy(y) and log(policy(y) / ref(y))."""
        logprobs = model_logprobs_model_data
        score = (probability - 0.5) * logprobs.sum(1)
        ratio = logprobs.detach() - ref_logprobs_model_data
        cost = ratio
        if self.args.kl == "reward_to_go":
            cost = ratio.flip(1).cumsum(1).flip(1)
        elif self.args.kl == "sequence":
            cost = ratio.sum(1, keepdim=True)
        loss = self.beta * (cost * logprobs).sum(1) - score
        return loss.mean(), score, ratio.sum(1)

    # ---- what is reported

    def _has_end(self, completion: rollout.Completion) -> Tensor:
        ends = torch.tensor(self._ends, device=completion.tokens.device)
        return (torch.isin(completion.tokens, ends) & completion.mask).any(1)

    def _log_statistics(
        self,
        model_data: dict,
        mixture_data: dict,
        model_logprobs_model_data: Tensor,
        ref_logprobs_model_data: Tensor,
        probability: Tensor,
        score: Tensor,
        kl_div: Tensor,
        context_length: int,
        model_scores: Tensor | None = None,
        mixture_scores: Tensor | None = None,
    ) -> None:
        """Add to what is logged later, on the device, under TRL's names.

        Some of these say less than they promise: ``objective/entropy`` is -log policy(y), whose
        mean is the entropy of whole responses; ``logps/rejected`` is that of y under the reference,
        and ``rewards/margins`` and ``rewards/accuracies`` compare the two.
        """
        logps, ref_logps = (x.sum(1) for x in (model_logprobs_model_data, ref_logprobs_model_data))
        y, y_other = (batches.completion(x, context_length) for x in (model_data, mixture_data))
        # so that a constant is logged as it is; Apple's GPUs have no float64
        dtype = torch.float32 if logps.device.type == "mps" else torch.float64
        rows = {
            "loss/kl": kl_div,
            "objective/entropy": -logps,
            "loss/score": score,
            "rewards/probabilities": probability,
            "rewards/accuracies": logps > ref_logps,
            "rewards/margins": logps - ref_logps,
            "logps/chosen": logps,
            "logps/rejected": ref_logps,
            "val/model_contain_eos_token": self._has_end(y),
            "val/ref_contain_eos_token": self._has_end(y_other),
            "beta": torch.full_like(logps, self.beta, dtype=dtype),
            "mixture_coef": torch.full_like(logps, self.mixture_coef, dtype=dtype),
        }
        if model_scores is not None:
            rows |= {"rewards/chosen": model_scores, "rewards/rejected": mixture_scores}
        for name, row in rows.items():
            self.stats[name] = self.stats.get(name, 0) + row.detach().to(dtype).sum()
        self._rows += len(logps)

    def _means(self) -> dict[str, float]:
        """Of everything in ``stats``, over all processes."""
        if not self.stats:
            return {}
        sums = list(self.stats.values())
        sums.append(torch.full_like(sums[0], self._rows))
        *sums, count = self.accelerator.reduce(torch.stack(sums), "sum").tolist()
        return {name: x / count for name, x in zip(self.stats, sums, strict=True)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in ``Trainer``; the loss of training comes with the means since it was last logged."""
        if "loss" in logs:
            logs |= self._means()
            self.stats, self._rows = {}, 0
        super().log(logs, start_time)

    # ---- evaluation and the model card

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Loss, the tokens of y and y' (-100 after their end), and P(y > y')."""
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["tokens"], outputs["probability"]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        """As in ``Trainer``, with the means of the metrics of training."""
        kept = self.stats, self._rows, self._micro, self._stream
        self.stats, self._rows, self._micro, self._stream = {}, 0, 0, _EVALUATION
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            means = {f"{metric_key_prefix}_{name}": x for name, x in self._means().items()}
            output.metrics.update(means)
        finally:
            self.stats, self._rows, self._micro, self._stream = kept
        return output

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **_,
    ) -> None:
        """README.md in the output folder, with tags, versions and the paper to cite."""
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else list(tags or [])
            card.write(self.args, self.model, model_name, dataset_name, [*self._tag_names, *more])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(model, trial)
