"""Patched verl gives what verl's torch functions give; its Triton kernel needs a GPU."""

import inspect

import pytest
import torch

from nlhf_kernels import integrations
from tests import tiny
from tests.hosts.test_trl import agree, runs
from tests.test_integrations import DTYPES, V, example, head, ids, normal


@pytest.fixture
def verl(load):
    """The modules by the last words of their names."""
    yield {
        "logits": load("verl.utils.torch_functional"),
        "hidden": load("verl.utils.experimental.torch_functional"),
        "kernel": load("verl.utils.kernel.linear_cross_entropy"),
    }
    integrations.verl.unpatch_verl()


PATCHES = (integrations.verl.patch_verl, integrations.verl.unpatch_verl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_logprobs_from_logits(verl, dtype, shape):
    logits = normal(*shape, V, dtype=dtype)
    labels = ids(*shape)
    # the gradient may be written over the logits
    agree(*runs(PATCHES, lambda x: verl["logits"].logprobs_from_logits(x * 1, labels), logits))


def test_signatures_have_the_names_of_verl(verl):
    functions = (verl["logits"].logprobs_from_logits, verl["hidden"].FusedLinearForPPO)
    forward = functions[1].forward
    ours = (integrations.verl.logprobs_from_logits, integrations.verl.FusedLinearForPPO)
    for theirs, own in zip((*functions, forward), (*ours, ours[1].forward), strict=True):
        assert list(inspect.signature(own).parameters) == list(inspect.signature(theirs).parameters)
    kernel = inspect.signature(verl["kernel"].LinearCrossEntropy.forward)
    names = list(inspect.signature(integrations.verl.linear_cross_entropy).parameters)
    assert names == list(kernel.parameters)[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(600,), (2, 3)], ids=str)
def test_fused_linear_for_ppo(verl, dtype, shape):
    inputs = head(dtype, *shape)[0][:2]

    def function(hidden, weight):
        module = verl["hidden"].FusedLinearForPPO(chunk_size=128, impl_backend="torch")
        return tuple(module(hidden, weight, ids(*shape), 0.8))

    agree(*runs(PATCHES, function, *inputs))


def test_linear_cross_entropy_is_what_verls_torch_function_gives(verl):
    inputs = head(torch.float32, 2, 3)[0][:2]

    def function(hidden, weight):
        if verl["kernel"].linear_cross_entropy is integrations.verl.linear_cross_entropy:
            return verl["kernel"].linear_cross_entropy(hidden, weight, ids(2, 3), 0.8, "none")
        own = verl["hidden"].FusedLinearForPPO()(hidden, weight, ids(2, 3), 0.8)
        return tuple(x.flatten() for x in own)

    agree(*runs(PATCHES, function, *inputs))


def test_all_modules_are_patched_and_put_back(verl, load):
    user = load("verl.workers.rollout.naive.naive_rollout")
    places = [
        (verl["logits"], "logprobs_from_logits"),
        (verl["hidden"], "FusedLinearForPPO"),
        (verl["kernel"], "linear_cross_entropy"),
        (user, "logprobs_from_logits"),
    ]
    own = [getattr(*place) for place in places]
    integrations.verl.patch_verl()
    integrations.verl.patch_verl()
    for (module, name), before in zip(places, own, strict=True):
        assert getattr(module, name) is getattr(integrations.verl, name) is not before
    integrations.verl.unpatch_verl()
    integrations.verl.unpatch_verl()
    assert [getattr(*place) for place in places] == own


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_that_verl_patched_runs_ours(verl, load, one_thread, backend):
    """``patch_forward_with_backends`` changes the class, so it is put back here."""
    monkey = load("verl.models.transformers.monkey_patch")
    rows, mask = tiny.prompts([7, 7])
    model = tiny.llama(dtype=torch.float32)
    own = type(model).forward
    logs = (model(rows, mask).logits.double() / 0.8).log_softmax(-1)
    want = logs.gather(-1, rows.roll(-1, -1)[..., None])[..., 0]
    integrations.verl.patch_verl()
    try:
        monkey.patch_forward_with_backends(model, True, backend)
        output = model(rows, mask, return_dict=True, temperature=0.8)
    finally:
        type(model).forward = own
    got = output.log_probs.view(rows.shape)
    torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-5)
    entropies = -(logs.exp() * logs).sum(-1).float()
    torch.testing.assert_close(output.entropy.view(rows.shape), entropies, atol=1e-5, rtol=1e-5)
    output.log_probs.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_the_example_agrees(load):
    load("verl")
    assert float(example("verl_ops").splitlines()[-1].split(":")[1]) < 1e-5
