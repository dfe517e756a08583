"""Experiments on what the papers left open, a module each: ``run(settings) -> report.Result``."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """``minutes``: measured at the default size on two cores."""

    module: str
    question: str
    minutes: float


EXPERIMENTS = {
    "intransitive": Experiment(
        "intransitive",
        "how exploitable are RLHF, DPO and Nash policies where preferences go around in circles?",
        6,
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
        4,
    ),
}


def find(name: str) -> Experiment:
    """ValueError with the nearest name for one that is not there."""
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"do you mean {close[0]}?" if close else f"there are {', '.join(EXPERIMENTS)}"
        raise ValueError(f"reproduce: no experiment is called {name!r}; {hint}")
    return EXPERIMENTS[name]
