"""What is to be said of each change that the suite let through: why it changes nothing, or what a case must try.

An argument belongs to a change by its words, not its line: it stays with the code as lines move.
"""

from __future__ import annotations

from collections.abc import Mapping

NOT_YET = "not looked at yet"

ARGUMENTS: Mapping[tuple[str, str, str], str] = {
    (
        "round_to_bfloat16",
        "lowest_kept_bit = pattern >> np.uint32(16) & np.uint32(1)",
        "lowest_kept_bit = pattern >> np.uint32(17) & np.uint32(1)",
    ): "Equal but for ties, one value in 2^16, which go to the other of two bfloat16 that are equally far: no further "
    "than bfloat16's own roundoff.",
}
"""(function, what stood there, what stands there now) -> the argument."""


def argument_for(within: str, was: str, becomes: str) -> str:
    return ARGUMENTS.get((within, was, becomes), NOT_YET)
