"""Streaming from a disk that fails, is slow or gives wrong bytes: who gets the error, and that the next step works."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes.listening import Heard, Listener
from fakes.running import Running
from fakes.streaming import Streaming, packed, run, texts

from shoal.daemon.error_codes import translated
from shoal.engine.engine import Engine
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from shoal.models.sampling import Sampler, SamplingParams
from shoal.offload.direct_io import DirectFile
from shoal.offload.errors import OffloadError, PackCorrupt, StoreError
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.offload.window import readers
from shoal.partition.spec import BlockId

if TYPE_CHECKING:
    from fakes.streamed_cases import Case, Faulty

pytest_plugins = ("fakes.streamed_cases",)

EMBED = BlockId("embed")


@pytest.mark.parametrize("block", [BlockId("ffn", 1), BlockId("expert", 1, 2), EMBED], ids=str)
def test_a_read_error_is_the_step_s_and_later_steps_try_again(
    cases: dict[str, Case], faulty: Faulty, block: BlockId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 4096)
    case = cases["mixture" if block.kind == "expert" else "tied"]
    extent = case.pack.blocks[block]
    with Streaming(case.path, case.pack, spare_bytes=8192, slots=6) as streaming:
        assert np.array_equal(run(streaming, case.ids), case.expected)
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
        assert np.array_equal(run(streaming, case.ids), case.expected)


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


def test_what_failed_ahead_of_need_is_tried_again(tied: Case) -> None:
    with Streaming(tied.path, tied.pack, spare_bytes=1 << 20) as streaming:
        run(streaming, tied.ids)
        with streaming.store._readers._lock:
            ahead = streaming.store._window._passing
            for passage in ahead:
                passage.error = StoreError("long ago")
        assert ahead
        assert np.array_equal(run(streaming, tied.ids), tied.expected)


def answered(engine: Engine, prompt: list[int]) -> Heard:
    listener = Listener(engine)
    heard = listener.submit(
        Sequence(list(prompt), len(prompt) + 6, Sampler(SamplingParams(temperature=0.0), prompt))
    )
    with contextlib.suppress(OffloadError):  # the node logs it
        listener.run()
    return heard


def engine_of(running: Running) -> Engine:
    cache = PrefixCache(running.kv.table, running.kv.page_tokens)
    scheduler = Scheduler(cache, sequences=4, queue=4, chunk_tokens=16, guesses=0)
    return Engine(Rank(running.executor, time.monotonic), scheduler, time.monotonic)


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
    with ends, Streaming(path, pack) as streaming:
        run(streaming, ids)


@pytest.mark.parametrize("block", [BlockId("attn", 1), BlockId("expert", 1, 2)], ids=str)
def test_a_byte_altered_while_the_model_runs_names_its_block(tmp_path: Path, block: BlockId) -> None:
    path, pack = packed(tmp_path, "qwen3_moe")
    prompts = texts(200, [50] * 20)
    with Streaming(path, pack, slots=6) as streaming:
        for ids in prompts[:2]:
            run(streaming, ids)
        with pack.path.open("r+b") as file:
            file.seek(pack.blocks[block].offset + 100)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        later_ns = pack.path.stat().st_mtime_ns + 1_000_000_000  # clocks of files may be coarse
        os.utime(pack.path, ns=(later_ns, later_ns))

        def until_it_is_read() -> None:  # it may be in memory still
            for ids in prompts:
                run(streaming, ids)

        with pytest.raises(PackCorrupt, match=rf"block {block} was altered"):
            until_it_is_read()


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


@pytest.mark.parametrize(("family", "named"), [("qwen2", "embed"), ("llama", "head.0")], ids=["own", "tied"])
def test_an_altered_embedding_that_is_read_by_rows_is_found(tmp_path: Path, family: str, named: str) -> None:
    """This is noticed before any row is used, because results that come from the row might be kept."""
    path, pack = packed(tmp_path, family)
    extent = pack.blocks[EMBED]
    with pack.path.open("r+b") as file:
        file.seek(extent.offset + 5000)
        file.write(b"altered")
    with pytest.raises(PackCorrupt, match=named):
        Streaming(path, pack)


def test_a_file_removed_while_it_is_used_is_still_read(tmp_path: Path) -> None:
    path, pack = packed(tmp_path, "llama")
    (ids,) = texts(200, [50])
    with Streaming(path, pack) as streaming:
        first = run(streaming, ids)
        pack.path.unlink()
        assert np.array_equal(run(streaming, ids), first)
    with pytest.raises(StoreError, match="cannot be opened"):
        Streaming(path, pack)


def test_a_slow_disk_shows_as_stall_and_stage(tied: Case, faulty: Faulty) -> None:
    with Streaming(tied.path, tied.pack) as streaming:
        faulty.slow_s = 0.002
        assert np.array_equal(run(streaming, tied.ids), tied.expected)
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
    """The clock goes on while the process is stopped. Whoever waits may look at it before the reader runs again."""
    clock = itertools.count(step=1000)
    monkeypatch.setattr(readers, "SILENT_LOOK_S", 0.001)
    with Streaming(tied.path, tied.pack) as streaming, monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: float(next(clock)))
        faulty.slow_s = 0.01
        assert np.array_equal(run(streaming, tied.ids), tied.expected)


def test_what_a_reader_meets_unexpectedly_is_raised_where_it_is_waited_for(
    tied: Case, faulty: Faulty
) -> None:
    with Streaming(tied.path, tied.pack) as streaming:
        faulty.bad, faulty.error = (0, 1 << 40), RuntimeError("a bug")
        with pytest.raises(OffloadError, match="not read any more") as caught:
            run(streaming, tied.ids)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_without_direct_reads_one_warning_and_the_same(tied: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.offload.direct_io.os.O_DIRECT", 0, raising=False)
    with (
        pytest.warns(RuntimeWarning, match="page cache") as warned,
        Streaming(tied.path, tied.pack) as streaming,
    ):
        assert np.array_equal(run(streaming, tied.ids), tied.expected)
    assert len([w for w in warned if "page cache" in str(w.message)]) == 1


def test_short_reads_through_the_page_cache_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 48)
    preadv = os.preadv
    monkeypatch.setattr("shoal.offload.direct_io.os.O_DIRECT", 0, raising=False)
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [into[0][:1000]], at))
    into = np.zeros(8192, np.uint8)
    with pytest.warns(RuntimeWarning, match="page cache"):
        file = DirectFile(tmp_path / "file")
    file.read(4096, into)
    assert bytes(into) == bytes(range(256)) * 32
    with pytest.raises(EOFError, match="ends at byte 12288"):
        file.read(8192, into)
    file.close()
