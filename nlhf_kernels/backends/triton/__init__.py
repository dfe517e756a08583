"""The Triton backend: CUDA tensors, and CPU tensors under ``TRITON_INTERPRET=1``."""

import os

# read when triton is imported or compiles, hence before either: 3.9 warns while it is unset, and
# 3.10 changes the default, which would change the last bits of results between versions
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
