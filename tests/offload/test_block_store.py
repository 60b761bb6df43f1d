"""The resident store, from a checkpoint or a pack: equal blocks, tied tables shared, no thread left running."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes.group.nodes import begun_threads
from fakes.running import Running
from fakes.streaming import MODELS, packed, streaming_plan

from shoal.kernels import huge_pages
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.offload.block_store import ResidentStore
from shoal.offload.errors import PackCorrupt
from shoal.offload.pack.pack import Pack
from shoal.offload.window.pinned import PackReader
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

EMBED = BlockId("embed")


@pytest.fixture(scope="module", params=["tied", "untied", "mixture"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Pack, Plan]:
    """A checkpoint, its pack, and a plan that keeps all of it in memory."""
    family, overrides = MODELS[request.param]
    path, pack = packed(tmp_path_factory.mktemp(request.param), family, **overrides)
    running = Running(path)
    return path, pack, streaming_plan(running.plan, running.spec, pack, pinned=lambda block: True)


def test_both_readers_give_the_same_blocks(model: tuple[Path, Pack, Plan]) -> None:
    path, pack, plan = model
    with open_checkpoint(path) as checkpoint:
        read = dict(checkpoint.read_blocks(checkpoint.spec.blocks()))
    unpacked = dict(PackReader(pack).read_blocks([item.block for item in plan.blocks]))
    heads = [weights for block, weights in unpacked.items() if block.kind == "head"]
    for block, weights in read.items():
        if block.kind != "head":
            assert unpacked[block].matrix.keys() == weights.matrix.keys()
            for role, matrix in weights.matrix.items():
                assert np.array_equal(unpacked[block].matrix[role].data, matrix.data)
    assert np.array_equal(
        np.concatenate([h.matrix["head"].data for h in heads]), read[BlockId("head")].matrix["head"].data
    )
    for blocks, head in ((read, read[BlockId("head")]), (unpacked, heads[0])):
        assert np.shares_memory(blocks[EMBED].matrix["embed"].data, head.matrix["head"].data) == pack.tied


def test_what_stays_lies_in_one_piece(
    model: tuple[Path, Pack, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are far smaller than the model: at the end of each, up to a huge page would be in memory for nothing."""
    monkeypatch.setattr(huge_pages, "HUGE_BYTES", 4096)
    monkeypatch.setattr(huge_pages, "CHUNK_BYTES", 4096)
    path, pack, plan = model
    with open_checkpoint(path) as checkpoint:
        from_files = ResidentStore.load(Running(path).plan, checkpoint)
    for store, blocks in (
        (from_files, checkpoint.spec.blocks()),
        (ResidentStore.load(plan, PackReader(pack)), pack.blocks),
    ):
        matrices = [it for block in blocks for it in store.acquire(block).__enter__().matrix.values()]
        places = sorted({(it.data.ctypes.data, it.nbytes) for it in matrices})
        assert len(places) > 4
        taken = sum(nbytes for _, nbytes in places)
        (first, _), (last, nbytes) = places[0], places[-1]
        assert last + nbytes - first < taken + taken // 64 + 4096 * (store is not from_files)


def test_progress_ends_at_all_bytes(model: tuple[Path, Pack, Plan]) -> None:
    _, pack, plan = model
    told: list[tuple[int, int]] = []
    left = begun_threads()
    ResidentStore.load(plan, PackReader(pack), lambda done, total: told.append((done, total)))
    assert not left(), "nothing will be read any more"
    assert len(told) == len(plan.blocks)
    assert told == sorted(told)
    assert told[-1] == (plan.weights_bytes, plan.weights_bytes)


def test_a_load_that_is_given_up_ends_its_readers(model: tuple[Path, Pack, Plan]) -> None:
    _, pack, plan = model
    left = begun_threads()

    def give_up(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as given_up:
        ResidentStore.load(plan, PackReader(pack), give_up)
    assert given_up.value.__traceback__ is not None, "which keeps what was begun"
    assert not left()


def test_an_altered_block_is_found_and_the_pack_marked(tmp_path: Path) -> None:
    path, pack = packed(tmp_path, "llama")
    running = Running(path)
    plan = streaming_plan(running.plan, running.spec, pack, pinned=lambda block: True)
    with pack.path.open("r+b") as file:
        file.seek(pack.blocks[BlockId("ffn", 1)].offset + 100)
        file.write(b"altered")
    left = begun_threads()
    with pytest.raises(PackCorrupt, match=r"layers\.1\.ffn"):
        ResidentStore.load(plan, PackReader(pack))
    assert pack.damaged
    assert not left()
