"""Frozen dataclasses that are at once configuration, YAML file and command line."""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from nlhf.names import nearest, shown, unusable


def begins(group: str, default):
    """A field's default; the field is the first one of a group of flags in the help."""
    return dataclasses.field(default=default, metadata={"group": group})


@dataclass(frozen=True)
class Config:
    """Everything a training run depends on. The string under a field is its help."""

    assets: str = begins("models and data", "")
    """"quickstart" fetches and builds model, prompts, preference and judge; "": the fields below"""
    model: str = ""
    """folder or hub name of the causal language model to train"""
    ref: str = ""
    """folder or hub name of the frozen reference policy; "": the model before training"""
    prompts: str = ""
    """training prompts: a .jsonl, .jsonl.gz or .parquet file, or a hub name"""
    eval_prompts: str = ""
    """held-out prompts for the report; "": no report at the end"""
    preference: str = ""
    """folder of a preference or reward model, "module:function", or YAML file or url of a judge"""
    judge: str = ""
    """a second preference model that only judges, like preference; "": the first one judges"""
    output: str = "runs/nlhf"
    """folder of the run: settings, metrics, samples, checkpoints/, model/, report.md, curves.png"""
    apply_chat_template: bool = False
    """make prompts that are strings a user's message, in the template; messages always go there"""

    algorithm: str = begins("algorithm", "nash_md_pg")
    """one of those that nlhf algorithms lists, with the settings that each needs"""
    mixture_coef: float = 0.125
    """weight of the reference in the geometric mixture, in [0, 1] (beta in the paper)"""
    mixture_coef_last: float = -1.0
    """its value in the last step, to which it goes in a line; -1: constant"""
    tau: float = 0.05
    """strength of the KL regularisation towards the reference, at least 0"""
    eta: float = 0.0
    """as its paper has it: inpo, mnpo, onpo: inverse step; else a step. 0: not given"""
    ema_decay: float = 0.0
    """decay of the moving average of the weights, in [0, 1]; 0: not given"""
    inner_steps: int = 0
    """steps from one outer iteration to the next; 0: not given"""
    opponent_samples: int = 1
    """responses of the opponent that y is compared with, where y' is not the opponent's"""
    missing_eos_penalty: float = 0.0
    """taken from the preference for a response that does not end, and given for its opponent's"""
    copies_dtype: str = ""
    """of the reference and other frozen copies: float32, bfloat16 or float64; "": the policy's"""
    copies_device: str = ""
    """where frozen copies lie between uses: cpu for example; "": beside the policy"""
    kl: str = "reward_to_go"
    """KL estimator: reward_to_go, sequence, exact (over all ids) or token (biased)"""
    temperature: float = begins("sampling", 1.0)
    """sampling temperature, above 0; the trained policy is the one at this temperature"""
    top_k: int = 0
    """keep the k most likely tokens; 0: all. A filter biases the gradient"""
    top_p: float = 1.0
    """keep the smallest set of this mass; 1: all. A filter biases the gradient"""
    min_p: float = 0.0
    """keep tokens of at least this share of the maximum; 0: all. A filter biases the gradient"""
    max_new_tokens: int = 64
    """longest completion, in tokens"""
    cuda_graphs: bool = False
    """rollouts record the step of a token as a CUDA graph; full attention through sdpa only"""

    server: str = ""
    """url of an inference server that draws the responses of the policy; "": they are drawn here"""
    server_engine: str = "vllm"
    """vllm or sglang; both are asked for OpenAI's completions, sglang only if url ends in /v1"""
    server_model: str = ""
    """name of the model, or adapter, on the server; "": what it serves"""
    server_key_env: str = ""
    """environment variable that holds the server's key; "": no key"""
    server_logprobs: str = ""
    """its log-probabilities: raw, scaled (by temperature), processed; "": the engine's default"""
    server_concurrency: int = 64
    """requests to the server at once"""
    server_timeout: float = 600.0
    """seconds for an answer of the server"""
    importance: str = "none"
    """weights of policy gradients for what another distribution drew: none, token or sequence"""
    importance_cap: float = 2.0
    """the largest importance weight, at least 1"""

    steps: int = begins("optimisation", 100)
    """optimiser steps"""
    batch_size: int = 32
    """prompts a step"""
    micro_batch_size: int = 0
    """prompts a forward and backward pass; 0: batch_size"""
    gradient_checkpointing: bool = False
    """keep the layers' inputs alone and compute the rest again: less memory, same gradient"""
    head: str = "auto"
    """loss from hidden states (fused) or from the model's logits; auto: the faster, where it can"""
    packing: bool = False
    """loss without padding, all sequences of a pass in one row; needs attention in every layer"""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit, whose moments are 8 bits wide (needs bitsandbytes)"""
    learning_rate: float = 1e-5
    """AdamW's highest learning rate"""
    warmup_steps: int = 5
    """steps of linear warm-up, after which the rate decays linearly to a tenth"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm; 0: not clipped"""
    max_skipped: int = 10
    """steps in a row that may be skipped (docs/faults.md says when); one more ends the run"""
    max_logp_difference: float = 0.0
    """largest mean |log-probability at sampling - in training| of a step; 0: 0.01, bfloat16 0.2"""

    lora_r: int = begins("adapters, precision and device", 0)
    """rank of LoRA adapters on the linear layers; 0: all weights are trained"""
    lora_alpha: int = 32
    """scale of the adapters, divided by lora_r"""
    lora_layers: int = 0
    """adapt the last so many layers; 0: all"""
    dora: bool = False
    """train the norms of the adapted columns too; slower"""
    dtype: str = "float32"
    """of the model: float32, bfloat16 or float64 (adapters are float32 over bfloat16)"""
    master_weights: bool = False
    """the optimiser keeps bfloat16 weights in float32 too, so that no small step is lost"""
    device: str = "auto"
    """auto: a GPU if there is one; or cpu, cuda, cuda:1"""
    parallel: str = "auto"
    """how processes share the work: ddp, fsdp2 or zero3; auto: as accelerate launch says, or ddp"""
    collective_timeout: float = 1800.0
    """seconds that processes wait for each other; then the run ends"""
    vocabulary_parallel: bool = False
    """fsdp2: each process takes its ids of the head for all tokens; the head is never gathered"""
    gather: str = "model"
    """what a rollout of sharded weights has whole: the model, or, slowly, a layer at a time"""
    trust_remote_code: bool = False
    """let transformers run code that comes with the model"""

    eval_every: int = begins("measurements, checkpoints and reporting", 10)
    """steps between measurements against the reference on a few held-out prompts; 0: never"""
    eval_samples: int = 32
    """held-out prompts of these measurements"""
    report_samples: int = 256
    """held-out prompts of the report"""
    checkpoint_every: int = 20
    """steps between checkpoints; 0: none"""
    keep_checkpoints: int = 2
    """how many checkpoints are kept"""
    report_to: str = "auto"
    """tensorboard, wandb, trackio, with commas between; none; auto: tensorboard if installed"""
    push_to_hub: str = ""
    """name on the hub, user/model, that the trained model is uploaded to at the end; "": none"""
    hub_private: bool = False
    """make it private if it is new there"""
    seed: int = 0
    """seed of the prompts' order, of every draw and of the adapters"""

    def __post_init__(self):
        check(self, _LIMITS, _CHOICES)
        if self.dora and not self.lora_r:
            raise ValueError("config: dora needs adapters, got lora_r 0; set lora_r")
        if self.vocabulary_parallel and self.head == "logits":
            raise ValueError(
                "config: vocabulary_parallel needs hidden states, got head 'logits'; leave one out"
            )
        # adapters are float32 as they are
        halved = self.dtype == "bfloat16" and not self.lora_r
        if self.master_weights and not (halved and self.optimizer == "adamw"):
            raise ValueError(
                "config: master_weights needs dtype 'bfloat16', lora_r 0 and optimizer 'adamw', "
                f"got {self.dtype!r}, {self.lora_r} and {self.optimizer!r}; leave it off"
            )


# what may differ between a run and its continuation: none of it changes what a step computes
FREE = {"output", "device", "eval_every", "eval_samples", "report_samples"}
FREE |= {"parallel", "gather", "vocabulary_parallel", "collective_timeout"}
FREE |= {"checkpoint_every", "keep_checkpoints", "gradient_checkpointing"}
FREE |= {"server", "server_key_env", "server_concurrency", "server_timeout"}
FREE |= {"report_to", "push_to_hub", "hub_private", "max_skipped", "max_logp_difference"}

_TINY = 1e-30
DTYPES = ("float32", "bfloat16", "float64")
_LIMITS = (
    ("mixture_coef", 0, 1, "in [0, 1]"),
    ("mixture_coef_last", -1, 1, "in [0, 1], or -1"),
    ("tau", 0, 1e30, "at least 0 and finite"),
    ("eta", 0, 1e30, "at least 0 and finite"),
    ("ema_decay", 0, 1, "in [0, 1]"),
    ("inner_steps", 0, math.inf, "at least 0"),
    ("opponent_samples", 1, math.inf, "at least 1"),
    ("missing_eos_penalty", 0, 1e30, "at least 0 and finite"),
    ("temperature", _TINY, 1e30, "above 0 and finite"),
    ("top_k", 0, 2**63 - 1, "at least 0"),
    ("top_p", _TINY, 1, "in (0, 1]"),
    ("min_p", 0, 1, "in [0, 1]"),
    ("max_new_tokens", 1, math.inf, "at least 1"),
    ("server_concurrency", 1, 4096, "in 1 to 4096"),
    ("server_timeout", 1e-3, 1e6, "above 0 and finite"),
    ("importance_cap", 1, math.inf, "at least 1"),
    ("steps", 0, math.inf, "at least 0"),
    ("batch_size", 1, math.inf, "at least 1"),
    ("micro_batch_size", 0, math.inf, "at least 0"),
    ("learning_rate", 0, 1e300, "at least 0 and finite"),
    ("warmup_steps", 0, math.inf, "at least 0"),
    ("weight_decay", 0, 1e300, "at least 0 and finite"),
    ("max_grad_norm", 0, 1e300, "at least 0 and finite"),
    ("max_skipped", 0, math.inf, "at least 0"),
    ("max_logp_difference", 0, math.inf, "at least 0"),
    ("collective_timeout", 1, 1e7, "in 1 to 1e7"),
    ("lora_r", 0, math.inf, "at least 0"),
    ("lora_alpha", 1, math.inf, "at least 1"),
    ("lora_layers", 0, math.inf, "at least 0"),
    ("eval_every", 0, math.inf, "at least 0"),
    ("eval_samples", 1, math.inf, "at least 1"),
    ("report_samples", 2, math.inf, "at least 2"),
    ("checkpoint_every", 0, math.inf, "at least 0"),
    ("keep_checkpoints", 1, math.inf, "at least 1"),
    ("seed", -(2**63), 2**63 - 1, "a 64-bit integer"),
)
_CHOICES = {
    "assets": ("", "quickstart"),
    "kl": ("reward_to_go", "sequence", "token", "exact"),
    "head": ("auto", "fused", "logits"),
    "optimizer": ("adamw", "adamw_8bit"),
    "server_engine": ("vllm", "sglang"),
    "server_logprobs": ("", "raw", "scaled", "processed"),
    "importance": ("none", "token", "sequence"),
    "dtype": DTYPES,
    "copies_dtype": ("", *DTYPES),
    "gather": ("model", "layer"),
    "parallel": ("auto", "ddp", "fsdp2", "zero3"),
}


@dataclass(frozen=True)
class FitConfig:
    """Everything that fitting a preference model depends on. The string under a field is its help.

    Built-in ones have names that end in ``-preference``.
    """

    trunk: str = begins("model and data", "")
    """folder or hub name of the language model that reads the texts"""
    pairs: str = ""
    """training pairs: a .jsonl, .jsonl.gz or .parquet file, or a hub name with its #split"""
    held_out: str = ""
    """pairs to measure accuracy and calibration on, like pairs; "": not measured"""
    output: str = "runs/preference"
    """folder of the model, what --preference of the other commands reads"""

    kind: str = begins("what reads the texts, and how", "pairwise")
    """pairwise reads both responses (need not be transitive); reward is Bradley-Terry"""
    template: str = ""
    """text around {prompt}, {first} and {second}, or {prompt} and {response}; "": one of ours"""
    pooling: str = "last"
    """hidden state of the last token, or the mean over the tokens"""
    n_layers: int = 0
    """keep the first layers of the trunk; 0: all"""
    freeze_trunk: bool = False
    """train the linear head alone, by L-BFGS on features that are computed once"""
    max_length: int = 0
    """longest text in tokens; 0: the context of the trunk"""
    truncate: bool = False
    """cut the beginning of prompts that are too long, instead of refusing them"""
    skip_long: bool = False
    """leave out pairs that are too long all the same, instead of refusing them"""

    epochs: int = begins("optimisation", 1)
    """passes over the pairs (trainable trunk)"""
    batch_size: int = 16
    """pairs a step (trainable trunk)"""
    learning_rate: float = 1e-5
    """AdamW's highest learning rate, warmed up over a tenth of the steps (trainable trunk)"""
    l2: float = 0.1
    """weight of half the squared norm of the head on standardised features (frozen trunk)"""
    limit: int = begins("run", 0)
    """read at most so many pairs of each data set; 0: all"""
    dtype: str = "float32"
    """of the trunk: float32, bfloat16 or float64"""
    device: str = "auto"
    """auto: a GPU if there is one; or cpu, cuda, cuda:1"""
    seed: int = 0
    """seed of the pairs' order and of dropout"""
    checkpoint_every: int = 500
    """steps between checkpoints; 0: none but that of a run which a signal ends (trainable trunk)"""
    keep_checkpoints: int = 2
    """how many checkpoints are kept"""
    max_skipped: int = 10
    """steps in a row that may be skipped, loss or gradient not finite; one more ends the run"""

    def __post_init__(self):
        check(self, _FIT_LIMITS, _FIT_CHOICES)


_FIT_LIMITS = (
    ("n_layers", 0, math.inf, "at least 0"),
    ("max_length", 0, math.inf, "at least 0"),
    ("epochs", 1, math.inf, "at least 1"),
    ("batch_size", 1, math.inf, "at least 1"),
    ("learning_rate", _TINY, 1e30, "above 0 and at most 1e30"),
    ("l2", 0, 1e300, "at least 0 and finite"),
    ("limit", 0, math.inf, "at least 0"),
    ("checkpoint_every", 0, math.inf, "at least 0"),
    ("keep_checkpoints", 1, math.inf, "at least 1"),
    ("max_skipped", 0, math.inf, "at least 0"),
    ("seed", -(2**63), 2**63 - 1, "a 64-bit integer"),
)
_FIT_CHOICES = {
    "kind": ("pairwise", "reward"),
    "pooling": ("last", "mean"),
    "dtype": DTYPES,
}
_MOST_CHARACTERS = 2**20
BUILT_IN = (Path(__file__).parent / "configs", Path(__file__).parent / "recipes")


def check(config, limits: tuple, choices: dict) -> None:
    """ValueError for a field outside (name, lowest, highest, what it must be), or its choices."""
    for name, low, high, wanted in limits:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"config: {name} must be {wanted}, got {shown(value)}")
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise ValueError(
                f"config: {name} must be one of {', '.join(map(repr, known))}, got {shown(value)}"
                + nearest(value, known)
            )


@functools.cache
def field_help(kind: type = Config) -> dict[str, str]:
    """The string under each field of a configuration."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(kind)).body
        if isinstance(node, ast.ClassDef)
    )
    return {
        a.target.id: b.value.value
        for a, b in itertools.pairwise(body)
        if isinstance(a, ast.AnnAssign)
    }


def add_arguments(parser: argparse.ArgumentParser, kind: type = Config) -> None:
    """One flag a field, in groups; a flag that is not given stays out of the namespace."""
    group = parser
    for field in dataclasses.fields(kind):
        if "group" in field.metadata:
            group = parser.add_argument_group(field.metadata["group"])
        text = field_help(kind)[field.name].replace("%", "%%")
        default = repr(field.default) if field.default == "" else field.default
        options = {"help": f"{text} (default: {default})", "default": argparse.SUPPRESS}
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = field.type.__name__.upper()
            group.add_argument(flag, type=field.type, metavar=metavar, **options)


def load(source: str, overrides: dict | None = None, kind: type = Config):
    """A ``kind`` from a YAML file or a built-in name, with fields overridden.

    Raises:
        ValueError: no such file or name, not a mapping, an unknown field, a wrong type or value.
    """
    values = _read(source, kind) if source else {}
    return from_dict(values | (overrides or {}), source or "the command line", kind)


def built_in(kind: type = Config) -> dict[str, Path]:
    """The files of the built-in configurations of a kind, by name."""
    paths = {path.stem: path for folder in BUILT_IN for path in folder.glob("*.yaml")}
    whose = {n: FitConfig if n.endswith("-preference") else Config for n in sorted(paths)}
    return {name: paths[name] for name in whose if whose[name] is kind}


def _read(source: str, kind: type) -> dict:
    known = built_in(kind)
    path = known.get(source, Path(source))
    try:
        with path.open(encoding="utf-8") as file:
            # some files have no end
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"it has more than {_MOST_CHARACTERS} characters")
        node = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ValueError(
            f"config: cannot read {source}: {error.strerror}{nearest(source, known)}; give a YAML "
            f"file{' or one of: ' * bool(known)}{', '.join(known)}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())
        raise ValueError(f"config: {shown(source)} is not YAML: {first}") from None
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        raise ValueError(f"config: {source} must hold field: value lines")
    values = {}
    for key, value in node.value:
        where = f"config: {source}, line {key.start_mark.line + 1}"
        name = _scalar(key, where)
        if name in values:
            raise ValueError(f"{where}: {shown(name)} is there twice; leave one out")
        values[name] = _scalar(value, where)
    return values


def _scalar(node: yaml.Node, where: str):
    """What a node says; fields are flat, so that aliases cannot grow either."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: must be field: value, got a {node.id}")
    number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    # YAML 1.1 takes 010 for 8 and 1:30 for 90
    if number and re.match(r"[-+]?(0[0-9_xb]|[0-9_]+:)", node.value):
        raise ValueError(f"{where}: write {shown(node.value)} as a decimal number, or in quotes")
    try:
        return yaml.SafeLoader("").construct_object(node)
    # the others come from tags that do not fit, as !!bool before what is none
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where}: {shown(node.value)} cannot be read: {said}") from None


def from_dict(values: dict, source: str, kind: type = Config):
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in types:
            hint = nearest(name, types)
            raise ValueError(f"config: {source} has an unknown field {shown(name)}{hint}")
        checked[name] = _typed(name, value, types[name], source)
    return kind(**checked)


def _typed(name: str, value, kind: type, source: str):
    """The value as its field's type; YAML reads 1e-3 as a string and 1 as an int."""
    if type(value) is int and kind in (int, float) and not -(2**63) <= value < 2**63:
        raise ValueError(f"config: {name} must be a 64-bit integer, got another in {source}")
    exact = type(value) is kind
    number = kind is float and type(value) in (int, float)
    if exact and kind is str and (wrong := unusable(value)):
        raise ValueError(f"config: {name} in {source} must be text, got {wrong} in {shown(value)}")
    if exact or number:
        return kind(value)
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"config: {name} in {source} must be a {kind.__name__}, got {shown(value)}")


def identity(config: Config) -> dict:
    """The fields that a run and its continuation have in common."""
    return {n: value for n, value in dataclasses.asdict(config).items() if n not in FREE}


def difference(config: Config, before: dict) -> str:
    """A field in which a run that began with ``before`` is another one, in words; "" if none."""
    for name, value in identity(config).items():
        # one that is missing was none when it was written
        if (theirs := before.get(name, value)) != value:
            return f"{name} = {theirs!r}, not {value!r}"
    return ""


def dump(config) -> str:
    """Every field as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save(config, path: Path) -> None:
    path.write_text(dump(config), encoding="utf-8")
