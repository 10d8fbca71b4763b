"""A thread that decodes requests of any placements side by side on one copy of the weights.

Sequences take turns: one token each, or one stretch of the prompt. Nothing is batched, so a sequence gets
exactly what it gets alone, whoever else is there.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from gearshift.serve.catalog import RequestError
from gearshift.serve.embedded.generation import Piece, Wanted
from gearshift.serve.embedded.sequence import RunningSequence
from gearshift.serve.embedded.text import Decode
from gearshift.supernet import SupernetForCausalLM

Emit = Callable[[Piece | RequestError], None]

_log = logging.getLogger(__name__)


class BusyError(RequestError):
    """There is no more room to wait."""

    status = 503
    type = "server_error"
    code = "overloaded"
    headers: ClassVar[Mapping[str, str]] = MappingProxyType({"Retry-After": "1"})


class StoppedError(RequestError):
    """The server is going down."""

    status = 503
    type = "server_error"
    code = "stopped"


class FailedError(RequestError):
    """A request met a bug; the others go on."""

    status = 500
    type = "server_error"
    code = "failed"


@dataclass(frozen=True)
class EngineSettings:
    """How much the engine takes on.

    Attributes:
        max_running: sequences decoded side by side, each with a cache of its own.
        max_waiting: sequences that wait for their turn behind them.
        prefill_tokens: tokens of a prompt that are read in one turn.
    """

    max_running: int = 16
    max_waiting: int = 64
    prefill_tokens: int = 128


@dataclass(frozen=True)
class Load:
    """Sequences that wait, and those that have their turns."""

    waiting: int
    running: int


class Job:
    """The sequences of one request.

    Attributes:
        ended: nobody waits for it any more.
    """

    def __init__(self, sequences: Sequence[RunningSequence], emit: Emit) -> None:
        self.sequences = sequences
        self.ended = False
        self._emit = emit

    def give(self, outcome: Piece | RequestError) -> None:
        """Hand on what came of a turn; an error is the last."""
        if not self.ended:
            finished = all(sequence.finished for sequence in self.sequences)
            self.ended = finished or isinstance(outcome, RequestError)
            self._emit(outcome)


_Turn = tuple[Job, RunningSequence]


class Engine:
    """Takes requests from any thread, and runs them in its own.

    Args:
        model: on its device.
        decode: from tokens to text; only the engine's thread calls it.
        settings: how much to take on.
    """

    def __init__(
        self, model: SupernetForCausalLM, decode: Decode, settings: EngineSettings | None = None
    ) -> None:
        self.settings = settings or EngineSettings()
        self._model = model
        self._decode = decode
        self._waiting: deque[_Turn] = deque()
        self._running: deque[_Turn] = deque()
        self._in_turn: _Turn | None = None
        self._stopping = False
        # Guards all of the above, and wakes the thread.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gearshift-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> Load:
        """What it has to do at the moment."""
        with self._changed:
            return Load(len(self._waiting), len(self._running) + (self._in_turn is not None))

    def submit(self, wanted: Sequence[Wanted], emit: Emit) -> Job:
        """Queue the sequences of a request.

        Args:
            wanted: the sequences.
            emit: called in the engine's thread, must not block and must not raise: with every piece, or once
                with an error, after which nothing follows.

        Raises:
            BusyError: too many sequences are waiting.
            RequestError: it has more sequences than can ever wait.
            StoppedError: the engine was closed.
        """
        if len(wanted) > self.settings.max_waiting:
            raise RequestError(
                f"{len(wanted)} sequences in one request (prompts times n); expected at most "
                f"{self.settings.max_waiting}",
                "n",
            )
        job = Job([RunningSequence(one, self._model, self._decode) for one in wanted], emit)
        with self._changed:
            if not self.alive:
                raise StoppedError("the server is going down; try again when it is back")
            waiting = len(self._waiting)
            free = self.settings.max_running - len(self._running) - (self._in_turn is not None)
            if waiting + len(wanted) > self.settings.max_waiting + max(free, 0):
                raise BusyError(f"{waiting} sequences are waiting already; try again in a moment")
            self._waiting.extend((job, sequence) for sequence in job.sequences)
            self._changed.notify()
        return job

    def abort(self, job: Job) -> None:
        """Give a request up; its caches are freed at once or, if it has its turn, after that."""
        with self._changed:
            job.ended = True
            self._drop(job)

    def stop(self) -> None:
        """Let every request end with an error, and then the thread; does not wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while (turn := self._next()) is not None:
                self._take(*turn)
        finally:
            self._end_all()

    def _next(self) -> _Turn | None:
        """Wait for the next turn; None when the engine is to stop."""
        with self._changed:
            while not self._stopping:
                self._admit(self.settings.max_running)
                if self._running:
                    self._in_turn = self._running.popleft()
                    return self._in_turn
                self._changed.wait()
        return None

    def _admit(self, most: int) -> None:
        """Let sequences that wait have turns, while fewer than ``most`` have."""
        while self._waiting and len(self._running) < most:
            self._running.append(self._waiting.popleft())

    def _take(self, job: Job, sequence: RunningSequence) -> None:
        outcome: Piece | RequestError | None
        try:
            outcome = sequence.advance(self.settings.prefill_tokens)
        except Exception as error:  # whatever it is, it is this request's only
            outcome = _told(error)
        failed = isinstance(outcome, RequestError)
        # Before anything is given out: whoever has the last piece may rely on nothing being held any more.
        with self._changed:
            self._in_turn = None
            if failed:
                self._drop(job)
            if failed or job.ended or sequence.finished:
                sequence.release()
            else:
                # Newcomers go first: they have not had a turn yet.
                self._admit(self.settings.max_running - 1)
                self._running.append((job, sequence))
        if outcome is not None:
            job.give(outcome)

    def _drop(self, job: Job) -> None:
        for queue in (self._waiting, self._running):
            for turn in [turn for turn in queue if turn[0] is job]:
                queue.remove(turn)
                turn[1].release()

    def _end_all(self) -> None:
        with self._changed:
            self._stopping = True
            jobs = {job for job, _ in (*self._waiting, *self._running)}
            jobs |= set() if self._in_turn is None else {self._in_turn[0]}
            for job in jobs:
                self._drop(job)
        for job in jobs:
            job.give(StoppedError("the server was stopped before this request was done"))


def _told(error: Exception) -> RequestError:
    """What the client is told of an exception; the rest is for the log."""
    if isinstance(error, RequestError):
        return error
    # As text: whoever keeps a traceback keeps the caches in its frames.
    _log.error("a request failed\n%s", "".join(traceback.format_exception(error)))
    return FailedError(f"the engine failed on this request ({type(error).__name__}); see the server's log")
