"""A sanitizer that is not awake would find nothing: misuse of the bindings ends with its report."""

import os
import subprocess
import sys

import pytest

from nlhf_kernels import _native

# without torch, whose import takes seconds; 4 rows of 1,000 float32 each
USE = f"""
from array import array
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

loader = ExtensionFileLoader("_native", {_native.__file__!r})
native = module_from_spec(spec_from_loader("_native", loader))
loader.exec_module(native)
code = native.dtype_codes["float32"]

def at(values):
    return values.buffer_info()[0]

x, grad = array("f", 4000 * [0]), array("f", 4000 * [0])
tokens, row = array("q", 4 * [1]), array("f", 4 * [1])
outputs = [array("f", 1000 * [0]) for _ in range(3)]

def forward(vocab=1000, stride=1000, steps=1):
    view = (at(x), code, 4, steps, vocab, stride, 0)
    native.float32.token_logprobs(view, at(tokens), 0, 1.0, 0.0, *map(at, outputs))

def backward(vocab=1000, stride=1000):
    views = [(at(y), code, 4, 1, vocab, s, 0) for y, s in ((grad, stride), (x, 1000))]
    rows = [at(row)] * 4
    native.float32.token_logprobs_grad(*views, at(tokens), 0, *rows, 1.0, 0.0)

forward()
backward()
print("sound", flush=True)
"""
PLANTS = {
    "address": {
        "forward(vocab=1001)": "heap-buffer-overflow",
        "backward(stride=1001)": "heap-buffer-overflow",
        "forward(stride=2**62)": "runtime error: signed integer overflow",
        "forward(steps=0)": "runtime error: division by zero",
    },
    "thread": {"backward(stride=0)": "data race"},
}
KIND = os.environ["NLHF_SANITIZE"]


@pytest.mark.parametrize("plant", PLANTS[KIND])
def test_a_planted_fault_is_reported(plant):
    command = [sys.executable, "-P", "-c", f"{USE}{plant}\nprint('unnoticed')"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "sound\n", result.stdout + result.stderr
    assert result.returncode != 0
    assert PLANTS[KIND][plant] in result.stderr
    # the frames of the report have names and lines
    assert "csrc/cpu/" in result.stderr
