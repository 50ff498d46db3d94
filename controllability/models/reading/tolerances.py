"""The tolerances of live models, by dtype, in one place."""

from __future__ import annotations

import torch

# largest relative difference that rounding explains; norms inside a float64 model run in float32
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
# the same for a linear layer that also rounds what it reads to 8 bits, which its expression does not
EIGHT_BITS = 0.05
# relative error at which a patched row is nowhere near its target: far above what rounding explains
UNREACHED = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}
# largest relative error of a model's output that counts as verified
VERIFIED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
# relative error that a run on a cache may have of one without
CACHED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
