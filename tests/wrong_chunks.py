"""Planted bugs of the loop over chunks that the ``linear_`` ops share: around right kernels."""

import torch

from nlhf_kernels.ops import heads
from nlhf_kernels.ops.heads import Chunks, Head
from nlhf_kernels.ops.linear_pairwise_pg_loss import _Loss

_PRODUCTS = (
    "gradient of the last chunk only",
    "scale forgotten in the backward",
    "scale forgotten",
    "bias ignored",
    "bias after the scale",
    "bias without its gradient",
    "bias with the gradient of one chunk",
    "gradients of weights in bfloat16",
    "gradients of hidden states in bfloat16",
    "logits rounded to the inputs' dtype",
    "gradients of hidden states where they were compacted",
    "compaction off by one",
    "remainder left out",
)
_TWO = ("reference's bias ignored", "one buffer for two models")
BUGS = {
    "linear_token_logprobs": (*_PRODUCTS, "masked tokens multiplied", "one piece of the head"),
    "linear_token_kl": (*_PRODUCTS, *_TWO, "masked tokens multiplied", "one piece of the head"),
    "linear_pairwise_pg_loss": (
        *_PRODUCTS,
        *_TWO,
        "chunks from first to last",
        "sequences start where they did",
        "later sums of another sequence",
        "chunks as if alone",
    ),
}


def plant(monkeypatch, bug: str) -> None:
    logits, backward, start = Head.logits, Head.backward, Chunks.__init__
    steps, coefficients, reference = Chunks.__iter__, _Loss.coefficients, heads.reference

    def wrong_logits(self, rows, out):
        before = self.bias, self.scale
        if bug == "bias ignored":
            self.bias = None
        if bug == "scale forgotten":
            self.scale = 1
        if bug == "bias after the scale" and self.bias is not None:
            self.bias = self.bias / self.scale
        made = logits(self, rows, out)
        if bug.startswith("logits rounded"):
            made.copy_(made.to(self.hidden.dtype))
        self.bias, self.scale = before
        return made

    def wrong_backward(self, grad_logits, rows, places):
        scale, to_bias = self.scale, self.grads[2].clone()
        if bug.startswith("scale forgotten"):
            self.scale = 1
        if bug == "gradient of the last chunk only":
            self.grads[1].zero_()
        if bug == "bias with the gradient of one chunk":
            self.grads[2].zero_()
        where = places
        if bug.endswith("where they were compacted"):
            where = torch.arange(len(places))
        backward(self, grad_logits, rows, where)
        if bug == "bias without its gradient":
            self.grads[2] = to_bias
        for i, of in ((1, "weights"), (0, "hidden states")):
            if bug == f"gradients of {of} in bfloat16":
                self.grads[i].copy_(self.grads[i].bfloat16())
        self.scale = scale

    def wrong_start(self, head, mask, *arguments):
        start(self, head, None if bug == "masked tokens multiplied" else mask, *arguments)
        if bug == "compaction off by one":
            self.places = (self.places - 1).clamp(min=0)
        if bug == "one buffer for two models":
            self.buffers = self.buffers[:1] * len(self.buffers)

    def wrong_steps(self):
        chunks = list(steps(self))
        if bug == "chunks from first to last":
            chunks.reverse()
        if bug == "remainder left out" and len(chunks) > 1:
            chunks.pop()
        return iter(chunks)

    def wrong_coefficients(self, some, preference, later):
        if bug == "chunks as if alone":
            later = None
        if bug == "later sums of another sequence" and later is not None:
            later = later.roll(1)
        offsets = self.offsets
        if bug == "sequences start where they did":
            self.offsets = offsets + some.start
        made = coefficients(self, some, preference, later)
        self.offsets = offsets
        return made

    def wrong_reference(weight, bias, ref_hidden, ref_weight, ref_bias):
        return reference(weight, bias, ref_hidden, ref_weight, None)

    monkeypatch.setattr(Head, "logits", wrong_logits)
    monkeypatch.setattr(Head, "backward", wrong_backward)
    monkeypatch.setattr(Chunks, "__init__", wrong_start)
    monkeypatch.setattr(Chunks, "__iter__", wrong_steps)
    monkeypatch.setattr(_Loss, "coefficients", wrong_coefficients)
    if bug == "reference's bias ignored":
        monkeypatch.setattr(heads, "reference", wrong_reference)
    if bug == "one piece of the head":
        pieces = Head._pieces
        monkeypatch.setattr(Head, "_pieces", lambda self: [next(pieces(self))])
