"""OpenRLHF's log-probabilities by the fused op; needs no OpenRLHF."""

from torch import Tensor

from nlhf_kernels.integrations import patching, rows, versions

_patches = patching.Patches("openrlhf")
versions.check("openrlhf")


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (...) of labels (...) under softmax(logits / temperature), logits (..., V).

    In the dtype of the logits, which stay as they are, where OpenRLHF's own divides them in place.
    ``labels`` in [0, V), ``temperature`` above 0: ``ValueError`` otherwise, for labels on the CPU.
    """
    found = rows.token_logprobs(logits, labels, temperature=temperature)
    return found.logprobs.to(logits.dtype)


def patch_openrlhf() -> None:
    """Put it in place of OpenRLHF's wherever a module of OpenRLHF holds it; again: no change.

    Raises ``ImportError`` without OpenRLHF.
    """
    utils = versions.load("openrlhf", "openrlhf.models.utils")
    versions.check("openrlhf")
    if not _patches.holds(utils.log_probs_from_logits):
        _patches.replace(utils.log_probs_from_logits, log_probs_from_logits)


def unpatch_openrlhf() -> None:
    """Put OpenRLHF's own back; again: no change."""
    _patches.undo()
