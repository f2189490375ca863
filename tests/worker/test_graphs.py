"""Which recording runs a step. What records is made up: the sizes are the same on every device."""

from __future__ import annotations

from collections.abc import Callable

from headrace.worker.graphs import PATIENCE, Graphs, Recorder, graph_sizes, most_useful


class Replay:
    def __init__(self, run: Callable[[], int]) -> None:
        self._size = run()

    def replay(self) -> int:
        return self._size


class MadeUp(Recorder):
    """Records without a device."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def record(self, run: Callable[[], int], rehearse: Callable[[], None]) -> Replay:  # type: ignore[override]
        rehearse()
        self.sizes.append(run())
        return Replay(run)


def test_sizes_hold_every_batch() -> None:
    sizes = graph_sizes(250)
    assert sizes[:33] == [*range(1, 33), 40]
    assert sizes[-1] >= 250
    assert set(most_useful(sizes)) == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert most_useful(graph_sizes(100))[-1] == graph_sizes(100)[-1]


def test_a_size_that_is_wanted_often_is_recorded_under_load() -> None:
    recorder = MadeUp()
    graphs = Graphs(recorder, lambda size: size, lambda _: None, graph_sizes(256))
    for size in (64, 128):
        graphs.record(size)
        graphs.use(size)
    padded = [graphs.run(70) for _ in range(PATIENCE)]
    assert padded == [128] * PATIENCE
    assert recorder.sizes == [64, 128]
    assert [graphs.run(rows) for rows in (70, 66, 72)] == [72] * 3  # from now on its own
    assert recorder.sizes == [64, 128, 72]


def test_a_size_far_below_all_others_is_recorded_at_once() -> None:
    recorder = MadeUp()
    graphs = Graphs(recorder, lambda size: size, lambda _: None, graph_sizes(256))
    graphs.record(256)
    assert graphs.run(3) == 3  # 256 is not in use, and too far away
    graphs.use(256)
    assert graphs.run(100) == 104
    assert graphs.run(130) == 256
