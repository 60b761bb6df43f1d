"""Streaming: the same logits, bit for bit, as with everything in memory; and what happens when reading fails."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Running
from streaming import Streaming, packed, run, streaming_plan, texts
from torch import Tensor

from shoal.comm.messages import FinishReason
from shoal.daemon.engine import Engine
from shoal.daemon.scheduler import Scheduler
from shoal.daemon.sequence import Sequence
from shoal.daemon.translate import translated
from shoal.kernels import OperandError
from shoal.models.sampling import Sampled, Sampler, SamplingParams
from shoal.models.step import Step
from shoal.offload import embedding, readers
from shoal.offload.direct import DirectFile
from shoal.offload.errors import OffloadError, PackCorrupt, StoreError
from shoal.offload.pack import Pack
from shoal.offload.prefix import PrefixCache
from shoal.offload.window_store import WindowStore
from shoal.partition.spec import BlockId

MODELS = {
    "tied": ("llama", {}),
    "untied": ("qwen2", {"vocab_size": 301}),
    "normed": ("gemma3", {}),
    "mixture": ("qwen3_moe", {}),
    "shared": ("qwen2_moe", {"num_hidden_layers": 2}),
}
EMBED = BlockId("embed")


class Case:
    def __init__(self, directory: Path, name: str) -> None:
        family, overrides = MODELS[name]
        self.path, self.pack = packed(directory, family, **overrides)
        self.resident = Running(self.path)
        (self.ids,) = texts(self.resident.spec.vocab, [60])
        self.expected = run(self.resident, self.ids)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: Case(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture
def tied(cases: dict[str, Case]) -> Case:
    return cases["tied"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(MODELS)),
    pins=st.integers(0, 2**12 - 1),
    spare=st.sampled_from([0, 4096, 8192, 20480, 1 << 20]),
    slots=st.integers(1, 9),
    part_tokens=st.sampled_from([1 << 30, 1, 7, 16, 64]),
    read_bytes=st.sampled_from([4096, 16384, 4 << 20]),
)
def test_streamed_is_resident_bit_for_bit(
    cases: dict[str, Case], name: str, pins: int, spare: int, slots: int, part_tokens: int, read_bytes: int
) -> None:
    case = cases[name]

    def pinned(block: BlockId) -> bool:
        return bool(pins >> (hash(str(block.kind)) + 3 * block.layer + block.expert) % 12 & 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", read_bytes)
        choices = {"pinned": pinned, "spare_bytes": spare, "slots": slots, "part_tokens": part_tokens}
        with Streaming(case.path, case.pack, **choices) as streaming:
            assert torch.equal(run(streaming, case.ids), case.expected)
            assert torch.equal(run(streaming, case.ids), case.expected), "a second time, in other places"


def test_a_head_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.offload.pack_layout.SLICE_BYTES", 1)
    path, pack = packed(tmp_path, "llama")
    assert sum(block.kind == "head" for block in pack.blocks) > 2
    (ids,) = texts(200, [50])
    with Streaming(path, pack, spare_bytes=4096) as streaming:
        assert torch.equal(run(streaming, ids), run(Running(path), ids))


def test_steps_that_want_no_rows_leave_blocks_out(tied: Case) -> None:
    """Prompts in many steps, without the last feed-forward and the head; then a step that needs them."""
    with Streaming(tied.path, tied.pack, spare_bytes=1 << 20) as streaming:
        pages = streaming.kv.table.take(1)
        assert pages is not None
        with torch.inference_mode():
            for start in range(59):
                step = Step.build([(tied.ids[start : start + 1], start, pages, 0)])
                assert not len(streaming.executor.forward(step))
        last = streaming.step((tied.ids[59:], 59, pages))
        assert torch.equal(last, tied.expected[59:])


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_rows_of_an_embedding_on_disk(
    cases: dict[str, Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases[name]
    monkeypatch.setattr(embedding, "ROWS_BYTES", 32768)
    store = Running(case.path).executor.store
    with Streaming(case.path, case.pack) as streaming:
        vocab = streaming.spec.vocab
        for ids in ([5], [7, 7, 0, vocab - 1, 7], list(range(vocab)) * 2, []):
            wanted = torch.tensor(ids, dtype=torch.int64)
            assert torch.equal(streaming.store.rows(EMBED, wanted), store.rows(EMBED, wanted))
        for ids in ([-1], [vocab]):
            with pytest.raises(OperandError, match="row ids"):
                streaming.store.rows(EMBED, torch.tensor(ids))


class Faulty:
    """Reads of one file; those that touch `bytes_` of it fail in the way that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: tuple[int, int] | None = None
        self.error: Exception = OSError(5, "Input/output error")
        self.slow_s = 0.0
        self.reads = 0
        read = DirectFile.read

        def faulty(file: DirectFile, offset: int, into: Tensor) -> None:
            self.reads += 1
            if self.slow_s:
                time.sleep(self.slow_s)
            if self.bad and offset < self.bad[1] and self.bad[0] < offset + len(into):
                raise self.error
            read(file, offset, into)

        monkeypatch.setattr(DirectFile, "read", faulty)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(monkeypatch)


@pytest.mark.parametrize("block", [BlockId("ffn", 1), BlockId("expert", 1, 2), EMBED], ids=str)
def test_a_read_error_is_the_step_s_and_later_steps_try_again(
    cases: dict[str, Case], faulty: Faulty, block: BlockId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 4096)
    case = cases["mixture" if block.kind == "expert" else "tied"]
    extent = case.pack.blocks[block]
    with Streaming(case.path, case.pack, spare_bytes=8192, slots=6) as streaming:
        assert torch.equal(run(streaming, case.ids), case.expected)
        faulty.bad = extent.offset + extent.nbytes // 2, extent.offset + extent.nbytes
        other = texts(streaming.spec.vocab, [60])[0][::-1]

        def until_it_is_read() -> None:  # it may be in the cache, or on its way already
            for _ in range(30):
                run(streaming, other)
                run(streaming, case.ids)

        message = rf"^block {block}: \d+ bytes from byte \d+ of .*blocks.bin.*Input"
        for _ in range(2):
            with pytest.raises(StoreError, match=message):
                until_it_is_read()
        faulty.bad = None
        assert torch.equal(run(streaming, case.ids), case.expected)


def test_reads_that_fail_keep_no_memory(tied: Case, faulty: Faulty) -> None:
    with Streaming(tied.path, tied.pack) as streaming:
        assert streaming.store._embedding is not None
        region = streaming.store._embedding.region
        memory = region.memory
        faulty.bad = (0, tied.pack.manifest.nbytes)
        gc.collect()
        gc.disable()
        try:
            for _ in range(2):
                with pytest.raises(StoreError) as caught:
                    run(streaming, tied.ids)
                failed = weakref.ref(caught.value)
                del caught
                assert failed() is None, "nothing but the collector would free it, and all it refers to"
        finally:
            gc.enable()
        assert region.memory is memory, "no read was under way any more"


class Sink:
    """What one sequence was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error: Exception | None = None

    def begin(self, sequence: Sequence) -> None:
        return None

    def accept(self, sampled: Sampled) -> FinishReason | None:
        self.tokens.append(sampled.token_id)
        return None

    def finish(self, reason: FinishReason, sequence: Sequence) -> None:
        return None

    def fail(self, error: Exception) -> None:
        self.error = error


def answered(engine: Engine, prompt: list[int]) -> Sink:
    sink = Sink()
    engine.submit(
        Sequence(list(prompt), len(prompt) + 6, Sampler(SamplingParams(temperature=0.0), prompt), sink)
    )
    with contextlib.suppress(OffloadError):  # the node logs it
        while engine.step():
            pass
    return sink


def engine_of(running: Running) -> Engine:
    cache = PrefixCache(running.kv.table, running.kv.page_tokens)
    scheduler = Scheduler(cache, sequences=4, queue=4, chunk_tokens=16, guesses=0)
    return Engine(running.executor, running.kv, scheduler, time.monotonic)


def test_a_request_that_meets_a_fault_fails_and_the_next_is_served(tied: Case, faulty: Faulty) -> None:
    expected = answered(engine_of(Running(tied.path)), tied.ids).tokens
    extent = tied.pack.blocks[BlockId("ffn", 1)]
    with Streaming(tied.path, tied.pack, part_tokens=5) as streaming:
        engine = engine_of(streaming)
        assert answered(engine, tied.ids).tokens == expected
        faulty.bad = extent.offset, extent.offset + extent.nbytes
        failed = [answered(engine, tied.ids[::-1]), answered(engine, tied.ids[::-1])][-1]
        assert isinstance(failed.error, StoreError)
        assert translated(failed.error).code == "internal"
        faulty.bad = None
        assert answered(engine, tied.ids).tokens == expected


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path, pack = packed(tmp_path, "llama")
    extent = pack.blocks[BlockId("ffn", 2)]
    with pack.path.open("r+b") as file:
        file.truncate(extent.offset + 4096)
    (ids,) = texts(200, [50])
    ends = pytest.raises(StoreError, match=r"block (layers.2.ffn|head.0|embed): .* the file ends")
    with Streaming(path, pack) as streaming, ends:
        run(streaming, ids)


@pytest.mark.parametrize("tier", ["streamed", "pinned"])
def test_an_altered_byte_names_its_block(tmp_path: Path, tier: str) -> None:
    path, pack = packed(tmp_path, "qwen3_moe")
    extent = pack.blocks[BlockId("attn", 1)]
    with pack.path.open("r+b") as file:
        file.seek(extent.offset + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    (ids,) = texts(200, [50])
    with (
        pytest.raises(PackCorrupt, match=r"layers\.1\.attn"),
        Streaming(path, pack, pinned=lambda block: tier == "pinned") as streaming,
    ):
        run(streaming, ids)


def test_an_altered_embedding_that_is_read_by_rows_is_found(tmp_path: Path) -> None:
    path, pack = packed(tmp_path, "qwen2")
    extent = pack.blocks[EMBED]
    with pack.path.open("r+b") as file:
        file.seek(extent.offset + 5000)
        file.write(b"altered")
    with pytest.raises(PackCorrupt, match="embed"):
        Streaming(path, pack)


def test_a_file_removed_while_it_is_used_is_still_read(tmp_path: Path) -> None:
    path, pack = packed(tmp_path, "llama")
    (ids,) = texts(200, [50])
    with Streaming(path, pack) as streaming:
        first = run(streaming, ids)
        pack.path.unlink()
        assert torch.equal(run(streaming, ids), first)
    with pytest.raises(StoreError, match="cannot be opened"):
        Streaming(path, pack)


def test_a_slow_disk_shows_as_stall_and_stage(tied: Case, faulty: Faulty) -> None:
    with Streaming(tied.path, tied.pack) as streaming:
        faulty.slow_s = 0.002
        assert torch.equal(run(streaming, tied.ids), tied.expected)
        assert streaming.store.stall_s > 0.01
        stage = streaming.store.stage()
        assert stage is not None
        assert stage.done == stage.blocks == 2 * len(streaming.spec.layers) + 1
        assert stage.bytes_per_s > 0


def test_a_dead_disk_is_an_error(tied: Case, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "STUCK_S", 0.0)
    gate = threading.Event()
    with Streaming(tied.path, tied.pack) as streaming:
        run(streaming, tied.ids)
        read = DirectFile.read
        monkeypatch.setattr(DirectFile, "read", lambda *of: (gate.wait(20), read(*of)))
        with pytest.raises(StoreError, match="nothing could be read"):
            run(streaming, tied.ids)
        gate.set()


def test_a_process_that_was_stopped_does_not_take_its_disk_for_dead(
    tied: Case, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on while nobody runs: whoever waits may look at it before the reader comes back."""
    clock = itertools.count(step=1000)
    monkeypatch.setattr(readers, "LOOK_S", 0.001)
    with Streaming(tied.path, tied.pack) as streaming, monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: float(next(clock)))
        faulty.slow_s = 0.01
        assert torch.equal(run(streaming, tied.ids), tied.expected)


def test_what_a_reader_meets_unexpectedly_is_raised_where_it_is_waited_for(
    tied: Case, faulty: Faulty
) -> None:
    with Streaming(tied.path, tied.pack) as streaming:
        faulty.bad, faulty.error = (0, 1 << 40), RuntimeError("a bug")
        with pytest.raises(OffloadError, match="not read any more") as caught:
            run(streaming, tied.ids)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_closing_ends_everything(tied: Case) -> None:
    before = threading.active_count()
    streaming = Streaming(tied.path, tied.pack)
    run(streaming, tied.ids)
    streaming.store.close()
    streaming.store.close()
    assert threading.active_count() == before
    with pytest.raises(StoreError, match="not read any more"):
        run(streaming, tied.ids)


def test_all_in_memory_reads_nothing_while_computing(tied: Case, faulty: Faulty) -> None:
    with Streaming(tied.path, tied.pack, pinned=lambda block: True) as streaming:
        reads = faulty.reads
        assert torch.equal(run(streaming, tied.ids), tied.expected)
        assert faulty.reads == reads
        assert streaming.store.stage() is None
        assert streaming.store.stall_s == 0.0


def test_plans_that_do_not_fit_are_refused(cases: dict[str, Case]) -> None:
    case = cases["mixture"]
    good = streaming_plan(case.resident.plan, case.resident.spec, case.pack)
    with pytest.raises(StoreError, match="window"):
        WindowStore.open(replace(good, window_bytes=4096), case.pack)
    with pytest.raises(StoreError, match="slots"):
        WindowStore.open(replace(good, expert_slots=0), case.pack)
    missing = Pack(
        case.pack.path,
        type(case.pack.manifest)(
            **{
                name: getattr(case.pack.manifest, name)
                for name in case.pack.manifest.__struct_fields__
                if name != "blocks"
            },
            blocks=[b for b in case.pack.manifest.blocks if b.block != BlockId("attn", 0)],
        ),
        case.pack.vectors,
    )
    with pytest.raises(StoreError, match=r"no block layers\.0\.attn"):
        WindowStore.open(good, missing)


def test_without_direct_reads_one_warning_and_the_same(tied: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.offload.direct.os.O_DIRECT", 0, raising=False)
    with (
        pytest.warns(RuntimeWarning, match="page cache") as warned,
        Streaming(tied.path, tied.pack) as streaming,
    ):
        assert torch.equal(run(streaming, tied.ids), tied.expected)
    assert len([w for w in warned if "page cache" in str(w.message)]) == 1
