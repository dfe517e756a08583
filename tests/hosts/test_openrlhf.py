"""Patched OpenRLHF gives what OpenRLHF gives, and leaves its logits."""

import inspect

import pytest

from nlhf_kernels import integrations
from tests.hosts.conftest import STUBS
from tests.hosts.test_trl import agree, runs
from tests.test_integrations import DTYPES, V, example, ids, normal


@pytest.fixture
def utils(load):
    yield load("openrlhf.models.utils")
    integrations.openrlhf.unpatch_openrlhf()


PATCHES = (integrations.openrlhf.patch_openrlhf, integrations.openrlhf.unpatch_openrlhf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(utils, dtype, temperature):
    logits, labels = normal(2, 3, V, dtype=dtype), ids(2, 3)
    # OpenRLHF's own divides in place, which a leaf does not allow
    agree(*runs(PATCHES, lambda x: utils.log_probs_from_logits(x * 1, labels, temperature), logits))


def test_its_signature_is_that_of_openrlhf(utils):
    ours = inspect.signature(integrations.openrlhf.log_probs_from_logits)
    assert ours == inspect.signature(utils.log_probs_from_logits)


def test_the_actor_is_patched_and_put_back(utils, load):
    actor = load("openrlhf.models.actor")
    own = utils.log_probs_from_logits
    integrations.openrlhf.patch_openrlhf()
    integrations.openrlhf.patch_openrlhf()
    ours = integrations.openrlhf.log_probs_from_logits
    assert actor.log_probs_from_logits is utils.log_probs_from_logits is ours
    integrations.openrlhf.unpatch_openrlhf()
    integrations.openrlhf.unpatch_openrlhf()
    assert actor.log_probs_from_logits is utils.log_probs_from_logits is own


def test_the_example_agrees(load):
    load("openrlhf.models.utils")
    # before them deepspeed speaks
    unchanged, apart, own = example("openrlhf_ops", str(STUBS)).splitlines()[-3:]
    assert unchanged == "logits unchanged: True"
    assert float(apart.split(":")[1]) < 1e-5
    assert own == "logits unchanged by OpenRLHF's own: False"
