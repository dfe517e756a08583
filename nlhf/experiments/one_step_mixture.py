"""The mixture that is renormalised at every token, against the mixture of whole sequences.

Munos et al. 2023 define Nash-MD-PG by the second (eq. 15) and sample from the first (F.1). With
Z(s) <= 1 the normaliser of pi^(1 - b) ref^b at prefix s, the sequence mixture is the one-step
mixture weighted by w = prod Z over the prefixes of a response, so everything follows from w.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nlhf import policy as policies
from nlhf import quickstart, rollout
from nlhf.experiments import games, training
from nlhf.experiments.report import INTERVALS, Interval, Result, Settings, Table, interval, number
from nlhf.tabular import MatrixGame, exploitability, kl, nash_md_pg_limit, normalise, solve, span

COEFS = (0.125, 0.25, 0.5, 0.75, 0.875)
LENGTHS = (1, 2, 3, 4)
TAUS = (0.01, 0.03, 0.1)
GAMES = ("dice", "population", "mixed")
RANDOM, PROMPTS, SAMPLES, LM_TOKENS = 5, 8, 32, 16
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Pair:
    """A policy and a reference, as conditionals over all prefixes (``training.conditionals``)."""

    name: str
    policy: list[Tensor]
    ref: list[Tensor]


def run(settings: Settings) -> Result:
    # the one part that is large enough for more than one thread
    language, about = _language_models(settings)
    with training.one_thread():
        distances, checks = _sequences(settings)
        limits = _limits(settings)
    return Result(
        "one-step-mixture",
        settings.seed,
        {
            "random pairs": settings.count(RANDOM, 2),
            "language model": about,
            "samples a prompt": settings.count(SAMPLES, 4),
            "prompts": settings.count(PROMPTS, 2),
        },
        [
            _distance_table(distances),
            Table(
                "Importance weights against the exact values (games of length 4, all prompts)",
                ("pair", "b", "KL", "estimate", "TV", "estimate", "effective sample size"),
                checks,
            ),
            _language_table(language),
            Table(
                "Where Nash-MD-PG comes to rest with either mixture (mean over prompts)",
                LIMIT_COLUMNS,
                limits,
            ),
        ],
        lambda figure: _plot(figure, distances, language, limits),
        _meaning(distances, checks, language, limits),
        (INTERVALS, "TV: total variation. KL: KL(one-step, sequence), in nats a response."),
    )


def _sequences(settings: Settings) -> tuple[dict, list]:
    """(TV, KL) of every (pair, length, b), a number a pair; and rows of checks."""
    game = games.make("population", length=LENGTHS[-1])
    ref = training.reference(game, settings.seed, steps=settings.count(200, 20))
    trained = training.train(
        game, ref, game, seed=settings.seed, tau=0.01, steps=settings.count(150, 5)
    ).model
    pairs = [_pair("trained, tau 0.01", game, trained, ref)]
    seeds = [settings.seed + i for i in range(settings.count(RANDOM, 2))]
    for seed in seeds:
        models = [training.transformer(game, 2 * seed + i, std=0.3) for i in (0, 1)]
        pairs.append(_pair("random", game, *models))

    distances = {
        (name, T, b): [_distance(pair, T, b) for pair in pairs if pair.name == name]
        for name in ("random", pairs[0].name)
        for T in LENGTHS
        for b in COEFS
    }
    checks = [
        _check(game, name, policy, other, b, settings)
        for name, policy, other in [("random", *models), (pairs[0].name, trained, ref)]
        for b in (0.125, 0.5)
    ]
    return distances, checks


# ---- exactly, on games


def _pair(name: str, game: games.SequenceGame, policy: nn.Module, ref: nn.Module) -> Pair:
    with torch.no_grad():
        tables = [training.conditionals(model, game, game.prompts) for model in (policy, ref)]
    return Pair(name, *tables)


def sequence_mixture(log_policy: Tensor, log_ref: Tensor, coef: float) -> Tensor:
    """(..., S): the geometric mixture of whole responses (Munos et al. 2023, eq. 15)."""
    return normalise((1 - coef) * log_policy + coef * log_ref)


def token_mixture(log_policy: Tensor, log_ref: Tensor, coef: float, words: int, length: int):
    """(..., S): the one-step-at-a-time mixture of two policies over whole responses (F.1)."""
    tables = [training.split(x, words, length) for x in (log_policy, log_ref)]
    return training.join(training.one_step_mixture(*tables, coef))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _distance(pair: Pair, length: int, coef: float) -> tuple[float, float]:
    """(TV, KL) of responses cut at ``length``, mean over the prompts."""
    tables = pair.policy[:length], pair.ref[:length]
    one = training.join(training.one_step_mixture(*tables, coef))
    whole = sequence_mixture(*map(training.join, tables), coef)
    return total_variation(one, whole).mean().item(), kl(one, whole).mean().item()


def _distance_table(distances: dict) -> Table:
    rows = []
    for name, T, b in distances:
        if b == COEFS[0]:
            cells = [distances[name, T, coef] for coef in COEFS]
            rows.append([name, T, *(interval([tv for tv, _ in cell]) for cell in cells)])
    columns = ("pair", "length", *(f"b = {b}" for b in COEFS))
    return Table("TV between the two mixtures, exactly (population game)", columns, rows)


# ---- by importance weights


@dataclass(frozen=True)
class Estimate:
    """KL(one-step, sequence), their TV, and the effective sample size, each (...,)."""

    kl: Tensor
    tv: Tensor
    size: Tensor


def estimate(log_weights: Tensor) -> Estimate:
    """From (..., n) log w of samples of the one-step mixture, w = pi^(1 - b) ref^b / one-step.

    The sequence mixture is w / E w times the one-step mixture, so KL = log E w - E log w and
    TV = E |w / E w - 1| / 2, with means over the samples for expectations (self-normalised); the
    effective sample size is (sum w)^2 / sum w^2. Biased of order 1 / n.
    """
    log_weights = log_weights.double()
    n = log_weights.shape[-1]
    log_mean = log_weights.logsumexp(-1) - math.log(n)
    ratio = (log_weights - log_mean[..., None]).exp()
    return Estimate(
        log_mean - log_weights.mean(-1),
        (ratio - 1).abs().mean(-1) / 2,
        n / ratio.square().mean(-1),
    )


def log_weights(
    policy: nn.Module,
    ref: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    coef: float,
    samples: int,
    length: int,
    end: int,
    seed: int,
) -> Tensor:
    """(P, samples, length): log w of responses cut at 1, 2, ... tokens, from the one-step mixture.

    A response that has ended keeps its weight.
    """
    drawn = rollout.generate(
        [rollout.Side(policy, coef, samples)],
        ref,
        input_ids,
        attention_mask,
        max_new_tokens=length,
        eos_token_id=end,
        pad_token_id=end,
        seed=seed,
    )[0]
    # the log of the normaliser at each token, in float64: it is a small difference
    terms = (drawn.policy_logprobs, drawn.ref_logprobs, drawn.sampling_logprobs)
    pi, mu, mixture = (x.double() for x in terms)
    logs = torch.where(drawn.mask, (1 - coef) * pi + coef * mu - mixture, 0)
    sums = torch.nn.functional.pad(logs, (0, length - logs.shape[1])).cumsum(-1)
    return sums.view(len(input_ids), samples, length)


def _check(game, name, policy, ref, coef, settings: Settings) -> list:
    """A row: exact and estimated on the game."""
    exact = _distance(_pair(name, game, policy, ref), game.length, coef)
    ids = torch.tensor([game.tokenizer()(prompt)["input_ids"] for prompt in game.prompts])
    weights = log_weights(
        policy,
        ref,
        ids,
        torch.ones_like(ids),
        coef=coef,
        samples=settings.count(1000, 50),
        length=game.length,
        end=len(game.words),
        seed=settings.seed,
    )
    last = weights[..., -1]
    share = (estimate(last).size.mean() / last.shape[1]).item()
    kls, tvs = (bootstrap(last, kind) for kind in ("kl", "tv"))
    return [name, coef, exact[1], kls, exact[0], tvs, f"{share:.0%}"]


def bootstrap(log_weights: Tensor, kind: str, resamples: int = 200) -> Interval:
    """Mean over the prompts (P, n) of a field of ``Estimate``; each prompt's samples resampled."""
    generator = torch.Generator().manual_seed(0)
    P, n = log_weights.shape
    index = torch.randint(n, (resamples, P, n), generator=generator)
    again = log_weights.expand(resamples, P, n).gather(-1, index)
    means = getattr(estimate(again), kind).mean(-1)
    mean = getattr(estimate(log_weights), kind).mean().item()
    return Interval(mean, 1.96 * means.std().item())


def _language_models(settings: Settings) -> tuple[list, str]:
    """Rows (pair, b, tokens, kl, tv, share of the effective sample size), and which model."""
    prompts, samples = settings.count(PROMPTS, 2), settings.count(SAMPLES, 4)
    folder = quickstart.cache_folder() / "SmolLM2-135M-Instruct"
    ratings = quickstart.cache_folder() / quickstart.RATINGS[1]
    if settings.scale >= 1 and (folder / "model.safetensors").is_file() and ratings.is_file():
        ref, ids, mask, end = _smollm(folder, ratings, prompts)
        about = "SmolLM2-135M-Instruct on beginnings of reviews, from the quickstart's cache"
    else:
        ref, ids, mask, end = _random_llama(settings.seed, prompts)
        about = "a random Llama of 8M parameters (SmolLM2 is not in the quickstart's cache)"
        if settings.scale < 1:
            about = "a random Llama of 8M parameters (SmolLM2 is taken from scale 1 on)"
    rows = []
    for name, policy in (("sharpened", _sharpened(ref)), ("perturbed", _perturbed(ref, settings))):
        for b in (0.125, 0.5):
            weights = log_weights(
                policy,
                ref,
                ids,
                mask,
                coef=b,
                samples=samples,
                length=LM_TOKENS,
                end=end,
                seed=settings.seed,
            )
            for T in (1, 2, 4, 8, 16):
                found = estimate(weights[..., T - 1])
                share = (found.size.mean() / samples).item()
                rows.append([name, b, T, interval(found.kl), interval(found.tv), f"{share:.0%}"])
    return rows, about


def _smollm(folder: Path, ratings: Path, count: int):
    tokenizer = policies.load_tokenizer(folder)
    model = policies.load_model(folder, torch.float32)
    prompts = quickstart.parse_ratings(ratings).prompts()[1][:count]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return model, batch["input_ids"], batch["attention_mask"], tokenizer.eos_token_id


def _random_llama(seed: int, count: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    V = 4096
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=64,
        initializer_range=0.08,
        eos_token_id=V - 1,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(V - 1, (count, 8))
    return model, ids, torch.ones_like(ids), V - 1


@torch.no_grad()
def _sharpened(ref: nn.Module, temperature: float = 0.7) -> nn.Module:
    """The reference at a lower temperature: its last norm carries the factor."""
    policy = copy.deepcopy(ref)
    policy.model.norm.weight.div_(temperature)
    return policy


@torch.no_grad()
def _perturbed(ref: nn.Module, settings: Settings, size: float = 0.1) -> nn.Module:
    """The reference with noise on every matrix of its layers, ``size`` of the weights' own."""
    policy = copy.deepcopy(ref)
    generator = torch.Generator().manual_seed(settings.seed)
    for weight in policy.model.layers.parameters():
        if weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(noise, alpha=size * weight.std().item())
    return policy


def _language_table(rows: list) -> Table:
    columns = ("policy", "b", "tokens", "KL", "TV", "effective sample size")
    return Table(
        "On a language model, by importance weights (intervals over prompts)", columns, rows
    )


# ---- the equilibrium


LIMIT_COLUMNS = (
    "game",
    "tau",
    "b",
    "TV of the two resting points",
    "TV of one-step mixture to equilibrium at tau / (1 - b)",
    "TV to equilibrium at tau: one-step",
    "sequence",
    "exploitability at tau: one-step",
    "sequence",
)


def token_limit(game: MatrixGame, coef: float, words: int, length: int, rounds: int = 10) -> Tensor:
    """The stationary policy pi ~ ref exp(P(y > mix) / tau), mix its one-step mixture; (..., S).

    By mirror ascent, log pi <- (1 - step tau) log pi + step tau log ref + step P(y > mix), until
    log pi is log ref + P(y > mix) / tau up to a constant and 1e-10. The step is halved again and
    again: while it is too large, the iterates circle around.

    Raises:
        ValueError: it is not after ``rounds`` steps.
    """
    policy, share = game.log_ref, 0.5
    for _ in range(rounds):
        # in so many steps a linear rate of 1 - share leaves 1e-11
        for _ in range(math.ceil(25 / share)):
            mixture = token_mixture(policy, game.log_ref, coef, words, length)
            target = normalise(game.log_ref + game.wins(mixture) / game.tau)
            if (residual := span(policy, target).amax().item()) < _TOLERANCE:
                return policy
            policy = normalise((1 - share) * policy + share * target)
        share /= 2
    raise ValueError(
        f"token_limit: the residual is {residual:.1g} after {rounds} step sizes at tau "
        f"{game.tau:g}; raise tau or rounds"
    )


def _limits(settings: Settings) -> list:
    """Rows of ``LIMIT_COLUMNS``, each a mean over the prompts of a game."""
    rows = []
    for name in GAMES:
        game = games.make(name)
        ref = training.reference(game, settings.seed, steps=settings.count(200, 20))
        base = training.matrix_game(game, ref, 1.0)
        sizes = len(game.words), game.length
        for tau in TAUS[-settings.count(len(TAUS), 1) :]:
            table = base.replace(tau=tau)
            equilibrium = solve(table).policy
            for b in COEFS:
                mixed = solve(table.replace(tau=tau / (1 - b))).policy
                sequence = nash_md_pg_limit(table, b)
                one = token_limit(table, b, *sizes)
                measures = (
                    total_variation(one, sequence),
                    total_variation(token_mixture(one, table.log_ref, b, *sizes), mixed),
                    total_variation(one, equilibrium),
                    total_variation(sequence, equilibrium),
                    exploitability(table, one),
                    exploitability(table, sequence),
                )
                rows.append([name, tau, b, *(x.mean().item() for x in measures)])
    return rows


# ---- what is shown


def _plot(figure, distances: dict, language: list, limits: list) -> None:
    figure.set_size_inches(15, 4.6)
    left, middle, right = figure.subplots(1, 3)
    names = list(dict.fromkeys(name for name, _, _ in distances))
    for style, name in zip(("-", "--"), names, strict=True):
        for i, b in enumerate(COEFS):
            means = [sum(tv for tv, _ in distances[name, T, b]) for T in LENGTHS]
            means = [x / len(distances[name, LENGTHS[0], b]) for x in means]
            left.plot(LENGTHS, means, style, color=f"C{i}", marker="o", label=f"{name}, b {b}")
    left.set(xlabel="longest response, tokens", ylabel="TV(one-step, sequence)", xticks=LENGTHS)
    left.set_title("exact, on a game")
    for i, (name, b) in enumerate(dict.fromkeys((row[0], row[1]) for row in language)):
        rows = [row for row in language if row[:2] == [name, b]]
        bars = {"y": [r[3].mean for r in rows], "yerr": [r[3].half for r in rows]}
        middle.errorbar(
            [r[2] for r in rows], **bars, marker="o", label=f"{name}, b {b}", color=f"C{i}"
        )
    lengths = sorted({row[2] for row in language})
    middle.set(xlabel="tokens", ylabel="KL(one-step, sequence), nats")
    middle.set_xscale("log", base=2)
    middle.set_xticks(lengths, map(str, lengths))
    middle.set_title("importance weights, language model")
    for i, (name, tau) in enumerate(dict.fromkeys((row[0], row[1]) for row in limits)):
        rows = [row for row in limits if row[:2] == [name, tau]]
        coefs = [row[2] for row in rows]
        style = ("-", "--", ":")[i % len(TAUS)]
        color = f"C{GAMES.index(name)}"
        right.plot(coefs, [row[3] for row in rows], style, color=color, label=f"{name}, tau {tau}")
    right.set(xlabel="b", ylabel="TV of the two resting points", yscale="log")
    right.set_title("where Nash-MD-PG comes to rest")
    # room for the legend below the curves
    right.set_ylim(bottom=1e-5)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        columns = len(GAMES) if axis is right else 1
        place = "lower center" if axis is right else "upper left"
        axis.legend(fontsize=7, loc=place, ncols=columns)


def _meaning(distances: dict, checks: list, language: list, limits: list) -> str:
    def worst(name: str, T: int) -> float:
        return max(max(tv for tv, _ in distances[name, T, b]) for b in COEFS)

    names = list(dict.fromkeys(name for name, _, _ in distances))
    grown = "; ".join(f"{n}: " + ", ".join(number(worst(n, T)) for T in LENGTHS) for n in names)
    off = [abs(row[3].mean - row[2]) / row[3].half for row in checks]
    farthest = max(limits, key=lambda row: row[3])
    kls = ", ".join(
        f"{row[0]} with b = {row[1]:g} {row[3]}" for row in language if row[2] == LM_TOKENS
    )
    better = sum(row[7] < row[8] for row in limits)
    kept = min(int(row[-1].rstrip("%")) for row in checks + language)
    return (
        f"The two mixtures are one for responses of one token, and for b = 0 and b = 1. The "
        f"largest TV over b at lengths {', '.join(map(str, LENGTHS))} is, for {grown}. Importance "
        f"weights find the exact KL within {max(off):.1f} half-widths of their 95 % interval; the "
        f"effective sample size is nowhere below {kept} % of the samples. On the language model, "
        f"KL after {LM_TOKENS} tokens: {kls}.\n\n"
        f"Nash-MD-PG that samples from the one-step mixture rests elsewhere than the one of the "
        f"definition, by a TV of at most {number(farthest[3])} ({farthest[0]} game, tau "
        f"{farthest[1]:g}, b = {farthest[2]:g}), and its mixture is no longer the equilibrium at "
        f"tau / (1 - b). Neither resting point is the equilibrium at tau: in {_nearer(limits)} of "
        f"{len(limits)} cases both are farther from it than from each other, so b itself moves "
        f"the policy more than the way of mixing does. The one-step mixture's resting point is "
        f"the less exploitable of the two in {better} of {len(limits)}."
    )


def _nearer(limits: list) -> int:
    return sum(row[3] < min(row[5], row[6]) for row in limits)
