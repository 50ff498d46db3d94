"""The orders of resort of one patch for many tokens: how a block's targets were reached, or how near."""

from enum import StrEnum


class Resort(StrEnum):
    """How one block reached its tokens' targets; the value is what reports print."""

    KEPT = "kept rms"
    MOVED = "moved rms"
    ENLARGED = "enlarged"
    SIZED = "kept rms, sizes free"  # the sizes of the outputs do not count behind the block
    NEAREST = "nearest, made good later"  # one scale that comes near; a later block makes the rest good
    SHORT = "least squares, made good later"  # targets that cannot all be reached; a later block makes the rest good
    DAMPED = "scale kept"  # a fit asks for what the scale that is there can give
    FITTED = "nearest"  # the scale of a fit, which need not be exact

    def __repr__(self) -> str:
        return repr(self.value)
