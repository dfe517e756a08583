"""TRL's Nash-MD: its trainer made right where it is there, replaced where it is not."""

from nlhf.trl_compat.config import NashMDConfig
from nlhf.trl_compat.patch import patch_nash_md, unpatch_nash_md
from nlhf.trl_compat.trainer import NashMDTrainer
from nlhf.trl_compat.wrapper import GeometricMixtureWrapper

__all__ = [
    "GeometricMixtureWrapper",
    "NashMDConfig",
    "NashMDTrainer",
    "patch_nash_md",
    "unpatch_nash_md",
]
