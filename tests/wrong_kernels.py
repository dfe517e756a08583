"""Kernels with planted bugs, and the same without: what ``check`` must reject, and must accept.

Plain PyTorch with hand-written gradients, in the signatures of a backend. ``Kernels(bug)`` has one
bug, ``Kernels("")`` none.
"""

import math

import torch

from nlhf_kernels import eager
from tests import wrong_losses

TILE = 1024

BUGS = wrong_losses.BUGS | {
    "mixture_sample": (
        "coefficient swapped",
        "coefficient of the first row for all",
        "temperature squared",
        "tile of 512",
        "24-bit noise",
        "capped noise",
        "inverse CDF inside the tile",
        "noise shared by the rows",
        "position ignored",
        "high word of the seed ignored",
        "last tile left out",
        "highest id on a tie",
        "0 * -inf",
        "NaN not noticed",
        "log-probability of the mixture as the policy's",
        "log-probability before the temperature",
        "half precision inside",
        "reference's row stride taken from the policy",
        "last row unwritten",
        "float32 for float64",
        "filters ignored",
        "filters of the first row for all",
        "one more than k",
        "all of a tie kept",
        "of a tie the highest ids",
        "top-p before top-k",
        "top-p without the token that reaches it",
        "top-p from the policy",
        "min-p of the whole mass",
        "tiles drawn by their whole mass",
        "kept mass forgotten",
        "sampling log-probability of the whole",
    ),
    "linear_mixture_sample": (
        "bias ignored",
        "one bias for both",
        "bias after the soft cap",
        "softcap after mixing",
        "softcap forgotten for the reference",
        "one hidden state for both",
        "own head taken for shared",
        "logits rounded to bf16",
        "operands rounded to tf32",
        "tail of D left out",
        "tail of V left out",
        "strides of the weights ignored",
        "reference as wide as the policy",
        "noise by spans of a tile",
        "coefficient swapped",
        "NaN not noticed",
    ),
}


class Kernels(wrong_losses.LossKernels):
    def table(self) -> dict:
        """Name of raw op -> function, for the fixture ``plant``."""
        names = ("mixture_sample_fwd", "linear_mixture_sample_fwd", *wrong_losses.RAW)
        return {name: getattr(self, name) for name in names}

    # ---- sampling

    def mixture_sample_fwd(self, policy_logits, ref_logits, mixture_coef, mixture_coef_rows,
                           temperature, temperature_rows, top_k, top_k_rows, top_p, top_p_rows,
                           min_p, min_p_rows, seed, seed_rows, position,
                           position_rows):  # fmt: skip
        S = eager.statistics_dtype(policy_logits, ref_logits)
        B, V = policy_logits.shape
        rows = torch.arange(B)

        def row(value, given, dtype=S):
            return torch.full((B,), value, dtype=dtype) if given is None else given

        coef = row(mixture_coef, mixture_coef_rows)[:, None]
        if self.bug == "coefficient of the first row for all":
            coef = coef[:1].expand(B, 1)
        if self.bug == "coefficient swapped":
            coef = 1 - coef
        heat = row(temperature, temperature_rows)[:, None]
        greedy = heat == 0
        divisor = torch.where(greedy, 1, heat)
        if self.bug == "temperature squared":
            divisor = divisor**2
        seeds = eager.fold_in(seed, rows) if seed_rows is None else seed_rows
        if self.bug == "noise shared by the rows":
            seeds = seeds[:1].expand(B)
        places = row(position, position_rows, torch.int64)
        if self.bug == "position ignored":
            places = places * 0

        policy = self.read(policy_logits, S)
        models = [policy]
        mixture = policy
        if ref_logits is not None:
            if self.bug == "reference's row stride taken from the policy" and B:
                stride = min(policy_logits.stride(0), ref_logits.stride(0))
                ref_logits = ref_logits.as_strided(ref_logits.shape, (stride, 1))
            ref = self.read(ref_logits, S)
            models.append(ref)
            if self.bug == "0 * -inf":
                mixture = (1 - coef) * policy + coef * ref
            else:
                one = torch.where(coef == 1, 0, policy)
                other = torch.where(coef == 0, 0, ref)
                never = (one == -math.inf) | (other == -math.inf)
                mixture = ((1 - coef) * one + coef * other).masked_fill(never, -math.inf)
        bad = ~torch.stack([x.amax(1).isfinite() for x in (*models, mixture)]).all(0)
        if self.bug == "NaN not noticed":
            bad = torch.stack([x.amax(1) == -math.inf for x in (*models, mixture)]).any(0)

        bad |= ~((heat >= 0) & heat.isfinite())[:, 0]

        def tempered(x, by=divisor):
            return (x - x.amax(1, keepdim=True)) / by

        scores = tempered(mixture)
        filters = [
            row(top_k, top_k_rows, torch.int64),
            row(top_p, top_p_rows),
            row(min_p, min_p_rows),
        ]
        if self.bug == "filters of the first row for all":
            filters = [x[:1].expand(B) for x in filters]
        masses = tempered(policy) if self.bug == "top-p from the policy" else scores
        kept = scores
        if self.bug != "filters ignored":
            keep = self.keep(scores, masses, *(x[:, None] for x in filters))
            kept = scores.masked_fill(~keep, -math.inf)
        drawn = self.draw(kept, seeds, places, scores)
        best = mixture.argmax(1)
        if self.bug == "highest id on a tie":
            best = V - 1 - mixture.flip(1).argmax(1)
        tokens = torch.where(greedy[:, 0], best, drawn)

        def at_token(x):
            return x.log_softmax(1).gather(1, tokens[:, None])[:, 0].masked_fill(bad, math.nan)

        by = torch.ones_like(divisor) if self.bug.startswith("log-probability before") else divisor
        first = mixture if self.bug.startswith("log-probability of the mixture") else policy
        told = scores if self.bug == "sampling log-probability of the whole" else kept
        mass = (kept.logsumexp(1) - scores.logsumexp(1)).clamp(max=0)
        if self.bug == "kept mass forgotten":
            mass = torch.zeros_like(mass)
        outputs = [
            tokens.masked_fill(bad, -1),
            at_token(tempered(first, by)),
            policy.new_empty(0) if len(models) == 1 else at_token(tempered(models[1], by)),
            torch.where(greedy[:, 0] & ~bad, 0, at_token(told)),
            torch.where(greedy[:, 0], 0, mass).masked_fill(bad, math.nan),
        ]
        if self.bug == "last row unwritten":
            for x in outputs[1:]:
                x[-1:] = torch.empty_like(x[-1:])
        return tuple(x if x.dtype == torch.int64 else x.to(S) for x in outputs)

    def keep(self, scores, masses, k, p, least):
        """Which tokens the filters leave, by their rank."""
        order = scores.argsort(dim=1, descending=True, stable=True)
        if self.bug == "of a tie the highest ids":
            order = (
                scores.shape[1] - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)
            )
        rank = order.argsort(1)
        ranked = scores.gather(1, order)
        k = torch.where(k == 0, scores.shape[1], k + (self.bug == "one more than k"))
        counted = rank < k
        if self.bug == "all of a tie kept":
            at = (k - 1).clamp(0, max(0, scores.shape[1] - 1))
            counted = scores >= ranked.gather(1, at)
        of = masses if self.bug == "top-p before top-k" else masses.masked_fill(~counted, -math.inf)
        weight = of.double().softmax(1).gather(1, order)
        reached = weight.cumsum(1)
        if self.bug != "top-p without the token that reaches it":
            reached = reached - weight
        massed = ((reached < p) | (p >= 1)).gather(1, rank) | (rank == 0)
        top = scores.logsumexp(1, keepdim=True) if self.bug == "min-p of the whole mass" else 0
        return counted & massed & (scores - top >= least.log())

    def read(self, logits, S):
        if self.bug == "half precision inside":
            logits = logits.bfloat16()
        return logits.float() if self.bug == "float32 for float64" else logits.to(S)

    def draw(self, scores, seeds, places, whole):
        size = 512 if self.bug == "tile of 512" else TILE
        B, V = scores.shape
        count = -(-V // size)
        tiles = torch.nn.functional.pad(scores, (0, count * size - V), value=-math.inf)
        tiles = tiles.view(B, count, size)
        levels = tiles.logsumexp(-1)
        if self.bug == "tiles drawn by their whole mass":
            whole = torch.nn.functional.pad(whole, (0, count * size - V), value=-math.inf)
            levels = whole.view(B, count, size).logsumexp(-1)
        if self.bug == "last tile left out" and count > 1:
            levels[:, -1] = -math.inf
        low, high = (seeds & 0xFFFFFFFF)[:, None], ((seeds >> 32) & 0xFFFFFFFF)[:, None]
        if self.bug == "high word of the seed ignored":
            high = high * 0
        place = (places & 0xFFFFFFFF)[:, None]
        words = eager.philox((place, torch.arange(count), 1, 0), (low, high))[0]
        winner = (levels + self.gumbel(words, scores.dtype)).argmax(-1)
        blocks = torch.arange(size // 4)
        if self.bug == "noise by spans of a tile":
            blocks = blocks % 32
        words = eager.philox((place, winner[:, None], 2, blocks), (low, high))
        words = torch.stack(words, -1).view(B, size)
        inside = tiles.gather(1, winner[:, None, None].expand(B, 1, size))[:, 0]
        if self.bug == "inverse CDF inside the tile":
            below = inside.softmax(-1).cumsum(-1)
            u = (words[:, :1].to(scores.dtype) + 0.5) * 2.0**-32
            lane = torch.searchsorted(below, u).clamp(max=size - 1)[:, 0]
        else:
            lane = (inside + self.gumbel(words, scores.dtype)).argmax(-1)
        return (winner * size + lane).clamp(max=V - 1)

    def gumbel(self, words, dtype):
        if self.bug in ("24-bit noise", "capped noise"):
            u = ((words >> 8).to(dtype) + 0.5) * 2.0**-24
            if self.bug == "capped noise":
                return -torch.log(-torch.log((1 - u).clamp(max=1 - 2.0**-23)))
            return -torch.log(-torch.log1p(-u))
        return eager.gumbel(words, dtype)

    # ---- sampling from hidden states

    def linear_mixture_sample_fwd(self, policy_hidden, policy_weight, policy_bias, ref_hidden,
                                  ref_weight, ref_bias, softcap, mixture_coef, mixture_coef_rows,
                                  temperature, temperature_rows, *noise):  # fmt: skip
        coef = mixture_coef if mixture_coef_rows is None else mixture_coef_rows[:, None]
        filters = (0, None, 1.0, None, 0.0, None)

        def draw(policy, ref):
            parameters = (mixture_coef, mixture_coef_rows, temperature, temperature_rows)
            return self.mixture_sample_fwd(policy, ref, *parameters, *filters, *noise)

        late = softcap and self.bug == "softcap after mixing"
        policy = self.logits(policy_hidden, policy_weight, policy_bias, softcap)
        if ref_hidden is None:
            return draw(policy, None)
        if self.bug == "one hidden state for both" and ref_weight is None:
            ref_hidden = policy_hidden
        if self.bug == "own head taken for shared" and ref_hidden.dtype == policy_hidden.dtype:
            ref_weight = None
        if ref_weight is None:
            ref_weight = policy_weight
        if self.bug == "one bias for both":
            ref_bias = policy_bias
        if self.bug == "reference as wide as the policy":
            D = min(policy_hidden.shape[1], ref_hidden.shape[1])
            ref_hidden, ref_weight = ref_hidden[:, :D], ref_weight[:, :D]
        forgotten = self.bug == "softcap forgotten for the reference"
        ref = self.logits(ref_hidden, ref_weight, ref_bias, 0.0 if forgotten else softcap)
        outputs = draw(policy, ref)
        if not late:
            return outputs
        policy = self.logits(policy_hidden, policy_weight, policy_bias, 0.0)
        ref = self.logits(ref_hidden, ref_weight, ref_bias, 0.0)
        mixture = softcap * torch.tanh(((1 - coef) * policy + coef * ref) / softcap)
        tokens, _, _, *sampling = draw(mixture, None)
        return tokens, *outputs[1:3], *sampling

    def logits(self, hidden, weight, bias, softcap):
        D, V = hidden.shape[1], weight.shape[0]
        if self.bug == "strides of the weights ignored":
            weight = weight.as_strided(weight.shape, (D, 1))
        hidden, weight = hidden.float(), weight.float()
        if self.bug == "operands rounded to tf32":
            hidden, weight = ((x.view(torch.int32) & -8192).view(x.dtype) for x in (hidden, weight))
        if self.bug == "tail of D left out" and D > 16:
            hidden = hidden[:, : D // 16 * 16]
            weight = weight[:, : D // 16 * 16]
        z = hidden @ weight.T
        if bias is None or self.bug == "bias ignored":
            bias = torch.zeros(V)
        after = self.bug == "bias after the soft cap"
        z = z if after else z + bias
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        z = z + bias if after else z
        if self.bug == "tail of V left out" and V > 128:
            z[:, V // 128 * 128 :] = -math.inf
        return z.bfloat16().float() if self.bug == "logits rounded to bf16" else z
