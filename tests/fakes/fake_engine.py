"""Helper: a scheduler with a memory of pages instead of tensors, and a model that reads all of it.

A slot of a page holds a fingerprint of the text up to its position, as KV does in effect. The next token is made from
all fingerprints before it, so one page mixed up, not copied or written too early gives another text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from fakes.listening import Heard

from shoal.engine.batch import Batch, Chunk, Recall
from shoal.engine.errors import EngineError
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence, SequenceEvent
from shoal.models.sampling import Sampled, Sampler, SamplingParams
from shoal.offload.kv.disk_index import KvIndex
from shoal.offload.kv.pages import PageTable
from shoal.offload.kv.prefix_cache import Copy, PrefixCache, Save
from shoal.partition.spec import RopeSpec, grows_to, length_class

PAGE = 4
VOCAB = 50


def sequence(prompt: int | list[int], new: int, **fields: object) -> Sequence:
    """A request of `prompt` equal tokens, or of these, for at most `new` more."""
    tokens = [1] * prompt if isinstance(prompt, int) else list(prompt)
    return Sequence(tokens, len(tokens) + new, Sampler(SamplingParams(), []), **fields)  # type: ignore[arg-type]


def scheduler(
    pages: int = 64,
    sequences: int = 4,
    queue: int = 8,
    chunk: int = 16,
    guesses: int = 0,
    index: KvIndex | None = None,
    ropes: Collection[RopeSpec] = (),
) -> Scheduler:
    cache = PrefixCache(PageTable(pages), PAGE, index)
    return Scheduler(
        cache, sequences=sequences, queue=queue, chunk_tokens=chunk, guesses=guesses, reads=3, ropes=[*ropes]
    )


def fingerprint(before: int, token: int) -> int:
    return hash((before, token))


def following(fingerprints: list[int]) -> int:
    """Counts to seven over and over, interrupted now and then: half worth guessing."""
    whole = hash(tuple(fingerprints))
    return len(fingerprints) % 7 if whole % 4 else whole // 4 % VOCAB


def stored_of(tokens: list[int], length: int) -> list[int]:
    """The fingerprints of a text whose keys have the ropes for `length`."""
    stored = [length]
    for token in tokens:
        stored.append(fingerprint(stored[-1], token))
    return stored


def continuation(prompt: list[int], new: int, ropes: Collection[RopeSpec] = ()) -> list[int]:
    """What the model says to this prompt when it runs alone."""
    tokens, length = list(prompt), length_class(ropes, len(prompt))
    stored = stored_of(tokens, length)
    for _ in range(new):
        tokens.append(following(stored))
        stored.append(fingerprint(stored[-1], tokens[-1]))
        if len(tokens) > grows_to(ropes, length):
            length = length_class(ropes, len(tokens))
            stored = stored_of(tokens, length)
    return tokens[len(prompt) :]


class FakeDisk:
    """Pages of fingerprints in slots. Pages are written one step later; the next read or write fails if `fails()`."""

    def __init__(self, index: KvIndex, fails: Callable[[], bool] = lambda: False) -> None:
        self.index = index
        self.read_pages = 0
        self._slots: dict[int, list[int]] = {}
        self._behind: list[tuple[Save, list[int]]] = []
        self._fails = fails

    def save(self, what: Save, page: list[int]) -> None:
        self._behind.append((what, list(page)))

    def write(self) -> None:
        for what, page in self._behind:
            if self._fails() or self.index.touch(what.parent, what.tokens):
                continue
            entry = self.index.claim(what.parent, what.tokens, 0)
            if entry is not None:
                self._slots[entry.slot] = page
                self.index.add(entry)
        self._behind = []

    def read(self, recall: Recall, memory: list[list[int]]) -> int:
        for count, (found, page) in enumerate(zip(recall.found, recall.pages, strict=True)):
            if self._fails() or not self.index.holds(found.entry):
                self.index.forget(found.entry)
                return count
            memory[page] = list(self._slots[found.entry.slot])
            self.read_pages += 1
        return len(recall.pages)


class FakeEngine:
    """Steps a scheduler. Its clock is its own: a step takes as many seconds as `cost` of its rows, and `read_s` for
    each page that is read from disk."""

    def __init__(
        self,
        subject: Scheduler,
        cost: Callable[[int], float] = lambda rows: 1.0,
        disk: FakeDisk | None = None,
        read_s: float = 0.01,
    ) -> None:
        self.scheduler = subject
        self.disk = disk
        self._read_s = read_s
        self._heard: defaultdict[Sequence, Heard] = defaultdict(Heard)
        self.now_s = 0.0
        self.rows_total = 0
        self._cost = cost
        self._memory = [[0] * PAGE for _ in range(subject.cache.pages)]

    def submit(self, asked: Sequence, stop_after: int | None = None) -> Heard:
        heard = self._heard[asked] = Heard(stop_after)
        try:
            self.hear(self.scheduler.submit(asked))
        except EngineError:
            assert not heard.begun
            raise
        return heard

    def cancel(self, asked: Sequence) -> None:
        self.hear(self.scheduler.end(asked, "cancelled"))

    def hear(self, events: Iterable[SequenceEvent]) -> None:
        for event in events:
            if self._heard[event.sequence].hear(event):
                self.hear(self.scheduler.end(event.sequence, "stop"))

    def step(self, meanwhile: Callable[[Batch], None] = lambda batch: None) -> Batch:
        """One step; `meanwhile` is called while it computes."""
        self.hear(self.scheduler.expire(self.now_s))
        batch = self.scheduler.next(self.now_s)
        meanwhile(batch)
        if not batch.empty:
            read = self._move(batch)
            results = self._compute(batch)
            read_s = sum(read) * self._read_s
            self.now_s += (self._cost(batch.rows) if batch.chunks else 0.0) + read_s
            self.rows_total += batch.rows
            self.hear(list(self.scheduler.commit(batch, results, read, now_s=self.now_s, read_s=read_s)))
        return batch

    def run(self, limit: int = 10_000) -> None:
        """Until there is nothing left to do."""
        for _ in range(limit):
            if self.step().empty:
                assert not self.scheduler.running
                assert not self.scheduler.waiting
                return
        raise AssertionError("it never ends")

    def _move(self, batch: Batch) -> list[int]:
        """How many pages of each recall could be read."""
        for move in batch.moves:
            if isinstance(move, Copy):
                self._memory[move.target] = list(self._memory[move.source])
            else:
                assert self.disk is not None
                self.disk.save(move, self._memory[move.page])
        if self.disk is None:
            return []
        read = [self.disk.read(recall, self._memory) for recall in batch.recalls]
        self.disk.write()
        return read

    def _compute(self, batch: Batch) -> list[list[Sampled]]:
        results: list[list[Sampled]] = []
        for chunk in batch.chunks:
            stored = [chunk.length] + [self._slot(chunk.pages, position) for position in range(chunk.start)]
            for position, token in enumerate(chunk.tokens, chunk.start):
                stored.append(fingerprint(stored[-1], token))
                self._memory[chunk.pages[position // PAGE]][position % PAGE] = stored[-1]
            results.append(_sampled(chunk, stored) if chunk.samples else [])
        return results

    def _slot(self, pages: tuple[int, ...], position: int) -> int:
        return self._memory[pages[position // PAGE]][position % PAGE]


def _sampled(chunk: Chunk, stored: list[int]) -> list[Sampled]:
    """The tokens that follow the chunk and each right guess of its draft."""
    sampled: list[Sampled] = []
    for rows, guess in enumerate((*chunk.draft, None), len(stored) - len(chunk.draft)):
        sampled.append(Sampled(following(stored[:rows])))
        if sampled[-1].token_id != guess:
            break
    return sampled


def check_pages(subject: Scheduler) -> None:
    """Every page is free, cached or used, and nobody has a page that is somebody else's."""
    cache = subject.cache
    nodes, users = {}, {}
    stack = list(cache._roots.values())
    while stack:
        node = stack.pop()
        for tokens, child in node.children.items():
            assert child.parent is node
            assert child.tokens == tokens
            assert len(tokens) == PAGE or not (child.children or child.users)
            assert child.page not in nodes
            nodes[child.page] = child
            users[child] = 0
            stack.append(child)
    own: set[int] = set()
    for other in subject.running:
        holding = other.holding
        assert len(holding.path) * PAGE <= other.computed <= len(holding.pages) * PAGE
        for index, node in enumerate(holding.path):
            assert holding.pages[index] == node.page
            assert list(node.tokens) == other.tokens[index * PAGE : (index + 1) * PAGE]
            users[node] += 1
        mine = holding.pages[len(holding.path) :]
        assert not own.intersection(mine)
        own.update(mine)
    assert not own & nodes.keys()
    assert {node: node.users for node in users} == users
    assert cache.cached_pages == sum(1 for count in users.values() if not count)
    assert cache.used_pages == len(own) + sum(1 for count in users.values() if count)
    assert cache._table.free_pages + cache.cached_pages + cache.used_pages == cache.pages
    assert all(not other.holding.pages for other in subject.waiting)
