"""Shoal's worker: one loaded model whose engine is stepped by hand, so that sequences can pause between rounds.

Measures what a node computes, sampling and detokenising included; without its thread, queue or sockets.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from engines import worker

from shoal import kernels
from shoal.comm.home import Home
from shoal.comm.messages import ChatMessage, Generate, Sampling, Token
from shoal.daemon.answer import Answer
from shoal.daemon.backend import Event
from shoal.daemon.config import NodeConfig
from shoal.daemon.installed import package_version
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.memory import budget_of
from shoal.daemon.request import answer_of, chat_text, sequence_of
from shoal.devices.device_names import CPU
from shoal.engine.learn.pacing import SLOWDOWN
from shoal.engine.sequence import Sequence
from shoal.kernels.arrays import Floats
from shoal.models.sampling import Sampled

GREEDY = Sampling(temperature=0.0)


class Dictated:
    """A sampler that returns these tokens, whatever the logits are."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def sample(self, logits: Floats) -> Sampled:
        return Sampled(next(self._ids))


class Shoal:
    """The engine of `worker.Engine`."""

    def load(
        self,
        model: str,
        context: int,
        streams: int,
        threads: int,
        memory: int = 0,
        guesses: int = 0,
        device: str = CPU,
        chunk: int = 256,
        slowdown: float = SLOWDOWN,
        kv_tokens: int | None = None,
    ) -> dict[str, Any]:
        """`guesses` is how many tokens a step may guess ahead. It is 0 by default because peers guess nothing. `device`
        computes what fits there; `chunk` tokens of prompts are in a step, at most. `kv_tokens`: of all streams
        together; None: as memory allows."""
        kernels.set_threads(threads)
        config = NodeConfig(
            threads=threads,
            context_tokens=context,
            max_sequences=streams,
            max_queue=max(64, streams),
            memory_bytes=memory or None,
            max_guesses=guesses,
            device=device,
            chunk_tokens=chunk,
            slowdown=slowdown,
            kv_tokens=kv_tokens,
        )
        assembly = Assembly(budget_of(memory or None), Packs(Home.from_env()))
        self._model = assembly.load("bench", Path(model), config)
        self._answers: dict[Sequence, Answer] = {}
        self._counts: list[int] = []
        return {
            "version": package_version(),
            "kernels": kernels.home(),
            "plan": self._model.plan.describe(),
            "streamed_bytes": self._model.plan.streamed_bytes,
        }

    def begin(self, streams: int, tokens: int, seed: int, new: int = 0) -> dict[str, float]:
        """`new`: tokens of each answer, at most, by which it is admitted; 0: as many as the context has."""
        vocab = self._model.checkpoint.spec.vocab
        return self._begin(worker.prompts(streams, tokens, vocab, seed), new=new)

    def begin_chat(self, text: str) -> dict[str, float]:
        """Prefill a conversation that begins with these tokens, up to its first new token."""
        prompt = chat_text(self._model, [ChatMessage(role="user", content=text)])
        return self._begin([self._model.tokenizer.encode(prompt, add_special=False)])

    def dictate(self, prompt: list[int], answer: list[int]) -> dict[str, float]:
        return self._begin([prompt], Dictated(answer))

    def _begin(
        self, prompts: list[list[int]], sampler: Dictated | None = None, new: int = 0
    ) -> dict[str, float]:
        most = new or self._model.plan.context_tokens
        started_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self._counts.append(0)
            request = Generate(prompt_tokens=prompt, max_tokens=most, ignore_eos=True, sampling=GREEDY)
            model, arrived_s = self._model, self._model.clock()
            sequence = sequence_of(model, request, prompt, client="", arrived_s=arrived_s)
            sequence.sampler = sampler or sequence.sampler  # type: ignore[assignment]
            note = functools.partial(self._note, index)
            self._answers[sequence] = answer_of(model, request, prompt, note)
            model.engine.submit(sequence)
        while not all(self._counts):
            self._step()
        return {"seconds": time.perf_counter() - started_s, "tokens": sum(map(len, prompts))}

    def advance(self, tokens: int) -> dict[str, float]:
        before, goal, steps = sum(self._counts), min(self._counts) + tokens, 0
        started_s = time.perf_counter()
        while min(self._counts) < goal:
            self._step()
            steps += 1
        seconds = time.perf_counter() - started_s
        return {"seconds": seconds, "tokens": sum(self._counts) - before, "steps": steps}

    def end(self) -> None:
        for sequence in self._answers:
            self._model.engine.end(sequence, "cancelled")
        self._model.engine.events()
        self._answers, self._counts = {}, []

    def _step(self) -> None:
        if not self._model.engine.step():
            raise RuntimeError("the engine has nothing to do: a sequence ended early")
        for event in self._model.engine.events():
            self._answers[event.sequence].take(event)

    def _note(self, index: int, event: Event) -> None:
        if isinstance(event, Token):
            self._counts[index] += len(event.ids)


if __name__ == "__main__":
    worker.serve(Shoal())
