"""What a run under a sanitizer rests on; the runs themselves are ``.ci/sanitize``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nlhf_kernels import _native
from tests.sanitizers import plugin

ROOT = Path(__file__).parent.parent


def test_every_function_of_the_module_must_be_called():
    names = plugin.functions(_native)
    assert {"fold_in", "ema_update", "skinny_linear", "float64.token_kl_grad"} <= set(names)
    assert not {"use_tile_level", "dtype_codes", "float32"} & set(names)
    # a name that the module no longer has would be called for ever by nobody
    assert set(plugin.TYPES) <= set(names)
    asked = plugin.required(["ema_update", "fold_in"], ["avx2", "plain"])
    assert len(asked) == 2 * 4 + 2
    assert ("ema_update", "plain", "float64") in asked


def test_a_call_is_noted_with_its_level_and_types():
    state = plugin.State(_native)
    state.level = "plain"
    codes = _native.dtype_codes
    view = (4096, codes["bfloat16"], 0, 1, 8, 8, 0)
    state.note("float32.token_kl", (view, (4096, codes["float16"], 0, 1, 8, 8, 0), 0, 1.0))
    state.note("float32.token_logprobs", (view, 0))
    # no reference is no type
    state.note("float32.mixture_sample", (view, (0, 0, 0, 1, 0, 0, 0)))
    state.note("ema_update", ([(1, 2, 3, codes["float64"], codes["float32"])], 0.9, None))
    assert state.called == {
        ("float32.token_kl", "plain", "bfloat16"), ("float32.token_kl", "plain", "float16"),
        ("float32.token_logprobs", "plain", "bfloat16"),
        ("float32.mixture_sample", "plain", "bfloat16"),
        ("ema_update", "plain", "float64"), ("ema_update", "plain", "float32"),
    }  # fmt: skip
    watched = plugin.Watched(_native, state)
    assert watched.fold_in(1, 2) == _native.fold_in(1, 2)
    assert ("fold_in", "plain", "") in state.called


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "setup.py", "--version"], 'setup.py: NLHF_SANITIZE must be "address"'),
        (["bash", ".ci/sanitize", "memory"], ".ci/sanitize: knows address and thread, got memory"),
    ],
)
def test_an_unknown_sanitizer_is_refused(command, message):
    environment = {**os.environ, "NLHF_SANITIZE": "memory", "PYTHON": sys.executable}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert result.stderr.startswith(message)
