"""Patched TRL gives what TRL gives: functions, gradients, and a model's forward."""

import inspect
import sys

import pytest
import torch

import nlhf_kernels as nk
from nlhf_kernels import integrations
from tests import tiny
from tests.test_integrations import DTYPES, V, example, head, ids, normal

NAMES = (
    "selective_log_softmax",
    "entropy_from_logits",
    "selective_log_softmax_and_entropy",
    "_ChunkedLogProbFunction",
    "ChunkedLogProbFunction",
    "_fused_logprob_entropy",
)


@pytest.fixture
def utils(load):
    found = load("trl.trainer.utils")
    yield found
    integrations.trl.unpatch_trl()


def holders() -> dict:
    """Every attribute of a loaded module of TRL that has one of the names."""
    modules = {n: m for n, m in list(sys.modules.items()) if n.split(".")[0] == "trl"}
    return {
        (n, name): vars(m)[name] for n, m in modules.items() for name in NAMES if name in vars(m)
    }


def results(outputs, inputs) -> list:
    """The outputs, then the gradients of the inputs; incoming ones are not constant."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in outputs if x is not None and x.requires_grad]
    grads = [normal(*x.shape, seed=3).bfloat16().to(x.dtype) for x in wanted]
    made = torch.autograd.grad(wanted, inputs, grads) if wanted and inputs else ()
    return [*(None if x is None else x.detach() for x in outputs), *made]


def runs(patches, function, *inputs: torch.Tensor) -> tuple[list, list, list]:
    """(ours, the host's, the host's in float64) of what ``function`` makes of fresh leaves."""
    patch, unpatch = patches
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = results(function(*wide), wide)
    theirs = results(function(*(leaves := [x.detach().requires_grad_() for x in inputs])), leaves)
    patch()
    ours = results(function(*(leaves := [x.detach().requires_grad_() for x in inputs])), leaves)
    unpatch()
    return ours, theirs, exact


def agree(ours: list, theirs: list, exact: list) -> None:
    """Same dtypes, and as near to what is exact as the host's own, but for one rounding."""
    assert len(ours) == len(theirs) == len(exact)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert (x is None) == (y is None)
        if y is None:
            continue
        assert x.dtype == y.dtype
        if y.dtype == torch.bool:
            assert torch.equal(x, y)
            continue
        assert torch.equal(x.isfinite(), y.isfinite())
        # the host's float64 has sums in float32
        slack = {torch.float64: 1e-7, torch.float32: 2e-6}.get(y.dtype, torch.finfo(y.dtype).eps)
        own = (y.double() - z).abs().max()
        assert (x.double() - z).abs().max() <= own + slack * z.abs().max()


PATCHES = (integrations.trl.patch_trl, integrations.trl.unpatch_trl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3), (2, 3, 4)], ids=str)
def test_selective_log_softmax(utils, dtype, shape):
    logits = normal(*(shape[:-1] if shape == (2, 3, 4) else shape), V, dtype=dtype)
    agree(*runs(PATCHES, lambda x: utils.selective_log_softmax(x, ids(*shape)), logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_from_logits(utils, dtype):
    logits = normal(2, 3, V, dtype=dtype)
    agree(*runs(PATCHES, lambda x: utils.entropy_from_logits(x), logits))


@pytest.mark.parametrize("entropy_requires_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_in_one_pass_where_trl_has_it(utils, dtype, entropy_requires_grad):
    if not hasattr(utils, "selective_log_softmax_and_entropy"):
        # a name that this TRL lacks is not put into it either
        integrations.trl.patch_trl()
        assert not hasattr(utils, "selective_log_softmax_and_entropy")
        return
    logits, index = normal(2, 3, V, dtype=dtype), ids(2, 3)
    named = {"temperature": 0.7, "row_mask": torch.tensor([[1, 0, 1], [1, 1, 0]])}

    def together(x):
        return utils.selective_log_softmax_and_entropy(x, index, entropy_requires_grad, **named)

    agree(*runs(PATCHES, together, logits))
    agree(*runs(PATCHES, lambda x: utils.selective_log_softmax(x, index, **named), logits))


def test_signatures_are_those_of_trl(utils):
    names = [name for name in NAMES[:3] if hasattr(utils, name)]
    own = [inspect.signature(getattr(utils, name)) for name in names]
    integrations.trl.patch_trl()
    assert [inspect.signature(getattr(utils, name)) for name in names] == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_function(utils, dtype, softcap, with_bias):
    inputs = [x.detach() for x in head(dtype, 300)[0][: 2 + with_bias]]

    def function(hidden, weight, bias=None):
        scaling = (0.9, 100, softcap, 0.5)
        return utils._ChunkedLogProbFunction.apply(hidden, weight, bias, ids(300), *scaling)

    ours, theirs, exact = runs(PATCHES, function, *inputs)
    if dtype == torch.bfloat16 and len(theirs) == 5 + len(inputs):
        # which of two equal logits is largest is not in float64
        exact[4] = theirs[4]
    agree(ours, theirs, exact)
    integrations.trl.patch_trl()
    with torch.no_grad():
        again = results(function(*inputs), [])
    for x, y in zip(again, ours, strict=False):
        assert torch.equal(x, y)


def test_the_chunked_function_under_autocast(utils):
    inputs = [x.detach() for x in head(torch.float32, 20)[0][:2]]

    def function(hidden, weight):
        # in TRL 1.13 autocast does not reach the product
        with torch.autocast("cpu", torch.bfloat16, enabled=hidden.dtype == torch.float32):
            return utils._ChunkedLogProbFunction.apply(hidden, weight, None, ids(20), 0.9, 100)[:2]

    agree(*runs(PATCHES, function, *inputs))


def test_every_trainer_is_patched_and_put_back(utils, load):
    early = load("trl.experimental.orpo.orpo_trainer")
    before = holders()
    integrations.trl.patch_trl()
    integrations.trl.patch_trl()
    after = holders()
    assert all(after[place] is not before[place] for place in before)
    # one that is loaded while TRL is patched
    assert "trl.experimental.cpo.cpo_trainer" not in sys.modules
    late = load("trl.experimental.cpo.cpo_trainer")
    assert late.selective_log_softmax is utils.selective_log_softmax
    integrations.trl.unpatch_trl()
    integrations.trl.unpatch_trl()
    assert {place: x for place, x in holders().items() if place in before} == before
    own = before["trl.trainer.utils", "selective_log_softmax"]
    assert late.selective_log_softmax is utils.selective_log_softmax is own
    assert early.__name__ in {module for module, _ in before}


def test_a_model_with_trls_own_head_gives_the_same(utils, one_thread, monkeypatch):
    """TRL's fused or chunked forward, whichever it has, and it is our op that ran."""
    rows, mask = tiny.prompts([5, 7])
    labels = torch.where(mask == 1, rows, -100)
    found, calls = [], []
    op = nk.linear_token_logprobs
    monkeypatch.setattr(nk, "linear_token_logprobs", lambda *a, **k: calls.append(1) or op(*a, **k))
    for patch in (lambda: None, integrations.trl.patch_trl):
        patch()
        model = tiny.llama(dtype=torch.float32)
        given = {"input_ids": rows, "attention_mask": mask}
        if hasattr(utils, "add_fused_lm_head"):
            utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
            output = vars(model(**given, labels=labels, fused_lm_head=True))
        else:
            utils.patch_chunked_lm_head(model, chunk_size=20, temperature=0.8)
            output = model(**given, labels=rows, completion_mask=mask)
        outputs = (output["log_probs"], output["entropy"])
        found.append(results(outputs, list(model.parameters())))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6 * float(y.abs().max()))
    assert calls


# what TRL and accelerate warn of is theirs
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_trl_learns_the_same(utils, load, one_thread, monkeypatch, tmp_path):
    import datasets

    trl = load("trl")
    rows = [
        {"prompt": f"w{i} w3", "chosen": f" w{i + 1} w5 w6", "rejected": f" w7 w{i}"}
        for i in range(4)
    ]
    settings = trl.DPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    ran = []
    for name in ("token_logprobs", "linear_token_logprobs"):
        op = getattr(nk, name)
        monkeypatch.setattr(nk, name, lambda *a, op=op, **k: ran.append(op) or op(*a, **k))
    found = []
    for patch in (lambda: None, integrations.trl.patch_trl):
        patch()
        assert not ran
        models = {"model": tiny.llama(dtype=torch.float32)}
        models["ref_model"] = tiny.llama(1, dtype=torch.float32)
        trainer = trl.DPOTrainer(
            **models,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
        )
        trainer.train()
        steps = [x for x in trainer.state.log_history if "loss" in x]
        found.append([[x[key] for key in ("loss", "entropy", "logps/chosen")] for x in steps])
    assert ran
    assert len(found[0]) == 3
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-5, atol=1e-5)


def test_the_example_agrees(load):
    load("trl")
    said = example("trl_ops")
    assert "largest difference from TRL's own" in said
    assert float(said.splitlines()[2].split(":")[1]) < 1e-5
    assert float(said.splitlines()[3].split(":")[1]) < 1e-6
