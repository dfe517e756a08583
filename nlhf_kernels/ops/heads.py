"""LM heads whose logits are made chunk by chunk: the products that the ``linear_`` ops share."""

import torch
import torch.distributed as dist
from torch import Tensor

from nlhf_kernels import registry
from nlhf_kernels.ops import common, vocabulary

# tokens of a chunk: fewer, and adding to the gradient of the weights takes as long as the products
FEWEST = {"cpu": 128, "cuda": 2048}
MOST = {"cpu": 4096, "cuda": 8192}
BUDGET = {"cpu": 2**26, "cuda": 3 * 2**30}
# ids whose 16-bit weights are widened at a time on the CPU, where a product would round its result
_PIECE = 4096


def chunk_size(device: torch.device, V: int, budget: int | None, copies: float) -> int:
    """Tokens whose float32 logits, ``copies`` times over, fit into the budget."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    budget = BUDGET[kind] if budget is None else budget
    tokens = int(budget / (4 * V * copies))
    return min(max(tokens // 64 * 64, FEWEST[kind]), MOST[kind])


class Head:
    """hidden @ weight.T + bias, times a scale, of chosen rows; and the way back."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        wanted: tuple[bool, bool, bool] = (False, False, False),
    ):
        # an exported program calls raw ops with leaves, outside of any autograd function
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.scale, self.dtype = scale, dtype
        self.grads = list(fake_gradients(hidden, weight, dtype, wanted))
        # rows under the mask have no chunk
        self.grads[0].zero_()
        self.grads[2].zero_()
        # the first chunk writes the gradient of the weights, which is large
        self._first = True
        self.wanted = wanted
        # tensor cores multiply 16 bits and add up 32
        self.narrow = hidden.is_cuda and weight.dtype != dtype and dtype == torch.float32

    def rows(self, places: Tensor) -> Tensor:
        """The hidden states at ``places`` of the tokens in a row, as the products take them."""
        if self.hidden.dim() == 2:
            rows = self.hidden[places]
        else:
            T = self.hidden.shape[1]
            rows = self.hidden[places // T, places % T]
        return rows if self.narrow else rows.to(self.dtype)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """Into ``out``, a buffer of at least as many rows."""
        out = out[: len(rows)]
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.narrow:
            torch.mm(rows, self.weight.T, out_dtype=self.dtype, out=out)
        else:
            for ids, piece in self._pieces():
                torch.mm(rows, piece.T, out=out[:, ids])
        if bias is not None:
            out += bias
        return out if self.scale == 1 else out.mul_(self.scale)

    def backward(self, grad_logits: Tensor, rows: Tensor, places: Tensor) -> None:
        """Adds a chunk's part to the gradients; each row of hidden states has one chunk."""
        if self.scale != 1:
            grad_logits *= self.scale
        to_hidden, to_weight, to_bias = self.wanted
        if to_hidden:
            flat = self.grads[0].view(-1, self.hidden.shape[-1])
            flat[places] = self._of_hidden(grad_logits)
        if to_weight:
            grad, mixed = self.grads[1], {"out_dtype": self.dtype} if self.narrow else {}
            if self._first:
                torch.mm(grad_logits.T, rows, **mixed, out=grad)
            else:
                torch.addmm(grad, grad_logits.T, rows, **mixed, out=grad)
        if to_bias:
            self.grads[2] += grad_logits.sum(0, dtype=self.dtype)
        self._first = False

    def gradients(self, part: vocabulary.Part | None) -> tuple[Tensor, ...]:
        """Of hidden states, weight and bias; empty where nobody wants them."""
        if self._first:
            self.grads[1].zero_()
        if part is not None and self.wanted[0]:
            # each rank has what its ids do to the hidden states
            dist.all_reduce(self.grads[0], group=part.group)
        return tuple(self.grads)

    def _of_hidden(self, grad_logits: Tensor) -> Tensor:
        if self.narrow:
            return torch.mm(grad_logits, self.weight, out_dtype=self.dtype)
        grad = None
        for ids, piece in self._pieces():
            part = grad_logits[:, ids]
            grad = part @ piece if grad is None else grad.addmm_(part, piece)
        return grad

    def _pieces(self):
        """Ids and their weights in the dtype of the logits, and never a copy of all of them."""
        V = len(self.weight)
        step = V if self.weight.dtype == self.dtype else _PIECE
        for start in range(0, V, step):
            ids = slice(start, min(start + step, V))
            yield ids, self.weight[ids].to(self.dtype)


class Chunks:
    """The tokens that the mask keeps, in chunks, and the buffers that all chunks share."""

    def __init__(
        self,
        head: Head,
        mask: Tensor | None,
        budget: int,
        buffers: int,
        part: vocabulary.Part | None,
        backend: str,
    ):
        """``budget`` 0 is the usual one; ``buffers``: how many logits are needed at a time."""
        device, V = head.hidden.device, len(head.weight)
        count = head.hidden.shape[:-1].numel()
        if mask is None:
            self.places = torch.arange(count, device=device)
        else:
            self.places = mask.reshape(-1).nonzero()[:, 0]
        copies = buffers + (head.narrow and any(head.wanted)) / 2
        most = chunk_size(device, V, budget or None, copies)
        # as many chunks as that takes, and all of about the same size
        some = -(-len(self.places) // -(-max(len(self.places), 1) // most))
        self.size = max(min(most, -(-some // 64) * 64), 1)
        rows = min(self.size, len(self.places))
        self.buffers = [
            torch.empty(rows, V, dtype=head.dtype, device=device) for _ in range(buffers)
        ]
        self._narrow = head.hidden.new_empty(rows, V) if copies != buffers else None
        self._backend = backend
        self.part = part

    def __iter__(self):
        """From the last to the first: (their slice of the kept tokens, places)."""
        for end in range(len(self.places), 0, -self.size):
            some = slice(max(end - self.size, 0), end)
            yield some, self.places[some]

    def ids(self, tokens: Tensor) -> Tensor:
        """As kernels take them: of this rank's part of the vocabulary."""
        return tokens if self.part is None else self.part.ids(tokens)

    def run(self, raw_op: str, *arguments):
        return registry.load(raw_op, self._backend)(*arguments)

    def logprobs(self, logits: Tensor, tokens: Tensor, scaling: tuple) -> tuple[Tensor, ...]:
        """The statistics of ``token_logprobs_fwd``, of the whole vocabulary."""
        found = self.run("token_logprobs_fwd", logits, self.ids(tokens), None, *scaling)
        return vocabulary.whole(self.part, tokens, None, *found)

    def kl(self, logits: Tensor, refs: Tensor, tokens: Tensor, scaling: tuple) -> tuple:
        """The statistics of ``token_kl_fwd``, of the whole vocabulary."""
        found = self.run("token_kl_fwd", logits, refs, self.ids(tokens), None, *scaling)
        return vocabulary.whole_kl(self.part, tokens, None, *found)

    def gradient(self, raw_op: str, logits: Tensor, *arguments) -> Tensor:
        """Over the logits, or beside them where the products take 16 bits."""
        grad = logits if self._narrow is None else self._narrow[: len(logits)]
        self.run(raw_op, grad, logits, *arguments)
        return grad


def fake_gradients(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted) -> tuple:
    likes = zip((hidden, weight, weight[:, 0]), wanted, strict=True)
    return tuple(x.new_empty(x.shape if want else 0, dtype=dtype) for x, want in likes)


def rounded(grads: tuple[Tensor, ...], wanted, dtype: torch.dtype) -> list[Tensor | None]:
    """As autograd wants them."""
    return [g.to(dtype) if want else None for g, want in zip(grads, wanted, strict=True)]


def scaled(
    grads: tuple[Tensor, ...], wanted, by: Tensor, dtype: torch.dtype
) -> list[Tensor | None]:
    """Times the incoming gradient, in one rounding."""
    if by.is_cpu and not torch.compiler.is_compiling() and by == 1:
        return rounded(grads, wanted, dtype)
    return [
        torch.mul(g, by, out=torch.empty_like(g, dtype=dtype)) if want else None
        for g, want in zip(grads, wanted, strict=True)
    ]


def wanted(*leaves: Tensor | None) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves)


def reference(
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference's hidden states and head, which may be the policy's, without a gradient."""
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias
    bias = None if ref_bias is None else ref_bias.detach()
    return ref_hidden.detach(), ref_weight.detach(), bias


# ---- checks


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: str = "",
    dims: tuple[int, ...] = (2, 3),
) -> None:
    """Hidden states of a model, whose names start with ``prefix``, and what they go through."""
    axis, rows = "hidden dimension", "(N, D) or (B, T, D)" if 3 in dims else "(B, D)"
    common.check_matrix(op, f"{prefix}hidden", hidden, dims, rows, axis)
    common.check_matrix(op, f"{prefix}weight", weight, (2,), "(V, D)", axis)
    alike = weight.dtype == hidden.dtype and weight.device == hidden.device
    if not alike or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: {prefix}weight must be (V, D) like {prefix}hidden {rows}, got "
            f"{common.describe(weight)} beside {common.describe(hidden)}"
        )
    if bias is not None:
        shape, dtypes = weight.shape[:1], (weight.dtype,)
        common.check_tensor(op, f"{prefix}bias", bias, shape, dtypes, weight.device)


def check_ref_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    """The reference's beside the policy's; without a weight the head is the policy's."""
    common.require(
        ref_weight is not None or ref_bias is None,
        op,
        "ref_bias must be left out without ref_weight",
    )
    check_head(op, ref_hidden, weight if ref_weight is None else ref_weight, ref_bias, "ref_")
    same = ref_hidden.shape[:-1] == hidden.shape[:-1] and ref_hidden.device == hidden.device
    if not same or (ref_weight is not None and len(ref_weight) != len(weight)):
        beside = f"{common.describe(hidden)} and {common.describe(weight)}"
        raise ValueError(
            f"{op}: ref_hidden and ref_weight must have the tokens, V and device of hidden and "
            f"weight, got {common.describe(ref_hidden)} and {common.describe(ref_weight)} beside "
            f"{beside}"
        )


def check_chunks(op: str, logit_scale: float, memory_budget: int | None) -> None:
    high = common.LARGEST
    common.check_number(op, "logit_scale", logit_scale, -high, high, "a finite number")
    if memory_budget is not None:
        wanted = "a whole number of bytes, at least 1, or None"
        common.check_whole(op, "memory_budget", memory_budget, 1, 2**63 - 1, wanted)
