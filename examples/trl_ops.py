"""TRL's log-probability functions by the fused ops, and back: the same numbers."""

import sys

import torch

from nlhf_kernels import integrations


def main() -> None:
    try:
        integrations.trl.patch_trl()
    except ImportError as error:
        sys.exit(f"trl_ops: {error}")
    # any trainer of TRL, imported before or after, now calls the fused ops
    from trl.trainer import utils

    torch.manual_seed(0)
    logits = torch.randn(2, 5, 1000, requires_grad=True)
    completion = torch.randint(1000, (2, 5))
    fused = utils.selective_log_softmax(logits, completion)
    entropy = utils.entropy_from_logits(logits)
    (gradient,) = torch.autograd.grad(fused.sum(), logits)

    integrations.trl.unpatch_trl()
    own = utils.selective_log_softmax(logits, completion)
    (own_gradient,) = torch.autograd.grad(own.sum(), logits)
    print(f"log-probability of the first completion: {fused[0].sum():.4f} nats")
    print(f"entropy of its tokens: {entropy[0].mean():.4f} nats")
    print(f"largest difference from TRL's own: {(fused - own).abs().max():.1e}")
    print(f"largest difference of the gradients: {(gradient - own_gradient).abs().max():.1e}")


if __name__ == "__main__":
    main()
