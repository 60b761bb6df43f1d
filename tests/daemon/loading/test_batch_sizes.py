"""How large the steps of a batch are: as large as keeps the weights in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import tiny

from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading import batch_sizes
from shoal.daemon.loading.batch_sizes import BATCH_SIZES, IF_STREAMED, batch_size
from shoal.daemon.loading.checkpoint_facts import longest_context
from shoal.daemon.loading.outlook import TooLarge, outlook
from shoal.daemon.throughput.own_machine import OwnMachine


def test_larger_steps_need_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    library, packs = Library(Home(tmp_path)), Packs(Home(tmp_path))
    assert batch_size([str(model)], NodeConfig(), library, packs) == BATCH_SIZES[0]
    assert batch_size([str(tmp_path / "no.gguf")], NodeConfig(), library, packs) == BATCH_SIZES[0]

    def within(most: int) -> Any:
        def looked(path: Path, config: NodeConfig, packs: Packs, machine: OwnMachine) -> Any:
            if config.max_sequences > most:
                return TooLarge(refused="", budget_bytes=1, least_bytes=2)
            return outlook(path, config, packs, machine)

        return looked

    for most, size in ((100, BATCH_SIZES[1]), (16, BATCH_SIZES[2]), (1, IF_STREAMED)):
        monkeypatch.setattr(batch_sizes, "outlook", within(most))
        assert batch_size([str(model)], NodeConfig(), library, packs) == size


def test_the_longest_context_is_what_loading_allows(tmp_path: Path) -> None:
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    assert longest_context(model) == 128
    model.write_bytes(b"GGUF")
    with pytest.raises(DaemonError):
        longest_context(model)
