"""Cases with their inputs, for tests and benchmarks alike, and the one definition of correct."""

from nlhf_kernels.testing.cases import OPS, Case, Op, traffic
from nlhf_kernels.testing.check import check
from nlhf_kernels.testing.compare import TOLERANCE

__all__ = ["OPS", "TOLERANCE", "Case", "Op", "check", "traffic"]
