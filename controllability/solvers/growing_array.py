"""Arrays that grow row by row without being copied each time: amortised O(1) for every number added."""

from controllability.arrays.lazy import np

MORE = 1.5  # room for so many times the rows that are there


class Memory:
    """Room behind arrays that have names; an array that is not the latest of its name is copied, never written over.

    >>> memory = Memory()
    >>> one = memory.grown("x", np.array([[1.0]]), np.array([[2.0, 3.0]]), width=2)
    >>> two = memory.grown("x", one, np.array([[4.0]]))
    >>> two.tolist(), two.base is one.base, memory.grown("x", one, np.array([[5.0]])).tolist(), two[2].tolist()
    ([[1.0, 0.0], [2.0, 3.0], [4.0, 0.0]], True, [[1.0, 0.0], [2.0, 3.0], [5.0, 0.0]], [4.0, 0.0])
    """

    def __init__(self) -> None:
        self._rooms: dict[str, tuple[np.ndarray, int]] = {}  # zeros where nothing was written; how many rows were

    def grown(self, name: str, rows: np.ndarray, more: np.ndarray, width: int | None = None) -> np.ndarray:
        """``rows`` (T, n) with ``more`` (N, ≤ width) below them, zeros on the right up to ``width``: (T + N, width).

        The result is not for writing: the next one shares its memory.
        """
        wide = rows.shape[1] if width is None else width
        count, total = len(rows), len(rows) + len(more)
        room, filled = self._rooms.get(name, (rows, -1))
        if rows.base is not room or filled != count or total > len(room) or wide > room.shape[1]:
            ample = wide if wide == rows.shape[1] else int(MORE * wide) + 8
            room = np.zeros((int(MORE * total) + 8, ample), dtype=np.result_type(rows, more))
            room[:count, : rows.shape[1]] = rows
        room[count:total, : more.shape[1]] = more
        self._rooms[name] = room, total
        return room[:total, :wide]
