"""An answer: turns what happens to one sequence into the messages of one request.

It detokenises, looks for stop strings and repetition, and reports usage and timings at the end. It emits exactly one
terminal message. It knows nothing of batches or sockets; `emit` must not block.
"""

from __future__ import annotations

from pathlib import Path

from shoal.comm.messages import (
    Accepted,
    Done,
    FinishReason,
    Timings,
    Token,
    TokenLogprob,
    Usage,
)
from shoal.engine.sequence import Emitted, Ended, Failed, Queued, Sequence, SequenceEvent
from shoal.models.errors import LogitsError, TokenizerError
from shoal.models.sampling import Sampled
from shoal.models.tokenizer.detokenizer import Detokenizer
from shoal.models.tokenizer.repetition import Repetition
from shoal.models.tokenizer.stop_strings import StopMatcher
from shoal.models.tokenizer.tokenizer import Tokenizer

from .backend import Emit
from .error_codes import translated


class Answer:
    """The messages of one request. `over`: the terminal one has been emitted. `path`: where the model's files are."""

    def __init__(
        self,
        emit: Emit,
        model: str,
        tokenizer: Tokenizer,
        prompt: list[int],
        *,
        stop: list[str],
        logprobs: bool,
        context_tokens: int,
        path: Path = Path(),
        repetition: Repetition | None = None,
    ) -> None:
        self._path = path
        self.over = False
        self._emit = emit
        self._model = model
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_ids=prompt)
        self._matcher = StopMatcher(stop)
        self._logprobs = logprobs
        self._context_tokens = context_tokens
        self._prompt_tokens = len(prompt)
        self._completion_tokens = 0
        self._accepted_tokens = 0  # of these, guessed right
        self._last_token_s = 0.0
        self._repetition = repetition
        # By a stop string or by repetition: the answer is complete, whatever the sequence still does.
        self._stopped: FinishReason | None = None

    def take(self, event: SequenceEvent) -> bool:
        """Emit the messages of an event. True when the answer is complete, so that the sequence may end."""
        match event:
            case Queued():
                self._emit(Accepted(model=self._model, prompt_tokens=self._prompt_tokens))
            case Emitted(_, sampled, at_s) if not self._stopped:
                self._last_token_s = at_s
                before = self._completion_tokens
                found = any(map(self._say, sampled))
                self._accepted_tokens += self._completion_tokens - before - 1  # the first was not guessed
                return found
            case Ended(sequence, reason):
                self._finish(self._stopped or reason, sequence)
            case Failed(sequence, error):
                if self._stopped:
                    self._finish(self._stopped, sequence)
                else:
                    self.fail(error)
        return False

    def fail(self, error: Exception) -> None:
        """Emit `error`, unless the answer is over."""
        if not self.over:
            self.over = True
            what = str(self._path) if isinstance(error, LogitsError | TokenizerError) else ""
            self._emit(translated(error, what).to_message())

    def _say(self, sampled: Sampled) -> bool:
        """Emit the text of a token. True when the answer is complete with it."""
        self._completion_tokens += 1
        piece = self._detokenizer.push(sampled.token_id)
        text, found = self._matcher.push(piece)
        self._emit(Token(text=text, ids=[sampled.token_id], logprobs=self._describe(sampled)))
        if found:
            self._stopped = "stop"
        elif self._repetition is not None and self._repetition.push(sampled.token_id, len(piece.encode())):
            self._stopped = "repetition"
        return self._stopped is not None

    def _finish(self, reason: FinishReason, sequence: Sequence) -> None:
        """Emit the text that was held back, then `done`."""
        if self._stopped != "stop":
            text, hit = self._matcher.push(self._detokenizer.flush())
            if not hit:
                text += self._matcher.flush()
            if text:
                self._emit(Token(text=text, ids=[]))
        accepted = sequence.accepted_tokens
        if self._stopped:  # then the engine may be further already
            accepted = min(accepted, self._accepted_tokens)
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=sequence.cached_tokens,
            drafted_tokens=sequence.drafted_tokens,
            accepted_tokens=accepted,
        )
        timings = self._timings(sequence)
        self.over = True  # not before: what fails until here ends the answer with an error
        context = self._context_tokens
        self._emit(Done(finish_reason=reason, usage=usage, timings=timings, context_tokens=context))

    def _timings(self, sequence: Sequence) -> Timings:
        times = sequence.times
        if not times.first_token_s:
            return Timings(preemptions=sequence.preemptions)
        computed = sequence.prompt_tokens - sequence.cached_tokens
        prefill_s = times.first_token_s - times.admitted_s
        # When a stop string is found, the engine may be a step further already.
        last_token_s = self._last_token_s if self._stopped else times.last_token_s
        decode_s = last_token_s - times.first_token_s
        return Timings(
            queue_s=times.admitted_s - times.arrived_s,
            ttft_s=times.first_token_s - times.arrived_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            stall_s=times.stall_s,
            prefill_tokens_per_s=computed / prefill_s if prefill_s > 0 else 0.0,
            decode_tokens_per_s=(self._completion_tokens - 1) / decode_s if decode_s > 0 else 0.0,
            preemptions=sequence.preemptions,
        )

    def _describe(self, sampled: Sampled) -> list[TokenLogprob]:
        if not self._logprobs:
            return []
        text, token_bytes = self._spelled(sampled.token_id)
        spelled = [self._spelled(token) for token, _ in sampled.top]
        return [
            TokenLogprob(
                id=sampled.token_id,
                text=text,
                logprob=sampled.logprob,
                top=[
                    (token, text, logprob)
                    for (token, logprob), (text, _) in zip(sampled.top, spelled, strict=True)
                ],
                token_bytes=token_bytes,
                top_bytes=[data for _, data in spelled] if any(data for _, data in spelled) else [],
            )
        ]

    def _spelled(self, token: int) -> tuple[str, bytes | None]:
        """A token's text, and its bytes if they are not those of the text."""
        if self._tokenizer.is_special(token):
            return self._tokenizer.decode([token]), None
        data = self._tokenizer.token_bytes(token)
        text = data.decode(errors="replace")
        return text, None if text.encode() == data else data
