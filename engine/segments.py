"""The plan of Conditional Segment-wise Generation: which latent blocks each window holds."""

from dataclasses import dataclass

from .errors import ProfileError


@dataclass(frozen=True)
class Segment:
    """One window. Block indices are absolute; every context block is final when the window runs.

    `anchor` is the image's block, `context` are clean blocks, `noisy` the blocks this window makes.
    The window's order is anchor, context, noisy, which is ascending in time.
    """

    index: int
    anchor: int
    context: tuple[int, ...]
    noisy: tuple[int, ...]

    @property
    def window(self) -> tuple[int, ...]:
        return (self.anchor, *self.context, *self.noisy)

    @property
    def clean(self) -> int:
        """How many blocks at the front of the window are clean."""
        return 1 + len(self.context)


def plan_segments(blocks: int, noisy: int = 3, neighbours: int = 1) -> tuple[Segment, ...]:
    """Cut `blocks` latent blocks into windows: the first of 1+M blocks, every later one of 1+N+M.

    Block 0 is the anchor and is given. A short last segment keeps the window's length: the places it does not
    need hold more clean blocks before it, and where there are not that many the plan is refused.
    """
    if blocks < 1 + noisy:
        raise ProfileError(
            f"blocks: got {blocks}, want at least {1 + noisy} for M = {noisy}; the nearest is {1 + noisy}"
        )
    segments = [Segment(index=0, anchor=0, context=(), noisy=tuple(range(1, 1 + noisy)))]
    for start in range(1 + noisy, blocks, noisy):
        end = min(start + noisy, blocks)
        begin = end - noisy - neighbours  # the window's length is fixed, so a short segment reaches further back
        if begin < 1:
            most = neighbours + begin - 1
            raise ProfileError(
                f"neighbours: got N = {neighbours} with M = {noisy} and {blocks} blocks, want N <= {most}, "
                f"as the window of block {start} has only {start - 1} made blocks behind it; the nearest is {most}"
            )
        segments.append(Segment(len(segments), 0, tuple(range(begin, start)), tuple(range(start, end))))
    return tuple(segments)
