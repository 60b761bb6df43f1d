"""What this machine can do, as a daemon knows it: as it was measured, or what is assumed until then; and corrected by
how long steps took.

Never holds anybody up: whoever loads a model gets what is known. While nothing is to be done for a while, it measures
for some ten seconds, or looks whether what was measured before still holds, and stops when something comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.comm.group.belonging import belongs
from shoal.comm.home import Home
from shoal.daemon.loading.checkpoint_facts import kernel_home
from shoal.daemon.memory import return_freed
from shoal.partition.throughput.prediction import Binding
from shoal.partition.throughput.profile import Device, Profile, unmeasured

if TYPE_CHECKING:  # a daemon starts without what only files and measuring need
    from .drift import Looked
    from .kept_profile import Kept

log = logging.getLogger(__name__)

RESTED_S = 20.0  # without work, before it is measured
ATTEMPTS_S = 60.0  # between two attempts, and between two times of writing corrections down
FAILED_S = 3600.0  # after an attempt that failed: the next one would most likely fail, too
AGED_S = 24 * 3600.0  # after so long it is looked at again, as it is once after a daemon has begun …
SLOWER_S = 3600.0  # … and after so long while it is slower than when it was measured
CONFIRMING_S = 600.0  # until what has changed is looked at once more: it may have been a busy minute
MOST_SURPRISE = 2.718  # times as long as predicted, or as short: a step held up is not believed


class OwnMachine:
    """`kept`: the file of the profile; None: nothing is read, measured or kept. `place`: a directory on the disk that
    weights come from. Unless it is `alone`, it measures nothing by itself: it may compute for others. Thread-safe."""

    def __init__(
        self,
        threads: int,
        kept: Path | None = None,
        place: Path | None = None,
        alone: Callable[[], bool] = lambda: True,
    ) -> None:
        self._threads = threads
        self._kept = kept
        self._place = place or Path("/")
        self._alone = alone
        self._lock = threading.Lock()
        self._known: Kept | None = None  # as it was read or measured, with corrections since
        self._device = unmeasured(threads)
        self._stamp: tuple[int, ...] = ()  # of the file when it was read
        self._unsaved = False
        self._saved_s = 0.0
        self._idle_since_s: float | None = None
        self._next_s = 0.0  # before which nothing is attempted
        self._measuring: threading.Thread | None = None
        self._looked = False  # whether it was measured or looked at since this began
        self._suspected: Looked | None = None  # what has changed, if that is still so

    @classmethod
    def of(cls, home: Home, threads: int) -> OwnMachine:
        """The machine as a home knows it, with the disk that weights are streamed from."""
        return cls(threads, profile_file(home, threads), home.streamed, lambda: not belongs(home.cluster))

    @property
    def alone(self) -> bool:
        """Whether it belongs to no cluster."""
        return self._alone()

    @property
    def home(self) -> Home | None:
        """Where what was found out is kept, if anything is."""
        return Home(self._kept.parent) if self._kept is not None else None

    @property
    def device(self) -> Device:
        """What it can do. Somebody may have measured it since the last time."""
        with self._lock:
            stamp = self._file_stamp()
            if stamp != self._stamp:
                self._stamp, self._suspected = stamp, None
                self._take(self._read() if stamp else None)
            return self._device

    def correct(self, parts: Mapping[Binding, float], times: float, others_s: float = 0.0) -> None:
        """What was predicted to take these seconds, by what takes them, took `times` as long. `others_s`: what others
        take of it besides."""
        times = min(MOST_SURPRISE, max(1 / MOST_SURPRISE, times))
        with self._lock:
            device = replace(self._device, corrections=self._device.corrections.moved(parts, times, others_s))
            self._device = device
            if self._known is not None:
                self._known = replace(self._known, profile=_with_head(self._known.profile, device))
                self._unsaved = True

    def look(self, idle: Callable[[], bool], kinds: Callable[[], Collection[str]]) -> None:
        """To be called now and then: writes corrections down, and measures if nothing was to be done for a while.
        `kinds`: the stored types of what is loaded, those with most bytes first. Raises nothing: only predictions
        depend on it."""
        try:
            self._look(idle, kinds)
        except Exception as error:
            log.warning("%s is not kept any more: %s: %s", self._kept, type(error).__name__, error)
            self._kept, self._stamp = None, ()

    def _look(self, idle: Callable[[], bool], kinds: Callable[[], Collection[str]]) -> None:
        now_s = time.monotonic()
        if self._unsaved and now_s - self._saved_s > ATTEMPTS_S:
            self.save()
        if self._kept is None or not (self._alone() and idle()):
            self._idle_since_s = None
            return
        self._idle_since_s = self._idle_since_s or now_s
        if now_s - self._idle_since_s < RESTED_S or now_s < self._next_s or self._measuring:
            return
        self._next_s = now_s + ATTEMPTS_S
        if self._due():  # before further types are measured, which would be looked at instead of those before
            self._begin(self._look_again, idle, list(kinds()))
        elif lacking := self._lacking(kinds()):
            self._begin(self._measure, idle, lacking)

    def _begin(
        self,
        work: Callable[[Callable[[], bool], list[str]], None],
        idle: Callable[[], bool],
        kinds: list[str],
    ) -> None:
        def run() -> None:
            try:
                work(idle, kinds)
            except Exception as error:  # predictions are less good then, and nothing else
                log.warning("this machine could not be measured: %s: %s", type(error).__name__, error)
                self._next_s = time.monotonic() + FAILED_S
            finally:
                return_freed()  # inputs and weights that were tried
                self._measuring = None

        self._measuring = threading.Thread(target=run, name="shoal-measure", daemon=True)
        self._measuring.start()

    def _due(self) -> bool:
        """Whether what is known is to be looked at again."""
        known = self._known if self.device.measured else None
        if known is None:
            return False
        age_s = abs(time.time() - known.looked_s)
        return not self._looked or age_s > (SLOWER_S if known.slower else AGED_S)

    def save(self) -> None:
        """Write corrections into the file, unless somebody has written another one meanwhile."""
        with self._lock:
            self._saved_s = time.monotonic()
            known, self._unsaved = self._known if self._unsaved else None, False
            if self._kept is None or known is None or self._file_stamp() != self._stamp:
                return
            from .kept_profile import profile_key, write_kept

            write_kept(self._kept, profile_key(self._threads, self._place), known)
            self._stamp = self._file_stamp()

    def _lacking(self, kinds: Collection[str]) -> list[str]:
        """The types that are to be measured; none if they are all known."""
        device = self.device
        if self._known is not None and not self._known.brief:
            return []
        known = {law.kind for law in device.products} if device.measured else set()
        return [kind for kind in kinds or ("Q4_K",) if kind not in known][:2]

    def _measure(self, idle: Callable[[], bool], kinds: list[str]) -> None:
        from .brief_profile import measure_briefly
        from .kept_profile import Kept

        stamp, known = self._stamp, self._known
        before = known.profile.head if known is not None else None
        found = measure_briefly(self._threads, self._place, kinds, before, idle)
        if found is not None:
            known = known or Kept(Profile((found,)), brief=True, looked_s=time.time())
            with self._lock:
                if self._stamp != stamp:  # somebody has measured it meanwhile
                    return
                self._take(replace(known, profile=_with_head(known.profile, found)))
                self._looked = self._unsaved = True
            self.save()

    def _look_again(self, idle: Callable[[], bool], kinds: list[str]) -> None:
        """What two looks find changed is taken as it is now. Until it is about as it was again, all is measured anew
        when somebody wants to know all of it."""
        from .drift import look_again

        device = self.device
        stamp, known = self._stamp, self._known
        found = look_again(device, self._place, kinds, idle, known.drift) if known is not None else None
        if found is None:
            return
        before, self._suspected = self._suspected, None
        if before is not None:
            found = found.also_in(before)
        elif found.changed:
            self._suspected, self._next_s = found, time.monotonic() + CONFIRMING_S
            return
        with self._lock:
            known = self._known
            if known is None or self._stamp != stamp:  # somebody has measured it meanwhile
                return
            profile = _with_head(known.profile, found.applied(known.profile.head))
            drift = found.since_measured(known.drift)
            known = replace(known, profile=profile, drift=drift, looked_s=time.time())
            self._take(known)
            self._looked = self._unsaved = True
        if found.changed and known.changed:
            said = "this machine has changed since it was measured: %s; shoal profile measures it"
            log.warning(said, known.changed)
        elif found.changed:
            log.info("this machine is again about as it was when it was measured")
        self.save()

    def _take(self, known: Kept | None) -> None:
        self._known = known
        self._device = known.profile.head if known is not None else unmeasured(self._threads)

    def _read(self) -> Kept | None:
        from .kept_profile import profile_key, read_kept

        try:
            return read_kept(self._kept, profile_key(self._threads, self._place)) if self._kept else None
        except OSError:  # the disk of `place` cannot be looked at
            return None

    def _file_stamp(self) -> tuple[int, ...]:
        try:
            found = self._kept.stat() if self._kept is not None else None
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else ()


def profile_file(home: Home, threads: int) -> Path:
    """Where the profile on so many threads is kept, with the kernels that compute here. Raises DaemonError."""
    return home.profile(kernel_home(), threads)


def _with_head(profile: Profile, head: Device) -> Profile:
    return replace(profile, devices=(head, *profile.devices[1:]))
