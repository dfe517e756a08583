"""OpenRLHF's log-probabilities by the fused op, which leaves the logits as they are."""

import sys

import torch

from nlhf_kernels import integrations


def main() -> None:
    try:
        integrations.openrlhf.patch_openrlhf()
    except ImportError as error:
        sys.exit(f"openrlhf_ops: {error}")
    # the name that the actor calls
    from openrlhf.models import utils

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 1000), torch.randint(1000, (2, 5))
    before = logits.clone()
    fused = utils.log_probs_from_logits(logits, labels, temperature=0.7)
    print(f"log-probability of the first row: {fused[0].sum():.4f} nats")
    print(f"logits unchanged: {torch.equal(logits, before)}")

    integrations.openrlhf.unpatch_openrlhf()
    own = utils.log_probs_from_logits(logits, labels, temperature=0.7)
    print(f"largest difference from OpenRLHF's own: {(fused - own).abs().max():.1e}")
    print(f"logits unchanged by OpenRLHF's own: {torch.equal(logits, before)}")


if __name__ == "__main__":
    main()
