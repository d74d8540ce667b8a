"""Until when a search goes on."""

import math
import time


class Deadline:
    """Some seconds from now, by the processor and by the clock on the wall; whichever is over first.

    A limit of the package's own is one of the calling thread's processor time: on a busy machine a search then finds
    what it finds on a quiet one. A limit of the user's is one of wall-clock time.

    Args:
        seconds: of processor time of the calling thread.
        wall_seconds: of wall-clock time.
    """

    def __init__(self, seconds: float = math.inf, wall_seconds: float = math.inf):
        self._end = time.thread_time() + seconds
        self._wall_end = time.monotonic() + wall_seconds

    @property
    def is_over(self) -> bool:
        return time.thread_time() > self._end or time.monotonic() > self._wall_end

    def part(self, share: float) -> "Deadline":
        """A share of what is left."""
        left = max(self._end - time.thread_time(), 0.0)
        wall_left = max(self._wall_end - time.monotonic(), 0.0)
        return Deadline(share * left, share * wall_left)
