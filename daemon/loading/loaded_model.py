"""A loaded model: a checkpoint that answers, and its state.

Knows its parts and how they end; `assembly` puts them together. It runs nothing: its owner calls `engine.step`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from pathlib import Path

from shoal.comm.messages import Loaded, ModelStatus, Stage
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import Reference
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.engine.sequence import Sequence
from shoal.models.chat.template import ChatTemplate
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.errors import ModelError, TemplateError
from shoal.models.tokenizer.parts import TOOL_TEMPLATE
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.offload.budget import Budget
from shoal.offload.kv.disk_pages import FLUSH_LIMIT_S
from shoal.offload.pack.manifest import Quant
from shoal.partition.plan import Plan

from .advice import Advice
from .runnable import Runnable

log = logging.getLogger(__name__)

KEPT_EVERY_S = 60.0
LOOKED_AT = 64  # requests at a time: what is looked back at later was no quicker


@dataclass(eq=False)
class LoadedModel:
    """Everything that one model needs to answer.

    named: what it was called when it was loaded, a path or a name in the store. asked_context, asked_ranks: what was
    asked for then, or since then if it was so already. used_s: when it was last asked. draft: the model that guesses
    for it. advice: what its makers say of sampling. retired: another model has taken its place, and it only ends what
    it has begun.
    """

    name: str
    named: str
    main: Runnable
    engine: Engine
    draft: Runnable | None
    quant: Quant
    asked_context: int | None
    asked_ranks: int | None
    clock: Callable[[], float]
    used_s: float
    advice: Advice = field(default_factory=Advice)
    retired: bool = False
    load_s: float = 0.0  # what it took the last time
    settled_s: float = 0.0  # when it was last idle, or loaded anew
    prepared: bool = False  # machines that have come have their weights
    begun: deque[Sequence] = field(default_factory=deque)  # that nobody has looked back at
    arrivals: int = 0  # of machines, until it was last considered whether they should take part
    _told: str = ""  # of what was tried
    _kept_s: float = 0.0  # when the uses of its experts were written down
    _compiling: threading.Lock = field(default_factory=threading.Lock)
    _templates: dict[str, ChatTemplate | TemplateError] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.main.checkpoint

    @property
    def plan(self) -> Plan:
        return self.main.plan

    @property
    def ranks(self) -> int:
        """Machines that compute it, or its long steps."""
        return len(self.main.rank_bytes)

    def computed_by(self, ranks: int) -> bool:
        """Whether so many machines compute all of it: neither more nor less, and not prompts alone."""
        return self.ranks == ranks and self.main.share is None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.main.tokenizer

    @property
    def executor(self) -> Executor:
        return self.main.executor

    @property
    def peak_bytes(self) -> int:
        return self.main.peak_bytes + (self.draft.peak_bytes if self.draft else 0)

    @property
    def reference(self) -> Reference:
        """Which model it is on this machine, however it was named in the request."""
        return Reference(str(self.checkpoint.path), self.quant)

    @property
    def draft_path(self) -> Path | None:
        return self.draft.checkpoint.path if self.draft else None

    @property
    def warnings(self) -> list[str]:
        """What is odd about the model's files and how it is loaded, each in one line."""
        spec, context = self.checkpoint.spec, self.plan.context_tokens
        said = [*self.checkpoint.warnings, *self.advice.warnings]
        if self.main.device_trouble:
            said.append(self.main.device_trouble)
        if context > spec.context:
            said.append(
                f"{self.checkpoint.path}: the model was made for {spec.context} tokens. "
                f"Its rope scaling extends that to {spec.longest}, so it is loaded with {context}"
            )
        return said

    @property
    def damaged(self) -> bool:
        """Whether its pack was found altered, so that it has to be loaded again. Requests fail at the step that needs
        the altered bytes."""
        return self.executor.store.damaged

    def stale(self, resolve: Callable[[str], Path]) -> Path | None:
        """A file in whose place is another than the model, or its draft model, was loaded from. None if they are the
        same, or gone, so that there is nothing else to load. `resolve` finds models by name. Raises DaemonError if what
        is there now is damaged."""
        try:
            path = resolve(self.named)
        except DaemonError as error:
            if error.code != "not_found":
                raise
            return None
        if path != self.checkpoint.path:
            return path
        theirs = self.draft.checkpoint.replaced() if self.draft else None
        return self.checkpoint.replaced() or theirs

    def rename(self, name: str, budget: Budget) -> None:
        """Call it something else from now on."""
        for before, after in zip(_purposes(self.name), _purposes(name), strict=True):
            budget.rename(before, after)
        self.name = name

    def begin(self, sequence: Sequence) -> None:
        """Queue a request's sequence. Raises as `Engine.submit`."""
        self.engine.submit(sequence)
        self.used_s = self.clock()
        self.begun.append(sequence)

    def keep_uses(self) -> None:
        """Write down now and then how often its experts were used."""
        if (now_s := self.clock()) - self._kept_s >= KEPT_EVERY_S:
            self._kept_s = now_s
            self.main.keep_uses()

    def look_back(self) -> None:
        """Log what was measured of requests that have ended beside what was predicted, and what was tried."""
        rival = self.engine.scheduler.speeds.rival
        if rival is not None and (said := rival.said) != self._told:
            self._told = said
            log.info("%s: %s", self.name, said)
        for _ in range(min(len(self.begun), LOOKED_AT)):
            sequence = self.begun.popleft()
            if not sequence.ended:
                self.begun.append(sequence)
            else:
                self._look_back_at(sequence)

    def _look_back_at(self, sequence: Sequence) -> None:
        try:
            if said := self.main.expectation.look_back(sequence):
                log.info("%s: %s", self.name, said)
        except Exception as error:  # the thread has others to look after, and no answer depends on this
            log.warning("%s: a request cannot be compared: %s", self.name, error, exc_info=True)

    def loaded_in(self, seconds: float) -> Loaded:
        """The answer to who had it loaded; the log has it beside what was predicted."""
        said = f"{self.name} in {seconds:.2g} s: {self.plan.describe()}"
        if (usual := self.main.expectation.usual) is not None:
            (low, high), speed = usual.band, usual.tokens_per_s
            said += f"; predicted {usual.load_s:.2g} s from the disk, {speed:.3g} tokens/s ({low:.3g} to {high:.3g})"
        log.info("loaded %s", said)
        return Loaded(model=self.status(), seconds=seconds)

    @property
    def anew_s(self) -> float:
        """What its requests would wait if it were loaded anew now: for that, and for their texts to be read again."""
        scheduler = self.engine.scheduler
        return self.load_s + scheduler.speeds.reading_s(sum(it.computed for it in [*scheduler.running]))

    def interrupt(self, error: DaemonError) -> None:
        """End all its requests with `error`, even in a step that waits for a disk. It answers nothing after that."""
        self.engine.fail_all(error)
        self.executor.store.close()
        for template in [*self._templates.values()]:
            if isinstance(template, ChatTemplate):
                template.close()

    def release(self, budget: Budget, keep_s: float = FLUSH_LIMIT_S) -> None:
        """End a step under way, keep its KV on disk, which takes `keep_s` at most, and give the budget back. The memory
        is freed with the last reference to the model. Idempotent."""
        self.executor.store.close()
        self.engine.close(keep_s)
        self.main.close()
        self.main.keep_uses()
        release(self.name, budget)

    def stage(self) -> Stage | None:
        """What its requests wait for just now; None if they wait for neither disk nor other machines. Any thread may
        call it."""
        if self.engine.lost is not None:
            return Stage(doing="regrouping", done=0, total=0)
        stage = self.executor.store.stage()
        if stage is None or not self.engine.busy:
            return None
        return Stage(doing="reading", done=stage.done, total=stage.blocks, bytes_per_s=stage.bytes_per_s)

    def status(self) -> ModelStatus:
        scheduler = self.engine.scheduler
        stage = self.executor.store.stage()
        read_bytes_per_s = max(self.main.read_bytes_per_s, stage.best_bytes_per_s if stage else 0.0)
        long = f", long steps by {self.ranks} ranks" if self.main.share is not None else ""
        drafts = f", drafts by {self.draft_path.name}" if self.draft_path else ""
        group = self.main.group
        keeping = [self.plan, *(group.plans if group and not group.prompts_only else ())]  # KV
        totals, cache, disk = scheduler.totals, scheduler.cache, self.engine.rank.disk
        usual = self.main.expectation.usual
        learnt = scheduler.speeds.cost
        return ModelStatus(
            name=self.name,
            path=str(self.checkpoint.path),
            family=self.checkpoint.spec.family,
            quant=self.quant,
            parameters_bytes=self.main.weights_bytes,
            context_tokens=self.plan.context_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used_tokens=cache.used_pages * cache.page_tokens,
            kv_total_tokens=self.plan.kv.tokens,
            plan=self.plan.describe(read_bytes_per_s) + long + drafts,
            chat_template=self.tokenizer.chat_template is not None,
            kv_cached_tokens=cache.cached_pages * cache.page_tokens,
            prompt_tokens_total=totals.prompt_tokens,
            cached_tokens_total=totals.cached_tokens,
            preemptions_total=totals.preemptions,
            drafted_tokens_total=totals.drafted_tokens,
            accepted_tokens_total=totals.accepted_tokens,
            pinned_bytes=self.plan.pinned_bytes + self.plan.expert_bytes,
            streamed_bytes=self.plan.streamed_bytes,
            window_bytes=self.plan.window_bytes,
            stage=self.stage(),
            step_s=self.plan.step_s(read_bytes_per_s),
            kv_disk_bytes=_on_all(disk.nbytes, keeping) if disk else 0,
            kv_disk_pages_read_total=disk.pages_read if disk else 0,
            kv_disk_pages_written_total=disk.pages_written if disk else 0,
            warnings=self.warnings,
            context_limit_tokens=self.checkpoint.spec.longest,
            ranks=self.ranks,
            device=self.plan.device,
            device_bytes=self.plan.device_bytes,
            device_why=self.plan.why,
            rank_bytes=self.main.rank_bytes,
            machines=list(group.names) if group else [],
            machines_why=self.main.machines_why,
            sums=group.sums if group else "",
            kv_disk_why=self.main.kv_trouble,
            predicted_tokens_per_s=usual.tokens_per_s if usual else 0.0,
            predicted_band=list(usual.band) if usual else [],
            measured_tokens_per_s=1 / learnt.seconds(1) if learnt.measured else 0.0,
            tried=rival.said if (rival := scheduler.speeds.rival) else "",
        )

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's template, or ChatML if it has none; it is compiled once. Raises TemplateError and Overloaded."""
        return self._template(self.tokenizer.chat_template or "")

    @property
    def tool_template(self) -> ChatTemplate:
        """The template for conversations with tools, where the model has one of its own for these. Raises as above."""
        source = self.tokenizer.chat_templates.get(TOOL_TEMPLATE)
        return self.chat_template if source is None else self._template(source)

    def _template(self, source: str) -> ChatTemplate:
        with self._compiling:
            if source not in self._templates:
                try:
                    self._templates[source] = self._compiled(source)
                except TemplateError as error:
                    self._templates[source] = error
            template = self._templates[source]
        if isinstance(template, TemplateError):
            raise template.with_traceback(None)
        return template

    def _compiled(self, source: str) -> ChatTemplate:
        def spelled(token: int | None) -> str:
            return "" if token is None else self.tokenizer.id_to_token(token)

        bos, eos = spelled(self.tokenizer.bos_id), spelled(self.tokenizer.eos_id)
        return ChatTemplate(source, bos, eos, of=self.name)

    def warm_up(self) -> None:
        """Compile the chat template, so that the first conversation does not wait for it. What is wrong with it is told
        to who uses it."""
        with contextlib.suppress(ModelError):
            _ = self.chat_template


def _on_all(kv_bytes: int, plans: Ordered[Plan]) -> int:
    """What as many pages take on all ranks as take `kv_bytes` on rank 0."""
    own, *others = (plan.kv.nbytes // plan.kv.pages for plan in plans)
    return kv_bytes + kv_bytes // own * sum(others)


def release(name: str, budget: Budget) -> None:
    """Give back the bytes that a model and its draft model hold."""
    for purpose in _purposes(name):
        budget.release(purpose)


def release_main(name: str, budget: Budget) -> None:
    """Give back what a model holds, but not what its draft model does, which stays when it is loaded anew."""
    budget.release(_purposes(name)[0])


def _purposes(name: str) -> tuple[str, str]:
    return f"model {name}", f"draft for {name}"
