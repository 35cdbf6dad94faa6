"""What a caller waits for: a collective or a message that ends, whole or broken.

An exception on a future for which DDP's reducer waits ends the process, and so may one that is
raised inside backward. There a broken operation therefore ends as if it had succeeded, its results
*poisoned* (not a number, or zero), and `mnemo.comm.check` raises before the optimizer's step.
Everywhere else waiting raises `GroupBrokenError`.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from mnemo.comm.c10d import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mnemo.comm.operation import Operation
    from mnemo.errors import GroupBrokenError

_FOREVER = timedelta(0)


_hooks = threading.local()


def in_backward() -> bool:
    """Whether autograd called, or awaits what this thread does, so that nothing may be raised."""
    return torch._C._current_graph_task_id() != -1 or getattr(_hooks, "of_backward", False)


def poison(tensors: Iterable[torch.Tensor]) -> None:
    """Make it impossible to mistake these for a result."""
    with torch.inference_mode():
        for each in tensors:
            if each.is_floating_point() or each.is_complex():
                each.fill_(float("nan"))
            else:
                each.zero_()


class Collective(Work):
    """A collective, run by a thread of the group.

    Args:
        operation: What is to be done.
        results: What `get_future` is to hold, as gloo has it.
        written: The tensors of the caller that it writes to: poisoned if it breaks.
    """

    def __init__(
        self, operation: Operation, results: list[Any], written: list[torch.Tensor]
    ) -> None:
        super().__init__()
        self.operation: Operation | None = operation
        self._results = results
        self._written = written
        self._grad, self._backward = torch.is_grad_enabled(), in_backward()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._future: torch.futures.Future[Any] | None = None
        self._error: Exception | None = None
        self._broken: GroupBrokenError | None = None

    def whole(self, results: list[Any] | None = None) -> None:
        """It is; ``results`` are other tensors than the caller's, where gloo makes such."""
        if results is not None:
            self._results = results

    def refused(self, error: Exception) -> None:
        """It was not begun, because it was called wrongly."""
        self._error = error

    def gave_up(self, why: GroupBrokenError) -> None:
        """It will not be whole. No communicator has the tensors any more."""
        poison(self._written)
        self._broken = why

    def end(self) -> bool:
        """Let waiting callers go on, after one of the above.

        Returns:
            Whether `settle` is to follow.
        """
        self._written, self.operation = [], None
        with self._lock:
            self._done.set()
            return self._future is not None

    def settle(self) -> None:
        """Give the future its value; what users hang on it runs in here, and may wait for more."""
        assert self._future is not None
        before, _hooks.of_backward = getattr(_hooks, "of_backward", False), self._backward
        try:
            with torch.set_grad_enabled(self._grad):  # as in the caller's thread
                if self._error is not None:
                    self._future.set_exception(self._error)  # type: ignore[arg-type]
                else:
                    self._future.set_result(self._results)
        finally:
            _hooks.of_backward = before

    def wait(self, timeout: timedelta = _FOREVER) -> bool:
        """Wait for the end.

        Raises:
            GroupBrokenError: It broke, and this is not within backward.
            TimeoutError: It has not ended in time; it goes on.
        """
        if not self._done.wait(timeout.total_seconds() if timeout > _FOREVER else None):
            msg = f"the collective did not end within {timeout.total_seconds():g} s"
            raise TimeoutError(msg)
        if self._error is not None:
            raise self._error
        if self._broken is not None and not in_backward():
            raise self._broken.again()
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """What holds the results; it never fails because a peer does."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._future = torch.futures.Future()
            done = self._done.is_set()
        if done:
            self.settle()
        return self._future

    def is_completed(self) -> bool:
        """Whether it has ended, in any way."""
        return self._done.is_set()

    def is_success(self) -> bool:
        """Whether it has ended whole."""
        return self._done.is_set() and self._error is None and self._broken is None

    def result(self) -> list[Any]:
        """The results, after `wait`."""
        return self._results


class Delegated(Work):
    """A message, or an operation of NCCL: it runs by itself, waiting is the inner work's.

    Args:
        inner: The communicator's work; dropped once it was waited for.
        results: As of `Collective`.
        written: As of `Collective`.
        broken: What has become of the group; called with the error where waiting fails.
    """

    def __init__(
        self,
        inner: Work,
        results: list[Any],
        written: list[torch.Tensor],
        broken: Callable[[Exception | None], GroupBrokenError | None],
    ) -> None:
        super().__init__()
        self._inner: Work | None = inner
        self._results = results
        self._written = written
        self._broken = broken
        self._source = -1

    def wait(self, timeout: timedelta = _FOREVER) -> bool:
        """Wait for the end.

        Raises:
            GroupBrokenError: It broke, and this is not within backward.
        """
        inner, why, error = self._inner, None, None
        if inner is None:
            return True
        try:
            whole = inner.wait(timeout) if timeout > _FOREVER else inner.wait()
        except RuntimeError as caught:
            whole, error = False, caught
        if whole:
            self._source = inner._source_rank() if self._written else -1
        else:
            why = self._broken(error)
        # With it goes the buffer through which it could still write.
        self._inner = inner = None
        del error
        if why is not None:
            poison(self._written)
            if not in_backward():
                raise why.again()
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """NCCL's, which is done once the operation is in its stream."""
        future: torch.futures.Future[Any]
        if self._inner is not None:
            future = self._inner.get_future()
        else:
            future = torch.futures.Future()
            future.set_result(self._results)
        return future

    def is_completed(self) -> bool:
        """Whether it has ended, or was waited for."""
        return self._inner is None or self._inner.is_completed()

    def source_rank(self) -> int:
        """Who sent what was received from anybody."""
        return self._source

    _source_rank = source_rank


class Given(Work):
    """What was asked of a group that is broken already, within backward."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(results)

    def wait(self, timeout: timedelta = _FOREVER) -> bool:
        """It is over."""
        del timeout
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """With the poisoned results."""
        return self._future

    def is_completed(self) -> bool:
        """It is."""
        return True
