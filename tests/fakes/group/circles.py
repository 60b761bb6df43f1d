"""Helper: a hub and spokes that have streams to each other, each in a thread, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fakes.group.streams import PairStream, stream_pair

from shoal.comm.group.sums.manners import Manner, Manners, SumTopology
from shoal.comm.group.sums.star import Hub, Spoke
from shoal.comm.group.sums.star_errors import Departed
from shoal.comm.group.sums.wire_types import WireType

CIRCLE_EPOCH = 7
CIRCLE_PATIENCE_S = 20.0


class Circle:
    """`streams[one, other]` is the end of `one` of its stream to `other`."""

    def __init__(
        self,
        ranks: int,
        topology: SumTopology = "exchange",
        wire: WireType = "f32",
        patience_s: float = CIRCLE_PATIENCE_S,
        most: Callable[[], int] | None = None,
        buffer_bytes: int = 0,
    ) -> None:
        self.streams: dict[tuple[int, int], PairStream] = {}
        for one in range(ranks):
            for other in range(one + 1, ranks):
                pair = stream_pair(most, buffer_bytes)
                self.streams[one, other], self.streams[other, one] = pair
        self.hub = Hub(
            [self.streams[0, rank] for rank in range(1, ranks)], CIRCLE_EPOCH, patience_s=patience_s
        )
        self.spokes = [
            Spoke(
                self.streams[rank, 0],
                CIRCLE_EPOCH,
                patience_s=patience_s,
                rank=rank,
                ranks=ranks,
                fellows={it: self.streams[rank, it] for it in range(1, ranks) if it != rank},
                most_bytes=1 << 24,
            )
            for rank in range(1, ranks)
        ]
        self.members: list[Hub | Spoke] = [self.hub, *self.spokes]
        self.hub.decide(Manners(Manner(topology, wire), Manner(topology, wire)))

    def each(self, acts: Sequence[Callable[[], Any]], timeout_s: float = CIRCLE_PATIENCE_S) -> list[Any]:
        """What each rank's act returned, or raised."""

        def caught(act: Callable[[], Any]) -> Any:
            try:
                return act()
            except Departed as error:
                return error
            except BaseException:
                self.close()  # or others would wait for it
                raise

        with ThreadPoolExecutor(len(acts)) as threads:
            futures = [threads.submit(caught, act) for act in acts]
            try:
                return [future.result(timeout_s) for future in futures]
            except TimeoutError:
                self.close()
                raise

    def close(self, *ranks: int) -> None:
        """End all streams of these ranks; of all, if none is named."""
        for (one, _), stream in self.streams.items():
            if not ranks or one in ranks:
                stream.end()
