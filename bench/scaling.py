"""How time and memory grow: curves over B, V, tokens and T, each with a fitted exponent.

The exponent e of y = c * x^e is the slope of a least-squares line through log y over log x, for the
upper half of the points: below, fixed costs hide it. 1 is linear, less is better, and more than
1.1 is marked as worse than linear. Medians of samples; all points of a curve take turns.

  sample-B, sample-V     mixture_sample against rows and vocabulary
  loss-tokens, loss-V    pairwise_pg_loss, forward and backward, in place as in training
  rollout-T, rollout-B   y and y' of the tiny model; at exponent 1 in T every token takes as long
                         as the first, so what the attention adds to it shows
  memory-T               peak of a step beyond its state, one prompt; of nlhf and the plain loop,
                         on the CPU in a fresh process each

The standing run takes about 3 minutes on 2 cores.
"""

import dataclasses
import functools
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

import nlhf_kernels as nk
from bench import cli, measure, train_step
from bench.setting import EOS, PAD, Setting
from bench.text import number
from nlhf import rollout

WORSE = 1.1
OURS = "nlhf_kernels"
_SEEDS = 20
MEMORY = "memory-T"
NAMES = ["sample-B", "sample-V", "loss-tokens", "loss-V", "rollout-T", "rollout-B", MEMORY]


@dataclasses.dataclass(frozen=True)
class Curve:
    """``start(x)`` returns a ``Variant.call`` for a point; a point is timed for ``seconds``."""

    title: str
    x: str
    variant: str
    xs: tuple[int, ...]
    start: Callable[[int], Callable]
    seconds: float


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Of the power law through the upper half of the points, at least two of them.

    None where it cannot be told: a value is 0 or less.
    """
    half = min(len(xs) // 2, len(xs) - 2)
    if min(ys[half:]) <= 0:
        return None
    logs = ([math.log(v) for v in values[half:]] for values in (xs, ys))
    return statistics.linear_regression(*logs).slope


def powers(first: int, last: int, step: int = 2) -> tuple[int, ...]:
    """``first``, ``step`` times as much, and so on up to ``last``."""
    found = [first]
    while found[-1] * step <= last:
        found.append(found[-1] * step)
    return tuple(found)


# ---- what is timed


def sample(B: int, V: int, device: str, dtype: torch.dtype) -> Callable:
    generator = torch.Generator(device).manual_seed(0)
    new = {"generator": generator, "device": device, "dtype": dtype}
    policy, ref = (3 * torch.randn(B, V, **new) for _ in range(2))
    settings = {"mixture_coef": 0.5, "temperature": 0.9, "seed": 0, "position": 0}
    return lambda _: nk.mixture_sample(policy, ref, **settings)


def loss(N: int, V: int, device: str, dtype: torch.dtype) -> Callable:
    """Forward and backward of N tokens in four rows."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (4, N // 4)
    new = {"generator": generator, "device": device}
    logits = torch.randn(*shape, V, dtype=dtype, **new).requires_grad_()
    tokens = torch.randint(V, shape, **new)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    ref_logprobs = torch.full(shape, -math.log(V), device=device)
    preference = torch.full((4,), 0.7, device=device)

    def run(_):
        result = nk.pairwise_pg_loss(
            logits, tokens, mask, preference,
            tau=0.1, ref_logprobs=ref_logprobs, inplace_backward=True,
        )  # fmt: skip
        return torch.autograd.grad(result.loss, logits)

    return run


class Rollouts:
    """Of the tiny model, whose weights all points share."""

    def __init__(self, device: str, dtype: str):
        self._setting = Setting("tiny", B=1, P=16, T=1, device=device, dtype=dtype)
        self._models = None

    def __call__(self, B: int, T: int) -> Callable:
        setting = dataclasses.replace(self._setting, B=B, T=T)
        if self._models is None:
            self._models = setting.policy(), setting.policy(1)
        ids = setting.prompts()
        settings = {
            "mixture_coef": setting.mixture_coef,
            "max_new_tokens": T,
            "temperature": setting.temperature,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }

        def run(seed: int, _=None):
            mask = torch.ones_like(ids)
            return rollout.generate_pair(*self._models, ids, mask, seed=seed, **settings)

        for seed in range(_SEEDS):
            pair = run(seed)
            # a response that ends early would make a cheaper point
            if pair.y.mask.all() and pair.y_other.mask.all():
                return functools.partial(run, seed)
        raise SystemExit(f"a response ended before {T} tokens with each of {_SEEDS} seeds")


def curves(device: str, quick: bool) -> dict[str, Curve]:
    """By their names in ``--only``."""
    cuda = device == "cuda"
    name = "bfloat16" if cuda else "float32"
    dtype, V = getattr(torch, name), 151_936 if cuda else 32_768
    rollouts = Rollouts(device, name)
    B, Vs = powers(1, 512 if cuda else 64), powers(4_096, 262_144)
    N = powers(256, 16_384) if cuda else powers(64, 4_096)
    T, prompts = powers(16, 256), powers(1, 256 if cuda else 64)
    seconds = 0.4
    if quick:
        B, Vs, N, T, prompts = (x[:3] for x in (B, Vs, N, T, prompts))
        seconds = 0.1
    rows, tokens = (64, 4_096) if cuda else (8, 256)
    N_V = V if cuda else 8_192

    def curve(title: str, xs: tuple[int, ...], start: Callable, variant: str = OURS) -> Curve:
        x = title.split(" against ")[1].split(" (")[0]
        return Curve(title, x, variant, xs, start, seconds)

    return {
        "sample-B": curve(
            f"mixture_sample against B (V={V})", B, lambda x: sample(x, V, device, dtype)
        ),
        "sample-V": curve(
            f"mixture_sample against V (B={rows})", Vs, lambda x: sample(rows, x, device, dtype)
        ),
        "loss-tokens": curve(
            f"pairwise_pg_loss against tokens (V={N_V})", N, lambda x: loss(x, N_V, device, dtype)
        ),
        "loss-V": curve(
            f"pairwise_pg_loss against V ({tokens} tokens)",
            Vs[:-1],
            lambda x: loss(tokens, x, device, dtype),
        ),
        "rollout-T": curve("rollout against T (tiny, B=2)", T, lambda x: rollouts(2, x), "nlhf"),
        "rollout-B": curve(
            "rollout against B (tiny, T=16)", prompts, lambda x: rollouts(x, 16), "nlhf"
        ),
    }


# ---- how


def milliseconds(curve: Curve, device: str) -> list[float]:
    """The median at each point; all points take turns."""
    runs = {str(x): measure.Variant(call=curve.start(x)) for x in curve.xs}
    found = measure.interleave(runs, device, curve.seconds)
    return [timing.ms[1] for timing in found.values()]


def memory(setting: Setting, name: str) -> float:
    """MB that a step takes beyond its state."""
    if setting.device == "cpu":
        (row,) = train_step.ours(setting, [name], 1)
    else:
        # what torch counts on a GPU is exact, so a process of its own would only cost time
        from bench import contestants

        row = train_step.make_row(setting, name, contestants.run(setting, 1, [name])["steps"])
        gc.collect()
    if row["peak_mb"] is None:
        raise SystemExit(f"memory of {row['variant']}: {row['note'] or 'not known here'}")
    return row["peak_mb"] - row["state_mb"]


def memory_rows(device: str, quick: bool) -> Iterator[dict]:
    T = (16, 64) if quick else powers(32, 512)
    model = "tiny" if quick else "llama-35m"
    dtype = "bfloat16" if device == "cuda" else "float32"
    # one prompt, since micro-batches hold the others back
    start = Setting(model, B=1, P=16, T=1, dtype=dtype, device=device)
    for name in ("nlhf", "plain"):
        ys = [memory(dataclasses.replace(start, T=x), name) for x in T]
        title = f"memory of a step against T ({model}, B=1)"
        yield row(title, "T", T, "MB", ys, train_step.VARIANTS[name])


def row(title: str, x: str, xs: Sequence[int], y: str, ys: list[float], variant: str) -> dict:
    return {
        "kind": "scaling",
        "title": title,
        "x": x,
        "xs": list(xs),
        "y": y,
        "ys": ys,
        "variant": variant,
        "exponent": exponent(xs, ys),
    }


def all_rows(device: str, quick: bool, names: list[str]) -> Iterator[dict]:
    for name, curve in curves(device, quick).items():
        if name in names:
            ys = milliseconds(curve, device)
            yield row(curve.title, curve.x, curve.xs, "ms", ys, curve.variant)
    if MEMORY in names:
        yield from memory_rows(device, quick)


def table(found: list[dict]) -> str:
    body = []
    for r in found:
        ends = [f"{number(v[0])} to {number(v[-1])}" for v in (r["xs"], r["ys"])]
        mark = "worse than linear" if (r["exponent"] or 0) > WORSE else ""
        points = str(len(r["xs"]))
        body.append([r["title"], r["variant"], points, ends[0], f"{ends[1]} {r['y']}",
                     number(r["exponent"]), mark])  # fmt: skip
    return cli.table(["curve", "variant", "points", "from", "measured", "exponent", ""], body)


def main(argv: Sequence[str]) -> int:
    try:
        arguments = parser().parse(argv)
    except cli.BadInput as error:
        return cli.refuse(error)
    out = cli.Rows(arguments)
    names = arguments.only or NAMES
    for found in all_rows(arguments.device, arguments.quick, names):
        out.add(found)
        cli.say(f"{found['title']}, {found['variant']}: exponent {number(found['exponent'])}")
    if not arguments.json:
        print(table(out.found))
    return 0


def parser() -> cli.Parser:
    p = cli.Parser("scaling", __doc__)
    p.add_argument(
        "--only", type=cli.names_of(NAMES), metavar="NAME[,NAME]", help="these curves alone"
    )
    p.add_argument("--quick", action="store_true", help="three small points a curve, seconds")
    return p


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
