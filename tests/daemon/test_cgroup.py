"""The memory that control groups leave: nested limits, both versions, and containers that see only their own group."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal import kernels
from shoal.daemon import cgroup, memory
from shoal.daemon.errors import DaemonError

MB = 1 << 20


def group(directory: Path, names: tuple[str, str, str], limit: str, usage: int, idle: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    limit_file, usage_file, cache = names
    (directory / limit_file).write_text(f"{limit}\n")
    (directory / usage_file).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{cache} {idle}\nfile 7\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def member(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "membership"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_tightest_of_nested_groups_holds(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    group(mount / "a" / "b", V2, "max", 10 * MB)
    group(mount / "a", V2, str(100 * MB), 60 * MB, idle=20 * MB)
    inside = member(tmp_path, "0::/a/b")
    assert cgroup.room_bytes(mount, inside) == 60 * MB
    assert cgroup.limit_bytes(mount, inside) == 100 * MB
    (mount / "a" / "b" / "memory.high").write_text(f"{30 * MB}\n")
    assert cgroup.room_bytes(mount, inside) == 20 * MB


def test_version_one_and_a_container_that_sees_only_itself(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    group(mount / "memory", V1, str(80 * MB), 50 * MB)
    inside = member(tmp_path, "5:cpu,cpuacct:/docker/x", "4:memory:/docker/x", "0::/")
    assert cgroup.room_bytes(mount, inside) == 30 * MB
    group(mount / "memory" / "docker" / "x", V1, str(9223372036854771712), 50 * MB)
    assert cgroup.room_bytes(mount, inside) == 30 * MB


def test_processors_are_those_of_the_tightest_quota(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    (mount / "a" / "b").mkdir(parents=True)
    (mount / "a" / "cpu.max").write_text("40000 100000\n")
    (mount / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cgroup.processors(mount, member(tmp_path, "0::/a/b")) == 0.4
    first = mount / "cpu" / "docker"
    first.mkdir(parents=True)
    (first / "cpu.cfs_quota_us").write_text("-1\n")
    (first / "cpu.cfs_period_us").write_text("100000\n")
    inside = member(tmp_path, "5:cpu,cpuacct:/docker", "0::/")
    assert cgroup.processors(mount, inside) is None
    (first / "cpu.cfs_quota_us").write_text("250000\n")
    assert cgroup.processors(mount, inside) == 2.5


@pytest.mark.parametrize("text", ["", "x y", "1 0", "5", "-1 100000"])
def test_a_quota_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup.processors(tmp_path, member(tmp_path, "0::/")) is None


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert cgroup.room_bytes(tmp_path, tmp_path / "nothing") is None
    mount = tmp_path / "cgroup"
    group(mount, V2, "max", 5)
    assert cgroup.room_bytes(mount, member(tmp_path, "0::/../outside", "9:name=systemd:/")) is None
    (mount / "memory.max").write_text("garbage")
    assert cgroup.room_bytes(mount, member(tmp_path, "0::/")) is None
    assert cgroup.limit_bytes(mount, member(tmp_path, "0::/")) is None


def test_a_budget_holds_the_process_and_leaves_the_machine_usable(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", lambda: 8000 * MB)
    monkeypatch.setattr(cgroup, "room_bytes", lambda: None)
    monkeypatch.setattr(memory, "private_bytes", lambda: 150 * MB)
    monkeypatch.setattr(memory, "_runtimes", {})
    asked = memory.budget_of(1000 * MB)
    assert asked.limit_bytes == 1000 * MB
    assert (
        asked.held_by(memory.PROCESS)
        == 150 * MB + memory.CODE_BYTES + memory.GROWTH_BYTES + memory.CHILD_BYTES
    )
    assert memory.budget_of(None).limit_bytes == 150 * MB + 7200 * MB
    monkeypatch.setattr(kernels, "home", lambda: "reference")
    held = memory.budget_of(1000 * MB).held_by(memory.PROCESS)
    assert held == asked.held_by(memory.PROCESS) + memory.TORCH_CODE_BYTES
    monkeypatch.setattr(memory, "_free_bytes", lambda: 1000 * MB)
    assert memory.budget_of(None).limit_bytes == 150 * MB + 750 * MB
    monkeypatch.setattr(cgroup, "room_bytes", lambda: 600 * MB)
    assert memory.available_bytes() == 600 * MB
    assert memory.budget_of(None).limit_bytes == 150 * MB + 540 * MB
    monkeypatch.setattr(cgroup, "room_bytes", lambda: 2000 * MB)
    assert memory.budget_of(None).limit_bytes == 150 * MB + 750 * MB


def test_forgetting_files_leaves_them_readable(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 10_000)
    memory.forget_files([file, tmp_path / "vanished"])
    assert file.read_bytes() == b"x" * 10_000


def test_a_budget_beyond_all_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "limit_bytes", lambda: 700 * MB)
    assert memory.budget_of(700 * MB).limit_bytes == 700 * MB
    with pytest.raises(DaemonError, match="800 MB was asked for, but there are 734 MB of memory") as refused:
        memory.budget_of(800 * 10**6)
    assert refused.value.code == "resources"
