"""Reading, computing and writing at the same time, within a limit of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Input = TypeVar("Input")
Output = TypeVar("Output")

# Finished reads that wait for the computation, and finished computations that wait for the disk. One of each hides the
# disk; a second absorbs a large tensor after small ones.
DEPTH = 2


class _StoppedError(Exception):
    """Another part of the pipeline has ended; nothing to report."""


class _Flow:
    """What the three parts share, under one condition, so that any of them can end the others."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.stopped = False

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """With ``changed`` held."""
        self.changed.wait_for(lambda: self.stopped or ready())
        if self.stopped:
            raise _StoppedError

    def stop(self, failure: BaseException | None = None) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.stopped = True
            self.changed.notify_all()


class _Channel(Generic[Item]):
    """A queue of at most DEPTH values whose two ends wake up when the flow is stopped."""

    def __init__(self, flow: _Flow) -> None:
        self._flow = flow
        self._values: deque[Item] = deque()

    def put(self, value: Item) -> None:
        with self._flow.changed:
            self._flow.wait_until(lambda: len(self._values) < DEPTH)
            self._values.append(value)
            self._flow.changed.notify_all()

    def take(self) -> Item:
        with self._flow.changed:
            self._flow.wait_until(lambda: bool(self._values))
            value = self._values.popleft()
            self._flow.changed.notify_all()
            return value


class _Budget:
    """Bytes in use; one item always fits, so that the largest is never refused."""

    def __init__(self, flow: _Flow, limit: int) -> None:
        self._flow, self._limit = flow, limit
        self._used = self._holders = 0

    def take(self, size: int) -> None:
        with self._flow.changed:
            self._flow.wait_until(lambda: self._holders == 0 or self._used + size <= self._limit)
            self._used += size
            self._holders += 1

    def give(self, size: int) -> None:
        with self._flow.changed:
            self._used -= size
            self._holders -= 1
            self._flow.changed.notify_all()


def run(
    items: Sequence[Item],
    read: Callable[[Item], Input],
    compute: Callable[[Item, Input], Output],
    write: Callable[[Item, Output], None],
    cost: Callable[[Item], int],
    limit: int,
) -> None:
    """``write(item, compute(item, read(item)))`` for every item, in order.

    ``read`` and ``write`` run in a thread each, ``compute`` in the caller's, where signals arrive. What any of them
    raises ends the others and is raised here, after a write that has begun is done.

    Args:
        cost: bytes that an item occupies from before it is read until it is written; 0 for one that needs none.
        limit: bytes of all items under way, unless a single one needs more.
    """
    flow = _Flow()
    budget = _Budget(flow, limit)
    inputs: _Channel[Input] = _Channel(flow)
    outputs: _Channel[Output] = _Channel(flow)

    # One value per function call: a variable of the loop would keep the last tensor alive while it waits for the next.
    def read_one(item: Item) -> None:
        if cost(item):
            budget.take(cost(item))
        inputs.put(read(item))

    def compute_one(item: Item) -> None:
        outputs.put(compute(item, inputs.take()))

    def write_one(item: Item) -> None:
        write(item, outputs.take())

    def reader() -> None:
        for item in items:
            read_one(item)

    def writer() -> None:
        for item in items:
            write_one(item)
            if cost(item):
                budget.give(cost(item))

    def guarded(part: Callable[[], None]) -> None:
        try:
            part()
        except _StoppedError:
            pass
        except BaseException as error:
            flow.stop(error)

    # Daemons: a process that must end does not wait for a disk that hangs.
    threads = [threading.Thread(target=guarded, args=(part,), daemon=True) for part in (reader, writer)]
    for thread in threads:
        thread.start()
    try:
        for item in items:
            compute_one(item)
        _join(threads)
    except _StoppedError:
        pass
    except BaseException as error:
        flow.stop(error)
    finally:
        flow.stop()
        _join(threads)
    if flow.failure is not None:
        raise flow.failure


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
