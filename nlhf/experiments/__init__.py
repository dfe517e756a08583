"""Experiments on what the papers left open, a module each: ``run(settings) -> report.Result``."""

from dataclasses import dataclass

from nlhf.names import nearest


@dataclass(frozen=True)
class Experiment:
    """``minutes``: measured at the default size on one core."""

    module: str
    question: str
    minutes: float


EXPERIMENTS = {
    "mixture-sweep": Experiment(
        "mixture_sweep", "which mixture with the reference should be the opponent?", 5
    ),
    "tau-sweep": Experiment(
        "tau_sweep", "what does tau buy, and does a run notice that it fails?", 4
    ),
    "intransitive": Experiment(
        "intransitive",
        "how exploitable are RLHF, DPO and Nash policies where preferences go around in circles?",
        5,
    ),
    "one-step-mixture": Experiment(
        "one_step_mixture",
        "how far is the mixture taken a token at a time from that of whole sequences, and what "
        "does it do to the equilibrium?",
        2,
    ),
    "stability": Experiment(
        "stability",
        "which of Nash-MD-PG, online IPO, Nash-MP and Nash Prox bears the largest learning rate?",
        3,
    ),
    "cost": Experiment("cost", "what does a step of each algorithm cost beside RLHF's?", 9),
    "preference-ablation": Experiment(
        "preference_ablation", "which learned preference survives the shift of the policy?", 3
    ),
}


def find(name: str) -> Experiment:
    """ValueError with the nearest name for one that is not there."""
    if name not in EXPERIMENTS:
        hint = nearest(name, EXPERIMENTS) or f"; there are {', '.join(EXPERIMENTS)}"
        raise ValueError(f"reproduce: no experiment is called {name!r}{hint}")
    return EXPERIMENTS[name]
