"""Work dealt to any number of processes."""


def share(count: int, rank: int, processes: int) -> range:
    """The contiguous part of `count` items that belongs to `rank`; parts differ by at most one item."""
    return range(count * rank // processes, count * (rank + 1) // processes)
