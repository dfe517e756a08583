"""The algorithms of Nash learning: an opponent, its anchors and a loss each, in one table.

A player is the "policy", its geometric "mixture" with the reference, the "ref" itself, or a frozen
copy of the policy, which an algorithm names as it likes ("ema" is a moving average).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import nlhf_kernels as nk
from nlhf import serving, tabular
from nlhf.config import Config
from nlhf.names import nearest

# what an anchor weighs: in the policy gradient the strength of a KL, in a pair loss its share
STRENGTHS: dict[str, Callable[[Config], float]] = {
    "1": lambda c: 1.0,
    "tau": lambda c: c.tau,
    "tau/eta": lambda c: c.tau / c.eta,
    "1 - tau/eta": lambda c: 1 - c.tau / c.eta,
    "(1 - tau/eta)/2": lambda c: (1 - c.tau / c.eta) / 2,
}
REF = ("ref", "tau")


@dataclass(frozen=True)
class Phase:
    """What the policy learns from for a step, or for ``inner_steps`` steps.

    ``opponent``: whom y is compared with. ``anchors``: players whose log-probabilities stand in the
    loss, with a key of ``STRENGTHS``. ``then``: when it ends, the first takes the second's weights.
    """

    opponent: str
    anchors: tuple[tuple[str, str], ...] = (REF,)
    then: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """``sampler`` draws y, and y' too in a pair loss, of which ``loss`` is a method ("pg": none).

    ``needs``: settings that must be above 0. ``repeated``: a phase lasts ``inner_steps`` steps.
    ``reward``: y is judged by a reward, of which that of y' is subtracted. ``limit``: a key of
    ``LIMITS``.
    """

    phases: tuple[Phase, ...]
    limit: str
    citation: str
    loss: str = "pg"
    sampler: str = "policy"
    needs: tuple[str, ...] = ()
    repeated: bool = False
    reward: bool = False

    def phase(self, step: int, inner_steps: int) -> tuple[Phase, bool]:
        """The phase of a step, and whether the step is its last."""
        length = inner_steps if self.repeated else 1
        return self.phases[step // length % len(self.phases)], (step + 1) % length == 0

    @property
    def copies(self) -> list[str]:
        """The frozen copies of the policy that it keeps."""
        used = [self.sampler]
        for phase in self.phases:
            used += [phase.opponent, *(name for name, _ in phase.anchors), *sum(phase.then, ())]
        return sorted(set(used) - {"policy", "mixture", "ref"})

    @property
    def judged(self) -> bool:
        """Whether y and y' are each compared with responses of the opponent, not with another."""
        return self.loss != "pg" and nk.PAIR_METHODS[self.loss].two_preferences


_MUNOS = "Munos et al. 2023, arXiv 2312.00886"
_TIAPKIN = "Tiapkin et al. 2025, arXiv 2505.19731"
_INNER = ("inner_steps",)
_PREVIOUS = (("previous", "policy"),)

ALGORITHMS = {
    "nash_md_pg": Algorithm((Phase("mixture"),), "mixture", f"{_MUNOS}, section 7"),
    "self_play": Algorithm((Phase("policy"),), "equilibrium", f"{_MUNOS}, section 7, beta = 0"),
    "best_response": Algorithm((Phase("ref"),), "best_response", f"{_MUNOS}, section 7, beta = 1"),
    "nash_ema_pg": Algorithm(
        (Phase("ema"),), "equilibrium", f"{_MUNOS}, section 7", needs=("ema_decay",)
    ),
    "rlhf": Algorithm((Phase("policy"),), "bradley_terry", f"{_MUNOS}, equation 16", reward=True),
    "nash_mp": Algorithm(
        (Phase("ema", anchors=(REF, ("ema", "tau/eta"))),),
        "equilibrium",
        f"{_TIAPKIN}v1",
        needs=("tau", "eta", "ema_decay"),
    ),
    "nash_prox": Algorithm(
        (Phase("policy", anchors=(REF, ("previous", "tau/eta")), then=_PREVIOUS),),
        "equilibrium",
        f"{_TIAPKIN}v2",
        needs=("tau", "eta", *_INNER),
        repeated=True,
    ),
    # the proximity to the current policy is that of a gradient step
    "mpo": Algorithm(
        (Phase("policy", anchors=(("magnet", "tau"),), then=(("magnet", "policy"),)),),
        "unregularised",
        "Wang et al. 2024, arXiv 2410.16714",
        needs=("tau", *_INNER),
        repeated=True,
    ),
    "online_ipo": Algorithm(
        (Phase("policy", anchors=(("ref", "1"),)),),
        "equilibrium",
        nk.PAIR_METHODS["online_ipo"].citation,
        loss="online_ipo",
        needs=("tau",),
    ),
    "ipo_md": Algorithm(
        (Phase("mixture", anchors=(("ref", "1"),)),),
        "mixture",
        nk.PAIR_METHODS["ipo_md"].citation,
        loss="ipo_md",
        sampler="mixture",
        needs=("tau",),
    ),
    # a step from where the last pair of steps ended, against the policy, then from there again,
    # against the one that the first reached
    "egpo": Algorithm(
        (
            Phase("policy", (("ref", "1"),), then=(("half", "policy"), ("policy", "start"))),
            Phase("half", (("ref", "1"),), then=(("start", "policy"),)),
        ),
        "equilibrium",
        nk.PAIR_METHODS["egpo"].citation,
        loss="egpo",
        needs=("tau",),
    ),
    "inpo": Algorithm(
        (Phase("previous", (("ref", "tau/eta"), ("previous", "1 - tau/eta")), then=_PREVIOUS),),
        "equilibrium",
        nk.PAIR_METHODS["inpo"].citation,
        loss="inpo",
        sampler="previous",
        needs=("tau", "eta", *_INNER),
        repeated=True,
    ),
    # optimistic: the first phase moves the base, the second a step ahead of it
    "onpo": Algorithm(
        (
            Phase("previous", (("base", "1"),), then=(("base", "policy"),)),
            Phase("previous", (("base", "1"),), then=_PREVIOUS),
        ),
        "unregularised",
        "Zhang et al. 2025, arXiv 2502.16852",
        loss="mnpo",
        sampler="previous",
        needs=("eta", *_INNER),
        repeated=True,
    ),
    "mnpo": Algorithm(
        (
            Phase(
                "previous",
                (
                    ("ref", "tau/eta"),
                    ("previous", "(1 - tau/eta)/2"),
                    ("older", "(1 - tau/eta)/2"),
                ),
                then=(("older", "previous"), *_PREVIOUS),
            ),
        ),
        "equilibrium",
        nk.PAIR_METHODS["mnpo"].citation,
        loss="mnpo",
        sampler="previous",
        needs=("tau", "eta", *_INNER),
        repeated=True,
    ),
    "sppo": Algorithm(
        (Phase("previous", (("previous", "1"),), then=_PREVIOUS),),
        "iterates",
        nk.PAIR_METHODS["sppo"].citation,
        loss="sppo",
        sampler="previous",
        needs=("eta", *_INNER),
        repeated=True,
    ),
    "dno": Algorithm(
        (Phase("previous", (("previous", "1"),), then=_PREVIOUS),),
        "iterates",
        nk.PAIR_METHODS["dno"].citation,
        loss="dno",
        sampler="previous",
        needs=("eta", *_INNER),
        repeated=True,
    ),
}

# of a game and the mixture coefficient, the log-probabilities that an algorithm settles at
LIMITS: dict[str, tuple[str, Callable[[tabular.MatrixGame, float], Tensor] | None]] = {
    "equilibrium": (
        "pi*_tau, the equilibrium of the regularised game",
        lambda game, mixture_coef: tabular.solve(game).policy,
    ),
    "mixture": (
        "ref exp(P(y > mixture)/tau), whose mixture is the equilibrium at tau/(1 - mixture_coef)",
        tabular.nash_md_pg_limit,
    ),
    "best_response": (
        "ref exp(P(y > ref)/tau)",
        lambda game, mixture_coef: tabular.best_response(game),
    ),
    "bradley_terry": (
        "ref exp(reward/tau)",
        lambda game, mixture_coef: tabular.rlhf(game),
    ),
    "unregularised": ("an equilibrium of the game without regularisation", None),
    "iterates": ("none: the tabular update at each iterate, which may cycle", None),
}


def get(name: str) -> Algorithm:
    """The algorithm of a name; ValueError with the nearest one."""
    if name not in ALGORITHMS:
        hint = nearest(name, ALGORITHMS) or "; nlhf algorithms lists them"
        raise ValueError(f"config: unknown algorithm {name!r}{hint}")
    return ALGORITHMS[name]


def check(config: Config) -> Algorithm:
    """The algorithm of a configuration, ValueError if it lacks a setting."""
    algorithm = get(config.algorithm)
    for name in algorithm.needs:
        if not getattr(config, name) > 0:
            raise ValueError(
                f"config: {name} must be above 0 for the algorithm {config.algorithm}, got "
                f"{getattr(config, name)!r}; set {name}"
            )
    if "1 - tau/eta" in str(algorithm.phases) and config.tau > config.eta:
        raise ValueError(
            f"config: tau must be at most eta for the algorithm {config.algorithm}, got "
            f"{config.tau!r} above {config.eta!r}"
        )
    if config.kl == "exact" and algorithm.loss == "pg":
        anchors = [name for phase in algorithm.phases for name, _ in phase.anchors]
        if anchors != ["ref"]:
            raise ValueError(
                f"config: kl must not be 'exact' for the algorithm {config.algorithm}, whose "
                f"anchors are {', '.join(anchors)}; take reward_to_go"
            )
    _check_server(config, algorithm)
    return algorithm


def _check_server(config: Config, algorithm: Algorithm) -> None:
    if config.server and algorithm.sampler != "policy":
        raise ValueError(
            "config: server draws the responses of the policy, and the algorithm "
            f"{config.algorithm} learns from those of {algorithm.sampler}; leave server out"
        )
    if config.server:
        # what is wrong with it is known before a model is read
        serving.from_config(config)
    if config.importance == "none":
        return
    if algorithm.loss != "pg" or config.kl == "exact":
        raise ValueError(
            "config: importance needs a policy gradient, with kl other than 'exact', got "
            f"{config.algorithm} with {config.kl}"
        )
    sampling = serving.sampling(config, ())
    kind = config.server_logprobs or serving.DEFAULT_LOGPROBS[config.server_engine]
    if config.server and not serving.exact(kind, sampling):
        raise ValueError(
            f"config: importance needs the log-probabilities of what was drawn, and those of "
            f"{config.server_engine} are {kind}; sample at temperature 1 without filters, or let "
            "vLLM give others (--logprobs-mode processed_logprobs) and set server_logprobs"
        )


def mixture_coef(config: Config, step: int) -> float:
    """Weight of the reference at a step: constant, or linear from the first to the last step."""
    if config.mixture_coef_last < 0:
        return config.mixture_coef
    share = step / max(config.steps - 1, 1)
    return config.mixture_coef + share * (config.mixture_coef_last - config.mixture_coef)


def table() -> str:
    """Every algorithm with its opponent, anchors, loss, limit and source, as Markdown."""
    rows = [("algorithm", "opponent", "anchors", "loss", "needs", "limit", "source")]
    for name, a in ALGORITHMS.items():
        opponents = ", then ".join(dict.fromkeys(phase.opponent for phase in a.phases))
        anchors = ", ".join(f"{player} ({strength})" for player, strength in a.phases[0].anchors)
        loss = "policy gradient" if a.loss == "pg" else a.loss
        if a.reward:
            loss += " on a reward"
        if a.sampler != "policy":
            loss += f", responses of {a.sampler}"
        rows.append((name, opponents, anchors, loss, ", ".join(a.needs), a.limit, a.citation))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines += ["", *(f"- {name}: {text}" for name, (text, _) in LIMITS.items())]
    return "\n".join(lines) + "\n"
