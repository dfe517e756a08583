"""verl's fused log-probabilities by our op, on the CPU too, where verl's kernel does not run."""

import sys

import torch

from nlhf_kernels import integrations


def main() -> None:
    try:
        integrations.verl.patch_verl()
    except ImportError as error:
        sys.exit(f"verl_ops: {error}")
    # what verl's models call with use_fused_kernels=True
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 64, requires_grad=True)
    weight = (torch.randn(1000, 64) / 8).requires_grad_()
    labels = torch.randint(1000, (2, 5))
    logprobs, entropy = linear_cross_entropy(hidden, weight, labels, 0.9, "none")
    (-logprobs.mean() - 0.01 * entropy.mean()).backward()
    print(f"mean log-probability: {logprobs.mean():.4f}, entropy: {entropy.mean():.4f} nats")
    print(f"norms of the gradients: {hidden.grad.norm():.4f}, {weight.grad.norm():.4f}")

    integrations.verl.unpatch_verl()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO as Own

    ours = FusedLinearForPPO()(hidden, weight, labels, 0.9)
    own = Own()(hidden, weight, labels, 0.9)
    apart = max(float((x - y).abs().max()) for x, y in zip(ours, own, strict=True))
    print(f"largest difference from verl's torch function: {apart:.1e}")


if __name__ == "__main__":
    main()
