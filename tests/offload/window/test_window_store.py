"""Streaming gives the same logits, bit for bit, as having everything in memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from fakes.group.nodes import begun_threads
from fakes.running import Running
from fakes.streaming import MODELS, Streaming, packed, run, streaming_plan, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.kernels import OperandError
from shoal.models.step import Step
from shoal.offload.errors import StoreError
from shoal.offload.pack.pack import Pack
from shoal.offload.window import embedding, readers
from shoal.offload.window.window import Passage, Read
from shoal.offload.window.window_store import WindowStore
from shoal.partition.spec import BlockId

if TYPE_CHECKING:
    from fakes.streamed_cases import Case, Faulty

pytest_plugins = ("fakes.streamed_cases",)

EMBED = BlockId("embed")


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
            assert np.array_equal(run(streaming, case.ids), case.expected)
            assert np.array_equal(run(streaming, case.ids), case.expected), "a second time, in other places"


def test_a_head_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.offload.pack.layout.SLICE_BYTES", 1)
    path, pack = packed(tmp_path, "llama")
    assert sum(block.kind == "head" for block in pack.blocks) > 2
    (ids,) = texts(200, [50])
    with Streaming(path, pack, spare_bytes=4096) as streaming:
        assert np.array_equal(run(streaming, ids), run(Running(path), ids))


def test_steps_that_want_no_rows_leave_blocks_out(tied: Case) -> None:
    """Prompts pass in many steps that skip the last feed-forward and the head; then comes a step that needs them."""
    with Streaming(tied.path, tied.pack, spare_bytes=1 << 20) as streaming:
        pages = streaming.kv.table.take(1)
        assert pages is not None
        for start in range(59):
            step = Step.build([(tied.ids[start : start + 1], start, pages, 0)])
            assert not len(streaming.executor.forward(step))
        last = streaming.step((tied.ids[59:], 59, pages))
        assert np.array_equal(last, tied.expected[59:])


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
            wanted = np.array(ids, np.int64)
            assert np.array_equal(streaming.store.rows(EMBED, wanted), store.rows(EMBED, wanted))
        for ids in ([-1], [vocab]):
            with pytest.raises(OperandError, match="row ids"):
                streaming.store.rows(EMBED, np.array(ids))


def test_the_best_speed_is_of_whole_seconds_and_stays(tied: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.monotonic() + 100
    with Streaming(tied.path, tied.pack) as streaming, monkeypatch.context() as patch:
        store = streaming.store
        patch.setattr(time, "monotonic", lambda: now_s)

        def come(times: int, nbytes: int, each_s: float, error: Exception | None = None) -> None:
            nonlocal now_s
            for _ in range(times):
                now_s += each_s
                with store._readers._lock:
                    passage = Passage(EMBED, 0, 0, 1 << 40, error=error)
                    store._readers._note(store._ring, Read(passage, 0, nbytes))

        def speeds() -> tuple[float, ...]:
            stage = store.stage()
            assert stage is not None
            return stage[2:]

        come(40, 1_000_000, 0.1)
        assert speeds() == pytest.approx((1e7, 1e7), rel=0.06)
        come(20, 1_000_000_000, 0.1, StoreError("broken"))
        come(5, 1_000_000, 0.0)  # a burst
        assert speeds()[1] == pytest.approx(1e7, rel=0.06)
        now_s += 100
        assert speeds() == pytest.approx((0, 1e7), rel=0.06)


def test_closing_ends_everything(tied: Case) -> None:
    left = begun_threads()
    streaming = Streaming(tied.path, tied.pack)
    run(streaming, tied.ids)
    streaming.store.close()
    streaming.store.close()
    assert not left()
    with pytest.raises(StoreError, match="not read any more"):
        run(streaming, tied.ids)


def test_all_in_memory_reads_nothing_while_computing(tied: Case, faulty: Faulty) -> None:
    with Streaming(tied.path, tied.pack, pinned=lambda block: True) as streaming:
        reads = faulty.reads
        assert np.array_equal(run(streaming, tied.ids), tied.expected)
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
    blocks = [item for item in case.pack.manifest.blocks if item.block != BlockId("attn", 0)]
    manifest = msgspec.structs.replace(case.pack.manifest, blocks=blocks)
    missing = Pack(case.pack.path, manifest, case.pack.vectors, inode=0)
    with pytest.raises(StoreError, match=r"no block layers\.0\.attn"):
        WindowStore.open(good, missing)
