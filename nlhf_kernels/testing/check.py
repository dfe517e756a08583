"""``check(case, backend)``: the one definition of correct.

The oracle is ``eager`` in float64 on the same rounded inputs, its gradients by autograd. The op
under test runs with every allocation filled with NaN, so that nothing unwritten looks right.
"""

from nlhf_kernels import registry
from nlhf_kernels.testing.case import Case
from nlhf_kernels.testing.cases import SAMPLERS
from nlhf_kernels.testing.compare import Answers
from nlhf_kernels.testing.draw import check_draw
from nlhf_kernels.testing.gradients import check_gradients


def check(
    case: Case,
    backend: str,
    *,
    seed: int = 0,
    device: str = "cpu",
    generate_on: str = "cpu",
    by_own_logprobs: bool = False,
) -> None:
    """Raise ``AssertionError``, and say what differs, unless the backend is right on this case.

    ``generate_on`` as in ``Case.inputs``. ``by_own_logprobs`` is for a ``pairwise_pg_loss`` over
    hundreds of tokens, where an error in the last digit of every log-probability grows with the
    square of their number: the rest is then judged by the op's own, which must be right themselves.
    """
    answers = Answers(case.inputs(seed, device, generate_on))
    check_by(answers, case.op, backend, by_own_logprobs=by_own_logprobs)


def check_by(
    answers: Answers, op: str, backend: str, *, by_own_logprobs: bool = False, inplace: bool = False
) -> None:
    """``check`` by answers that others are judged by too; ``inplace``: with a backward in place."""
    if op in SAMPLERS:
        check_draw(answers, op, backend)
    else:
        check_gradients(answers, op, backend, by_own_logprobs, inplace)


def backends(device: str) -> tuple[str, ...]:
    """The backends that are meant for a type of device, eager first."""
    return tuple(reversed(registry.ORDER[device]))


def unavailable(case: Case, backend: str, device: str) -> str:
    """Why a backend cannot run a case; "" if it can."""
    return registry.reason(case.op, backend, device, case.features)
