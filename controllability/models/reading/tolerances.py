"""What rounding explains on live models: one table of relative errors, a question a line, a dtype a column."""

from collections.abc import Iterable

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the columns of the table


class Tolerance(dict[torch.dtype, float]):
    """The largest relative error that one question allows, by dtype; a dtype that it does not know is allowed none."""

    def __init__(self, *columns: float) -> None:
        super().__init__(zip(DTYPES, columns, strict=False))

    def __missing__(self, dtype: torch.dtype) -> float:
        return 0.0

    def of(self, dtypes: Iterable[torch.dtype]) -> float:
        """What the coarsest of ``dtypes`` allows; those that the question does not know do not count."""
        return max(self[dtype] for dtype in dtypes if dtype in self)


#                          float64  float32  float16  bfloat16
# Does a module compute what its expression says?  The norms inside a float64 model run in float32.
TOLERANCE = Tolerance(1e-5, 1e-4, 0.03, 0.1)
# Is a patched row near its target at all?  Far above what rounding explains: more is something that nobody declared.
UNREACHED = Tolerance(1e-4, 1e-3, 0.1, 0.25)
# Does a patched model's output count as the target's?  What is left of a whole model's rounding; half precisions differ more.
VERIFIED = Tolerance(1e-9, 1e-4, 0.02, 0.05)
# Does a run that goes on from a cache give what a run over everything gives?  Kernels of other shapes round otherwise.
CACHED = Tolerance(1e-6, 1e-4, 0.02, 0.1)
# Do two ways to do a run meet the same states?  Far below what seeing the context changes; half precisions are never tried.
SAME = Tolerance(1e-6, 1e-3)
# Do earlier positions stay as they are when others follow?  Where more is seen nothing worse happens than more work.
CAUSAL = Tolerance(1e-6, 1e-5, 0.01, 0.03)

# TOLERANCE for a linear layer that also rounds what it reads to 8 bits, in any dtype: its expression does not round.
EIGHT_BITS = 0.05
