"""How far a result may lie from an fp64 oracle fed the same inputs: one table for every test.

A row is (relative, absolute). Relative is one unit in the last place of the output (arithmetic in fp32 may round to
the neighbour of the nearest), absolute the fp32 arithmetic itself on values of order one.
"""

import torch

TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (2**-10, 1e-5),
    torch.bfloat16: (2**-7, 1e-5),
}
# Named exceptions: absolute tolerances that replace the table's.
ABSOLUTE = {
    # Normalising values 1000 standard deviations from zero: an fp32 ulp of the input is 6e-5 deviations, and the
    # fp32 mean is a few of its ulps off.
    "ramp": 1e-3,
    # 360 products of order one in fp32 on a tensor core, which cuts sums off: 1.04e-5 on an H200.
    "cut sums": 2e-5,
}

# One rounding, in units in the last place; the 0.01 is the fp32 arithmetic before it. Triton 3.7's interpreter
# truncates to bf16 where hardware rounds to nearest.
ULPS = {"cpu": 1.01, "cuda": 0.51}


def assert_close(actual: torch.Tensor, oracle: torch.Tensor, case: str | None = None) -> None:
    """`actual` against an fp64 `oracle`, by the tolerance of actual's dtype; `case` names an exception."""
    relative, absolute = TOLERANCES[actual.dtype]
    if case is not None:
        absolute = ABSOLUTE[case]
    torch.testing.assert_close(actual.double(), oracle.double(), rtol=relative, atol=absolute)
