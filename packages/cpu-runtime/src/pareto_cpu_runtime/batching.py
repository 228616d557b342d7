"""Continuous batching: requests join and leave a running batch, token by token.

Every step runs one call of the native program: a token of each request that is under way, and as much of the prompts of
those that are joining as there are rows left. A row's result does not depend on the rows beside it, so a request gets
the tokens that it would get alone.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pareto_core.errors import ConfigError, DataError, UnsupportedError
from pareto_cpu_runtime.sampling import Chooser, Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pareto_cpu_runtime.runtime import Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue.

    ``tokens`` the prompt; ``stop_tokens`` end the text and are part of it; ``stop`` is asked after every token, with
    the new tokens so far, whether the text ends there.
    """

    tokens: Sequence[int]
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop: Callable[[Sequence[int]], bool] | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)


class Handle:
    """A submitted request. Iterating over it gives its tokens as they come, and drives the engine meanwhile."""

    def __init__(self, engine: Engine, request: Request, on_token: Callable[[int], None] | None) -> None:
        self.request = request
        self.tokens: list[int] = []
        #: what ended the text where finish_reason is "error": a callback's own exception, or a ParetoError
        self.error: Exception | None = None
        #: why the text ended: "stop", "length", "cancelled" or "error"; None while it goes on
        self.finish_reason: str | None = None
        self._engine, self._on_token = engine, on_token
        #: the prompt and the new tokens; the first ``_fed`` of them are in the cache
        self._text = np.array(request.tokens, dtype=np.int32)
        self._fed = 0
        self._slot: int | None = None
        self._chooser = Chooser(request.sampling)

    @property
    def done(self) -> bool:
        """Whether no token will come any more."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """End the request; the tokens that it has stay."""
        self._engine._finish(self, "cancelled")

    def result(self) -> list[int]:
        """Run the engine until this request is done, and return its new tokens.

        Raises what ended this request: an exception of its own callbacks, or the model's or runtime's error.
        """
        while not self.done and self._engine.step():
            continue
        if self.error is not None:
            raise self.error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        given, ended = 0, False
        while not ended:
            # Asked before the tokens are looked at: another thread may bring the last ones meanwhile.
            ended = self.done
            while given < len(self.tokens):
                yield self.tokens[given]
                given += 1
            if not ended:
                self._engine.step()
        if self.error is not None:
            raise self.error

    def _seen(self) -> list[int]:
        return [] if self.request.sampling.repetition_penalty == 1.0 else self._text.tolist()

    def _take(self, logits: NDArray[np.float32]) -> str | None:
        """Choose the next token; returns the reason where the text ends with it."""
        request = self.request
        banned = request.stop_tokens if len(self.tokens) < request.min_new_tokens else ()
        token = self._chooser.choose(logits, self._seen(), banned)
        self.tokens.append(token)
        if self._on_token is not None:
            self._on_token(token)
        if token in request.stop_tokens or (request.stop is not None and request.stop(self.tokens)):
            return "stop"
        return "length" if len(self.tokens) >= request.max_new_tokens else None


class Engine:
    """Runs requests of one runtime together. Any thread may submit, step, cancel or wait; one steps at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.RLock()
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle] = []

    def submit(self, request: Request, on_token: Callable[[int], None] | None = None) -> Handle:
        """Add a request; it joins as soon as a slot is free.

        ``on_token`` is called with each token; what it or ``request.stop`` raises ends this request, and is raised by
        its handle alone. Raises :class:`DataError` for a prompt that is empty, not one row of integers, holds a token
        outside the vocabulary, or leaves no room in the cache for the tokens asked for: this request is refused, the
        others go on.
        """
        self._check(request)
        handle = Handle(self, request, on_token)
        with self._lock:
            self._waiting.append(handle)
        return handle

    def _check(self, request: Request) -> None:
        runtime = self._runtime
        if request.max_new_tokens < 1:
            raise ConfigError("Request", "max_new_tokens", request.max_new_tokens, "must be at least 1")
        try:
            tokens = np.asarray(request.tokens)
        except ValueError as error:
            raise DataError(f"a prompt must be one row of tokens: {error}") from error
        runtime.check_tokens(tokens)
        # The last token is chosen, not fed: it takes no place in the cache.
        needed = len(tokens) + request.max_new_tokens - 1
        if needed > runtime.max_length:
            raise DataError(
                f"{len(tokens)} prompt tokens and {request.max_new_tokens} new ones do not fit the cache of "
                f"{runtime.max_length} tokens: shorten the request or make the runtime with a larger max_length"
            )

    def step(self) -> bool:
        """Run one call; returns whether any request was there to be served.

        What interrupts a step, such as Ctrl-C, leaves the requests as they were before it, but for one whose callback
        it came from: that one ends.
        """
        with self._lock:
            self._admit()
            if not self._running:
                if self._waiting:
                    raise UnsupportedError("no slot of the cache is free, and no request of this engine holds one")
                return False
            self._run_once()
            return True

    def run(self) -> None:
        """Step until every request is done."""
        while self.step():
            continue

    def _admit(self) -> None:
        while self._waiting:
            slot = self._runtime.slots.take()
            if slot is None:
                return
            handle = self._waiting.popleft()
            handle._slot = slot
            self._running.append(handle)

    def _run_once(self) -> None:
        feeds = self._plan()
        if not feeds:
            raise UnsupportedError("a callback waits for requests of the very step that it is called in: wait outside")
        try:
            ready, logits = self._forward(feeds)
        except Exception as error:
            failure = f"the batch that this request was in could not be run: {error}"
            for handle, _, _ in feeds:
                self._finish(handle, "error", UnsupportedError(failure))
            raise
        for handle, _, end in feeds:
            handle._fed = end
        try:
            for row, handle in enumerate(ready):
                self._advance(handle, logits[row])
        except BaseException:
            # Those that have not got their token yet feed their last one again.
            for handle in ready:
                handle._fed = min(handle._fed, len(handle._text) - 1)
            raise

    def _forward(self, feeds: list[tuple[Handle, int, int]]) -> tuple[list[Handle], NDArray[np.float32]]:
        """Run what is fed; returns the requests whose whole text is in the cache now, and their logits."""
        tokens = np.concatenate([handle._text[start:end] for handle, start, end in feeds])
        sizes = [end - start for _, start, end in feeds]
        slots = np.repeat(np.array([handle._slot for handle, _, _ in feeds], dtype=np.int32), sizes)
        positions = np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in feeds])
        ends = np.cumsum(sizes) - 1
        whole = [index for index, (handle, _, end) in enumerate(feeds) if end == len(handle._text)]
        logits = self._runtime.forward(tokens, slots, positions, ends[whole].astype(np.int32))
        return [feeds[index][0] for index in whole], logits

    def _plan(self) -> list[tuple[Handle, int, int]]:
        """What each request feeds: (handle, first, last) of its tokens. Those under way come first."""
        room = self._runtime.max_rows
        under_way = [handle for handle in self._running if len(handle._text) - handle._fed == 1]
        joining = [handle for handle in self._running if len(handle._text) - handle._fed > 1]
        feeds = []
        for handle in [*under_way, *joining]:
            size = min(len(handle._text) - handle._fed, room)
            if size:
                feeds.append((handle, handle._fed, handle._fed + size))
                room -= size
        return feeds

    def _advance(self, handle: Handle, logits: NDArray[np.float32]) -> None:
        """Give the request its next token; what its callbacks raise ends it, and is kept for its handle."""
        if handle.done:
            return
        try:
            reason = handle._take(logits)
        except Exception as error:
            self._finish(handle, "error", error)
            return
        except BaseException as error:
            self._finish(handle, "error", UnsupportedError(f"interrupted by {type(error).__name__}"))
            raise
        handle._text = np.append(handle._text, np.int32(handle.tokens[-1]))
        if reason is not None:
            self._finish(handle, reason)

    def _finish(self, handle: Handle, reason: str, error: Exception | None = None) -> None:
        with self._lock:
            if handle.done:
                return
            handle.finish_reason, handle.error = reason, error
            if handle in self._waiting:
                self._waiting.remove(handle)
            if handle in self._running:
                self._running.remove(handle)
            if handle._slot is not None:
                self._runtime.slots.give(handle._slot)
                handle._slot = None
