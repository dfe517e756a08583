"""The mixture inside ``generate``, and losses of causal models without logits in memory."""

from nlhf_kernels.integrations import versions
from nlhf_kernels.integrations.lm_head import patch_lm_head, token_logprobs, unpatch_lm_head
from nlhf_kernels.integrations.mixture_processor import MixtureLogitsProcessor

versions.check("transformers")

__all__ = ["MixtureLogitsProcessor", "patch_lm_head", "token_logprobs", "unpatch_lm_head"]
