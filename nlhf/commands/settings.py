"""The settings of the commands that only read models, pairs and games."""

import math
from dataclasses import dataclass

from nlhf.config import DTYPES, begins, check

_ABOVE_0 = 1e-30
_SEED = ("seed", -(2**63), 2**63 - 1, "a 64-bit integer")
_SAMPLING = (
    ("max_new_tokens", 1, math.inf, "at least 1"),
    ("batch_size", 1, math.inf, "at least 1"),
    _SEED,
)


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that responses depend on. The string under a field is its help."""

    model: str = begins("who answers what", "")
    """a folder, a run of nlhf train, LoRA adapters or a hub name: who answers"""
    ref: str = ""
    """a second model to mix with and to score by; "": the base of LoRA adapters, or none"""
    mixture_coef: float = 0.0
    """weight of the reference in the geometric mixture that is drawn from, in [0, 1]"""
    prompt: str = ""
    """a prompt as text, instead of prompts"""
    prompts: str = ""
    """a .jsonl, .jsonl.gz or .parquet file, or a hub name with its #split"""
    limit: int = 0
    """the first so many prompts; 0: all"""
    apply_chat_template: bool = False
    """make prompts that are strings a user's message, in the template; messages always go there"""
    output: str = ""
    """a new .jsonl file, or folder for completions.jsonl, that nlhf evaluate reads; "": printed"""

    n_samples: int = begins("sampling", 1)
    """responses to each prompt"""
    temperature: float = 1.0
    """of sampling, at least 0; 0: the most likely token each time"""
    top_k: int = 0
    """keep the k most likely tokens; 0: all"""
    top_p: float = 1.0
    """keep the smallest set of this mass; 1: all"""
    min_p: float = 0.0
    """keep tokens of at least this share of the maximum; 0: all"""
    max_new_tokens: int = 64
    """longest response, in tokens"""
    seed: int = 0
    """seed of every draw; a response depends on neither batch_size nor the prompts after its own"""

    batch_size: int = begins("run", 32)
    """prompts at once"""
    dtype: str = "float32"
    """of the models: float32, bfloat16 or float64"""
    device: str = "auto"
    """auto: a GPU if there is one; or cpu, cuda, cuda:1"""
    trust_remote_code: bool = False
    """let transformers run code that comes with the model"""

    def __post_init__(self):
        check(self, (*_SAMPLING, *_GENERATE), {"dtype": DTYPES})


_GENERATE = (
    ("mixture_coef", 0, 1, "in [0, 1]"),
    ("limit", 0, math.inf, "at least 0"),
    ("n_samples", 1, 10**6, "at least 1 and at most a million"),
    ("temperature", 0, 1e30, "at least 0 and finite"),
    ("top_k", 0, 2**63 - 1, "at least 0"),
    ("top_p", _ABOVE_0, 1, "in (0, 1]"),
    ("min_p", 0, 1, "in [0, 1]"),
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that a comparison of models depends on, but for who takes part."""

    preference: str = begins("who judges what", "")
    """folder of a saved preference or reward model, or "module:function" of our protocol"""
    prompts: str = ""
    """a .jsonl, .jsonl.gz or .parquet file, or a hub name with its #split; "": the completions'"""
    samples: int = 256
    """the first so many prompts"""
    apply_chat_template: bool = False
    """make prompts that are strings a user's message, in the template; messages always go there"""
    output: str = "evaluation"
    """a new folder: report.md, evaluation.json, heatmap.png, completions/"""

    max_new_tokens: int = begins("sampling", 64)
    """longest completion, in tokens"""
    temperature: float = 1.0
    """of sampling, above 0"""
    seed: int = 0
    """seed of every draw"""

    batch_size: int = begins("run", 32)
    """prompts at once"""
    dtype: str = "float32"
    """of the models: float32, bfloat16 or float64"""
    device: str = "auto"
    """auto: a GPU if there is one; or cpu, cuda, cuda:1"""

    def __post_init__(self):
        limits = (
            ("samples", 1, math.inf, "at least 1"),
            ("temperature", _ABOVE_0, 1e30, "above 0 and finite"),
        )
        check(self, (*_SAMPLING, *limits), {"dtype": DTYPES})


@dataclass(frozen=True)
class SolveConfig:
    """What the solution of a game depends on, but for the game."""

    tau: float = begins("the game", 0.1)
    """strength of the KL regularisation towards the reference, above 0"""
    ref: str = ""
    """the reference, as "0.5,0.25,0.25"; "": uniform"""
    solvers: str = begins("the comparison", "all")
    """all, or names with commas between"""
    iterations: int = 1000
    """of every solver"""
    output: str = "solve.png"
    """the plot: a .png, .pdf or .svg file"""

    def __post_init__(self):
        check(self, (("iterations", 1, math.inf, "at least 1"),), {})


@dataclass(frozen=True)
class ReproduceConfig:
    """What an experiment depends on, but for which it is."""

    seed: int = begins("run", 0)
    """seed of every draw"""
    scale: float = 1.0
    """multiplies the numbers of steps and seeds, above 0"""
    output: str = ""
    """folder of the report; "": runs/reproduce/ and the name"""

    def __post_init__(self):
        check(self, (_SEED, ("scale", _ABOVE_0, 1e30, "above 0 and finite")), {})
