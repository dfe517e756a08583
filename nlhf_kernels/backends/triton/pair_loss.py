"""``pair_loss`` on Triton: one program walks over all pairs."""

import triton
import triton.language as tl

from nlhf_kernels.backends.triton import common

# pairs per step
STEP = 256
OPTIONS = {"num_warps": 4}
# the kernel has as many scalars for their weights
MOST_ANCHORS = 8
LABEL, DIFFERENCE = tl.constexpr(0), tl.constexpr(1)
RESPONSE, LOGISTIC = tl.constexpr(2), tl.constexpr(3)
FORMS = {
    "label": LABEL.value,
    "difference": DIFFERENCE.value,
    "response": RESPONSE.value,
    "logistic": LOGISTIC.value,
}


def pair_loss_fwd(
    logprobs,
    other_logprobs,
    anchor_logprobs,
    other_anchor_logprobs,
    preference,
    other_preference,
    weights,
    form,
    scale,
):
    pairs = logprobs.shape[0]
    loss = logprobs.new_empty(())
    margins, grad, other_grad = (logprobs.new_empty(pairs) for _ in range(3))
    if not pairs:
        return loss.zero_(), margins, grad, other_grad
    tensors = (logprobs, other_logprobs, anchor_logprobs, other_anchor_logprobs, preference)
    common.launch(
        pair_kernel,
        (1,),
        logprobs,
        *(x.contiguous() for x in tensors),
        None if other_preference is None else other_preference.contiguous(),
        loss,
        margins,
        grad,
        other_grad,
        pairs,
        scale,
        *weights,
        *[0.0] * (MOST_ANCHORS - len(weights)),
        ANCHORS=len(weights),
        FORM=FORMS[form],
        STEP=STEP,
        **OPTIONS,
    )
    return loss, margins, grad, other_grad


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def without_anchor(
    margin, own, other, anchor_ptr, other_anchor_ptr, weight, j: tl.constexpr, pairs, place
):
    """Margin and log-ratios less what one anchor has of them."""
    # nothing is read where the weight is 0: 0 * inf must not be formed
    wanted = place < tl.where(weight == 0, 0, pairs)
    row = pairs.to(tl.int64) * j
    a = tl.load(anchor_ptr + row + place, mask=wanted, other=0)
    b = tl.load(other_anchor_ptr + row + place, mask=wanted, other=0)
    return margin - weight * (a - b), own - weight * a, other - weight * b


@triton.jit(do_not_specialize=["pairs"])
def pair_kernel(
    logprobs_ptr,
    other_logprobs_ptr,
    anchor_ptr,
    other_anchor_ptr,
    preference_ptr,
    other_preference_ptr,
    loss_ptr,
    margins_ptr,
    grad_ptr,
    other_grad_ptr,
    pairs,
    scale: tl.float64,
    weight0: tl.float64,
    weight1: tl.float64,
    weight2: tl.float64,
    weight3: tl.float64,
    weight4: tl.float64,
    weight5: tl.float64,
    weight6: tl.float64,
    weight7: tl.float64,
    ANCHORS: tl.constexpr,
    FORM: tl.constexpr,
    STEP: tl.constexpr,
):
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    s = tl.full((), scale, tl.float64).to(dtype)
    count = tl.full((), pairs, dtype)
    total = tl.full((STEP,), 0.0, dtype)
    for start in range(0, pairs, STEP):
        place = start + tl.arange(0, STEP)
        inside = place < pairs
        u = tl.load(logprobs_ptr + place, mask=inside, other=0)
        v = tl.load(other_logprobs_ptr + place, mask=inside, other=0)
        h = u - v
        for j in tl.static_range(ANCHORS):
            # at once: the interpreter would assign it as float32
            if j == 0:
                weight = tl.full((), weight0, tl.float64)
            elif j == 1:
                weight = tl.full((), weight1, tl.float64)
            elif j == 2:
                weight = tl.full((), weight2, tl.float64)
            elif j == 3:
                weight = tl.full((), weight3, tl.float64)
            elif j == 4:
                weight = tl.full((), weight4, tl.float64)
            elif j == 5:
                weight = tl.full((), weight5, tl.float64)
            elif j == 6:
                weight = tl.full((), weight6, tl.float64)
            else:
                weight = tl.full((), weight7, tl.float64)
            h, u, v = without_anchor(
                h, u, v, anchor_ptr, other_anchor_ptr, weight.to(dtype), j, pairs, place
            )
        tl.store(margins_ptr + place, h, mask=inside)
        # a margin that is not a number must not end as 0, and logistic losses of infinities can
        finite = tl.abs(h) < float("inf")
        h = tl.where(finite, h, float("nan"))
        u = tl.where(finite, u, float("nan"))
        v = tl.where(finite, v, float("nan"))

        p = tl.load(preference_ptr + place, mask=inside, other=0)
        q = p
        if other_preference_ptr is not None:
            q = tl.load(other_preference_ptr + place, mask=inside, other=0)
        if FORM == LABEL:
            below, above = h - s, h + s
            loss = p * below * below + (1.0 - p) * above * above
            grad = 2.0 * (p * below + (1.0 - p) * above)
            other_grad = -grad
        elif FORM == DIFFERENCE:
            away = h - s * (p - q)
            loss = away * away
            grad = 2.0 * away
            other_grad = -grad
        elif FORM == RESPONSE:
            grad = u - s * (p - 0.5)
            other_grad = v - s * (q - 0.5)
            loss = (grad * grad + other_grad * other_grad) / 2.0
        else:
            label = p
            if other_preference_ptr is not None:
                label = sigmoid(p - q)
            x = s * h
            # maximum() may drop a NaN
            loss = tl.where(x < 0, 0.0, x) - x * label + tl.log(1.0 + tl.exp(-tl.abs(x)))
            grad = s * (sigmoid(x) - label)
            other_grad = -grad
        total += tl.where(inside, loss, 0.0)
        tl.store(grad_ptr + place, grad / count, mask=inside)
        tl.store(other_grad_ptr + place, other_grad / count, mask=inside)
    tl.store(loss_ptr, tl.sum(total, 0) / count)
