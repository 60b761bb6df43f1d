"""What `shoal plan` says of when a plan can begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fakes import tiny

from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.packs import Packs
from shoal.daemon.throughput.foresight import Asked, Foresight, foresee
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.partition.throughput.profile import Profile, unmeasured


def test_a_pack_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    """On this machine; another one may have none."""
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf", type="F16")
    home, config = Home(tmp_path / "home"), NodeConfig(threads=1, device="cpu")
    here = OwnMachine.of(home, 1)
    machines = Profile((replace(unmeasured(1), memory_bytes=4e9, disk_bytes_per_s=1e9),))

    def planned(machine: OwnMachine | None) -> Foresight:
        asked = Asked(16, 16, quant="q8")
        return foresee(path, machines, asked, config, machine)

    before, elsewhere = planned(here).start, planned(None).start
    assert before is not None
    assert before.pack_s > 0
    assert before == elsewhere
    Packs(home).pack(path, "q8", memory_bytes=None, progress=lambda *_: None)
    after = planned(here).start
    assert after is not None
    assert (after.pack_s, after.load_s) == (0.0, before.load_s)
    assert planned(None).start == elsewhere
