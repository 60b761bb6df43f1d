"""The policy of the expert cache, without threads: which experts stay."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.offload.window.expert_cache import ExpertCache
from shoal.offload.window.window import Extent, Passage, Read
from shoal.partition.spec import BlockId

SIZE = 4096


def cache_of(slots: int, layers: int, experts: int, ahead: int = 8) -> ExpertCache:
    blocks = [BlockId("expert", layer, i) for layer in range(layers) for i in range(experts)]
    return ExpertCache(slots, SIZE, [Extent(block, SIZE * i, SIZE) for i, block in enumerate(blocks)], ahead)


class Simulation:
    """A cache whose reads end at once. Counts the reads."""

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self.reads = 0

    def read(self, most_bytes: int = SIZE) -> None:
        while (chunk := self.cache.next_read(most_bytes)) is not None:
            self.reads += chunk.start == 0
            chunk.passage.landed += chunk.nbytes
            self.cache.ended(chunk.passage)

    def use(self, blocks: Sequence[BlockId], together: int, likely: Sequence[BlockId] = ()) -> None:
        """Expects blocks, then leases them in order, some at a time."""
        self.cache.expect(blocks)
        self.cache.guess(likely)
        for start in range(0, len(blocks), together):
            held: list[Passage] = []
            for block in blocks[start : start + together]:
                self.cache.want(block)
                self.read()
                passage = self.cache.want(block)
                assert passage is not None
                assert passage.here
                assert passage.block == block
                passage.leases += 1
                held.append(passage)
            assert len({passage.position for passage in held}) == len(held)
            self.read()
            for passage in held:
                passage.leases -= 1
                self.cache.leave(passage)


@settings(deadline=None, max_examples=100)
@given(
    slots=st.integers(1, 9),
    experts=st.integers(1, 12),
    layers=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_what_is_wanted_always_comes(slots: int, experts: int, layers: int, seed: int) -> None:
    source = random.Random(seed)
    simulation = Simulation(cache_of(slots, layers, experts))
    for _ in range(12):
        for layer in range(layers):
            chosen = sorted(source.sample(range(experts), source.randint(1, experts)))
            blocks = [BlockId("expert", layer, i) for i in chosen]
            guessed = source.sample(range(experts), source.randint(0, experts))
            likely = [BlockId("expert", (layer + 1) % layers, i) for i in guessed]
            if source.random() < 0.1:
                simulation.cache.expect(blocks)  # a step that failed after routing
                simulation.cache.guess(likely)
                simulation.read()
                continue
            simulation.use(blocks, source.randint(1, slots), likely)


def skewed(source: random.Random, experts: int, count: int) -> list[int]:
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.add(min(int(source.paretovariate(0.7)) - 1, experts - 1))
    return sorted(chosen)


def test_often_used_experts_stay_even_when_a_prompt_passes_all() -> None:
    source = random.Random(0)
    simulation = Simulation(cache_of(20, 2, 32, ahead=4))

    def decode(steps: int) -> int:
        before = simulation.reads
        for _ in range(steps):
            for layer in range(2):
                blocks = [BlockId("expert", layer, i) for i in skewed(source, 32, 4)]
                simulation.use(blocks, 2)
        return simulation.reads - before

    decode(200)
    usual = decode(200)
    assert usual < 0.5 * 200 * 2 * 4
    for layer in range(2):
        simulation.use([BlockId("expert", layer, i) for i in range(32)], 2)
    before = simulation.reads
    for layer in range(2):
        simulation.use([BlockId("expert", layer, i) for i in range(4)], 2)
    assert simulation.reads - before <= 2, "the most used ones have stayed"


def test_passing_all_again_and_again_keeps_what_fits() -> None:
    """More experts than slots are used equally often. Then the least recently used is the worst choice to let go."""
    simulation = Simulation(cache_of(6, 1, 8))
    blocks = [BlockId("expert", 0, i) for i in range(8)]
    for _ in range(3):
        simulation.use(blocks, 1)
    before = simulation.reads
    for _ in range(10):
        simulation.use(blocks, 1)
    assert simulation.reads - before <= 10 * 4


@pytest.mark.parametrize(("layers", "experts", "slots"), [(4, 8, 24), (8, 64, 360), (3, 10, 12), (2, 40, 60)])
def test_steps_that_use_all_of_all_layers_read_what_does_not_fit(
    layers: int, experts: int, slots: int
) -> None:
    """What this step has used does not count more than what it is about to use."""
    simulation = Simulation(cache_of(slots, layers, experts))

    def step() -> int:
        before = simulation.reads
        for layer in range(layers):
            simulation.use(experts_of(layer, *range(experts)), 4)
        return simulation.reads - before

    for _ in range(3):
        step()
    steps = [step() for _ in range(8)]
    assert max(steps) <= 1.2 * (layers * experts - slots) + 2 * layers, steps


@pytest.mark.parametrize(("layers", "experts", "slots"), [(16, 64, 307), (16, 64, 717), (4, 32, 50)])
@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_prompts_after_answers_read_what_does_not_fit(
    layers: int, experts: int, slots: int, skew: float
) -> None:
    """An answer uses some experts more often than others. Those that it did not are about to be used."""
    source = random.Random(0)
    simulation = Simulation(cache_of(slots, layers, experts, ahead=experts // 2))
    prompts = []
    for _ in range(6):
        before = simulation.reads
        for layer in range(layers):
            simulation.use(experts_of(layer, *range(experts)), 4)
        prompts.append(simulation.reads - before)
        for _ in range(16):
            for layer in range(layers):
                chosen = skewed(source, experts, 4) if skew else sorted(source.sample(range(experts), 4))
                simulation.use(experts_of(layer, *chosen), 4)
    assert max(prompts[1:]) <= layers * experts - slots + experts // 2, prompts


def test_no_slot_is_lost_where_a_prompt_comes_before_what_was_known_is_read() -> None:
    experts = experts_of(0, *range(40))
    extents = [Extent(block, SIZE * i, SIZE) for i, block in enumerate(experts)]
    cache = ExpertCache(30, SIZE, extents, ahead=8, known=dict.fromkeys(experts, 0.5))
    simulation = Simulation(cache)
    simulation.use(experts, 4)
    simulation.read()
    assert len(cache._held) + len(cache._free) == 30


def test_layers_of_which_few_experts_are_on_disk_and_one_of_which_all_are() -> None:
    """As where a device has the others."""
    experts = [*experts_of(0, *range(128)), *(it for layer in range(1, 60) for it in experts_of(layer, 0))]
    extents = [Extent(block, SIZE * i, SIZE) for i, block in enumerate(experts)]
    simulation = Simulation(ExpertCache(120, SIZE, extents))
    for _ in range(20):
        simulation.use(experts_of(0, *range(128)), 4)
        for layer in range(1, 60):
            simulation.use(experts_of(layer, 0), 1)
    assert len(simulation.cache._held) + len(simulation.cache._free) == 120


def test_what_a_layer_does_not_want_any_more_goes() -> None:
    """Its steps want what lies elsewhere."""
    simulation = Simulation(cache_of(8, 2, 8))
    for _ in range(100):
        for layer in (0, 1):
            simulation.use(experts_of(layer, 0, 1, 2, 3), 2)
    for _ in range(500):
        simulation.use(experts_of(0, 0, 1, 2, 3, 4, 5, 6), 2)
        simulation.cache.expect(experts_of(1, 8, 9))
    assert set(experts_of(0, *range(7))) <= simulation.cache._held.keys()


def test_older_use_counts_less() -> None:
    simulation = Simulation(cache_of(1, 1, 2))
    old, new = BlockId("expert", 0, 0), BlockId("expert", 0, 1)
    for _ in range(100):
        simulation.use([old], 1)
    for _ in range(300):
        simulation.use([new], 1)
    assert simulation.reads == 2
    cache = simulation.cache
    assert cache._scores[new] > 2 * cache._scores[old]


def test_a_failed_expert_is_read_again() -> None:
    cache = cache_of(2, 1, 4)
    block = BlockId("expert", 0, 3)
    cache.expect([block])
    chunk = cache.next_read(SIZE // 2)
    assert chunk is not None
    failed = chunk.passage
    failed.error = OSError("broken")
    cache.leave(failed)
    assert cache.want(block) is None, "its slot is still written to"
    failed.landed += chunk.nbytes
    cache.ended(failed)
    simulation = Simulation(cache)
    simulation.use([block], 1)
    assert simulation.reads == 1


def test_experts_that_failed_before_anyone_wanted_them_do_not_keep_their_slots() -> None:
    """A disk is away for a while: every read ahead failed, and the step ended at the first of them."""
    cache = cache_of(4, 1, 12)
    cache.expect([BlockId("expert", 0, i) for i in range(4)])
    chunks = [cache.next_read(SIZE) for _ in range(4)]
    for chunk in chunks[:3]:  # the last read is still under way when the next step begins
        fail(cache, chunk)
    first = cache.want(BlockId("expert", 0, 0))
    assert first is not None
    assert first.error
    cache.leave(first)
    others = [BlockId("expert", 0, i) for i in range(8, 12)]
    cache.expect(others)
    fail(cache, chunks[3])
    simulation = Simulation(cache)
    simulation.use(others, 4)
    simulation.use([BlockId("expert", 0, i) for i in range(4)], 4)
    assert simulation.reads == 8, "what failed is read again, not told again"


def fail(cache: ExpertCache, chunk: Read | None) -> None:
    assert chunk is not None
    chunk.passage.error = OSError("broken")
    chunk.passage.landed += chunk.nbytes
    cache.ended(chunk.passage)


def experts_of(layer: int, *numbers: int) -> list[BlockId]:
    return [BlockId("expert", layer, number) for number in numbers]


def test_what_is_likely_is_read_once_nothing_else_is_to_be() -> None:
    simulation = Simulation(cache_of(6, 2, 8))
    simulation.cache.expect(experts_of(0, 0, 1))
    simulation.cache.guess(experts_of(1, 5, 3))
    order = []
    while (chunk := simulation.cache.next_read(SIZE)) is not None:
        order.append(chunk.passage.block)
        chunk.passage.landed += chunk.nbytes
        simulation.cache.ended(chunk.passage)
    assert order == [*experts_of(0, 0, 1), *experts_of(1, 5, 3)]
    simulation.use(experts_of(1, 3, 5), 2)
    assert simulation.reads == 0, "they were there"


def test_what_is_needed_takes_the_place_of_what_is_likely_and_never_the_reverse() -> None:
    simulation = Simulation(cache_of(3, 2, 8))
    simulation.cache.expect(experts_of(0, 0, 1))
    simulation.cache.guess(experts_of(1, 0, 1, 2, 3))
    simulation.read()
    assert simulation.reads == 3
    assert all(simulation.cache.want(block) for block in experts_of(0, 0, 1))
    simulation.use(experts_of(1, 5, 6, 7), 3)
    assert all(simulation.cache.want(block) for block in experts_of(1, 5, 6, 7))


def test_a_wrong_guess_is_not_read_to_its_end() -> None:
    simulation = Simulation(cache_of(4, 2, 8))
    simulation.cache.expect([])
    simulation.cache.guess(experts_of(1, 0))
    first = simulation.cache.next_read(SIZE // 4)
    simulation.cache.expect(experts_of(1, 2))
    second = simulation.cache.next_read(SIZE // 4)
    assert first is not None
    assert second is not None
    assert second.passage.block == BlockId("expert", 1, 2)
    for chunk in (first, second):
        chunk.passage.landed += chunk.nbytes
        simulation.cache.ended(chunk.passage)
    simulation.read()
    simulation.use(experts_of(1, 0, 2), 2)


def test_a_guess_that_cannot_be_read_is_not_tried_for_ever() -> None:
    """Nobody waits for it who could get the error."""
    cache = cache_of(4, 2, 8)
    cache.expect([])
    cache.guess(experts_of(1, 0, 1))
    for _ in range(2):
        fail(cache, cache.next_read(SIZE))
    assert cache.next_read(SIZE) is None
    simulation = Simulation(cache)
    simulation.use(experts_of(1, 0, 1), 2)


def test_a_guess_that_was_given_up_and_is_needed_after_all_is_read_without_being_waited_for() -> None:
    cache = cache_of(4, 2, 8)
    cache.expect([])
    cache.guess(experts_of(1, 0))
    late = cache.next_read(SIZE // 2)
    assert late is not None
    cache.expect(experts_of(0, 2))
    cache.expect(experts_of(1, 0, 3))
    assert cache.want(BlockId("expert", 1, 0)) is None
    late.passage.landed += late.nbytes
    cache.ended(late.passage)
    blocks = [chunk.passage.block for chunk in iter(lambda: cache.next_read(SIZE), None)]
    assert blocks == experts_of(1, 0, 3)


def test_guesses_that_do_not_come_true_are_given_up() -> None:
    simulation = Simulation(cache_of(6, 2, 8))
    for _ in range(40):
        for layer in (0, 1):
            simulation.cache.expect(experts_of(layer, 0))
            simulation.cache.guess(experts_of(1 - layer, 7))
            simulation.read()
    simulation.cache.expect(experts_of(0, 0))
    simulation.cache.guess(experts_of(1, 6))
    before = simulation.reads
    simulation.read()
    assert simulation.reads == before


@settings(deadline=None, max_examples=150)
@given(slots=st.integers(2, 9), experts=st.integers(2, 12), seed=st.integers(0, 1 << 32))
def test_what_is_wanted_comes_however_reads_end(slots: int, experts: int, seed: int) -> None:
    """Several reads at a time end in any order, and some fail; guesses of all kinds come in between."""
    source, layers = random.Random(seed), 3
    cache = cache_of(slots, layers, experts, ahead=source.randint(1, 8))
    under_way: list[Read] = []

    def begin() -> bool:
        idle = cache.idle
        chunk = cache.next_read(SIZE // 2) if len(under_way) < 4 else None
        if chunk is not None:
            assert not idle, "nobody would have woken a reader"
            positions = {other.passage.position for other in under_way if other.passage is not chunk.passage}
            assert chunk.passage.position not in positions
            assert not chunk.passage.leases
            under_way.append(chunk)
        return chunk is not None

    def end() -> None:
        passage, _, nbytes = under_way.pop(source.randrange(len(under_way)))
        if source.random() < 0.03:
            passage.error = OSError("broken")
        passage.landed += nbytes
        cache.ended(passage)

    def come(block: BlockId) -> Passage:
        while True:
            passage = cache.want(block)
            if passage is not None and (passage.here or passage.error):
                return passage
            while begin():
                pass
            assert under_way, f"{block} will never come"
            end()

    def pass_layer(layer: int) -> bool:
        chosen = experts_of(layer, *sorted(source.sample(range(experts), source.randint(1, experts))))
        guessed = source.sample(range(experts), source.randint(0, experts))
        cache.expect(chosen)
        cache.guess(experts_of((layer + 1) % layers, *guessed))
        together = source.randint(1, max(1, slots // 2))
        for start in range(0, len(chosen), together):
            held: list[Passage] = []
            for block in chosen[start : start + together]:
                passage = come(block)
                if passage.error:
                    cache.leave(passage)
                    break
                passage.leases += 1
                held.append(passage)
            for _ in range(source.randrange(6)):
                if not begin() and under_way:
                    end()
            for passage in held:
                passage.leases -= 1
                cache.leave(passage)
            if len(held) < len(chosen[start : start + together]):
                return False
        return True

    for _ in range(10):
        all(pass_layer(layer) for layer in range(layers))
    while under_way:
        end()
    assert len(cache._free) + len(cache._held) == slots


def test_what_was_used_often_before_is_there_from_the_beginning_and_stays() -> None:
    experts = [BlockId("expert", layer, i) for layer in range(2) for i in range(6)]
    often = {
        experts[1]: 0.9,
        experts[8]: 0.8,
        experts[3]: 0.5,
        experts[10]: 0.1,
        BlockId("expert", 5, 0): 1.0,
    }
    extents = [Extent(block, SIZE * i, SIZE) for i, block in enumerate(experts)]
    simulation = Simulation(ExpertCache(3, SIZE, extents, known=often))
    simulation.read()
    assert set(simulation.cache._held) == {experts[1], experts[8], experts[3]}
    assert simulation.reads == 3
    for other in (0, 2, 4, 5):  # each comes once, and takes the place of what was used least
        simulation.use([experts[other]], 1)
    assert set(simulation.cache._held) == {experts[1], experts[8], experts[5]}
    simulation.use([experts[1], experts[8]], 1)
    assert simulation.reads == 7


def test_what_was_used_before_gives_way_to_what_is_used_now() -> None:
    experts = [BlockId("expert", 0, i) for i in range(6)]
    extents = [Extent(block, SIZE * i, SIZE) for i, block in enumerate(experts)]
    simulation = Simulation(ExpertCache(2, SIZE, extents, known={experts[0]: 1.0, experts[1]: 0.9}))
    for _ in range(200):
        simulation.use([experts[2], experts[3]], 1)
    assert set(simulation.cache._held) == {experts[2], experts[3]}


def test_before_anything_was_read_somebody_may_want_what_nobody_used() -> None:
    experts = [BlockId("expert", 0, i) for i in range(4)]
    extents = [Extent(block, SIZE * i, SIZE) for i, block in enumerate(experts)]
    cache = ExpertCache(2, SIZE, extents, known={experts[0]: 0.5, experts[1]: 0.4})
    half = cache.next_read(SIZE // 2)
    assert half is not None
    assert half.passage.block == experts[0]
    cache.expect([experts[3], experts[2]])
    half.passage.landed += half.nbytes
    cache.ended(half.passage)
    simulation = Simulation(cache)
    simulation.use([experts[3], experts[2]], 1)
    assert set(cache._held) <= {experts[2], experts[3]}
