"""`shoal cluster shards`: what a worker keeps, and removing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.cli_fakes import shoal
from fakes.group.weights import fetched
from fakes.packing import small_slices, tiny_checkpoint

from shoal.daemon.cluster.weights.shard_cache import ShardCache


def test_shards_are_shown_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    assert "keeps no parts" in shoal("cluster", "shards").stderr
    assert json.loads(shoal("cluster", "shards", "--json").stdout) == []
    cache = ShardCache(tmp_path / "home" / "shards")
    with tiny_checkpoint(tmp_path, "qwen2", "F16") as checkpoint:
        used = fetched(checkpoint, cache)
        fetched(checkpoint, cache, rank=0)
        shown = shoal("cluster", "shards").stdout
        assert checkpoint.name in shown
        assert "in use" in shown
        latest, other = json.loads(shoal("cluster", "shards", "--json").stdout)
        assert (latest["part"], latest["in_use"], other["part"], other["in_use"]) == (
            "1/2",
            False,
            "2/2",
            True,
        )
        assert latest["bytes"] > 0
        assert latest["complete"]
        done = shoal("cluster", "shards", "--clear", "--json")
        assert "1 in use" in done.stderr
        assert [row["removed"] for row in json.loads(done.stdout)] == [True, False]
        del used
        assert "removed 1 shard" in shoal("cluster", "shards", "--clear").stderr
        assert cache.list() == ()


def test_a_limit_is_an_amount() -> None:
    done = shoal("serve", "--shard-disk", "plenty")
    assert done.exit_code == 2
    assert "--shard-disk" in done.stderr
