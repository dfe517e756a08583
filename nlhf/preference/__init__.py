"""Preferences P(first > second | prompt) over texts: models, rewards, judges, any callable.

Texts, never token ids, cross this border: a preference model has a tokenizer of its own.
"""

from nlhf.preference.judge import HTTPJudge, JudgeConfig
from nlhf.preference.models import (
    CONFIG,
    KINDS,
    JoinPrompt,
    PairwiseModel,
    PreferenceModel,
    RewardModel,
    load_preference,
    load_trunk,
)
from nlhf.preference.protocol import Checked, Preference, Unusable
from nlhf.preference.source import as_preference

__all__ = [
    "CONFIG",
    "KINDS",
    "Checked",
    "HTTPJudge",
    "JoinPrompt",
    "JudgeConfig",
    "PairwiseModel",
    "Preference",
    "PreferenceModel",
    "RewardModel",
    "Unusable",
    "as_preference",
    "load_preference",
    "load_trunk",
]
