"""Several processes that quantize one model: what they say to each other, and how all of them end.

torchrun starts the processes and numbers them. Rank 0 leads: it plans, writes and prints. The others read the model,
quantize their share and send the results to rank 0, over gloo; they neither write nor print. So there is one writer,
one lock and one journal, as with one process, and whoever continues an unfinished run may have another number of them.

Rank 0 waits for a message from every other rank at all times, and they for one from it: the end of a process closes
its connections, so it is noticed at once, whatever ended it. A machine that vanishes is missed after TIMEOUT.

    rank 0 -> others    go: the plan    halt: stop, somebody failed    bye: end, with this exit code
    others -> rank 0    hello    tensor: a result, its bytes follow    done    failed: why    quiet: halted
    both                ping
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precal_ext.checkpoint import CheckpointError

FRAME = 256  # bytes of a short message, and of the beginning of a long one
CHUNK = 4 << 20  # bytes of a result that are sent at once; rank 0 holds one of them
PING_SECONDS = 60.0
TIMEOUT = datetime.timedelta(minutes=10)  # of silence, after which a rank counts as gone
PATIENCE = 20.0  # seconds for the others to stop; torchrun kills 30 seconds after it has asked for the end
UP, DOWN = 1, 2  # tags of what goes to rank 0 and of what comes from it

Message = dict[str, Any]


class Stopped(BaseException):
    """Rank 0 has ended the work of this rank: nothing to report."""


def launched() -> bool:
    """Whether this process is one of several that torchrun, or something that sets the same variables, has started."""
    return {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and os.environ.get("WORLD_SIZE", "1") != "1"


def together(lead: Callable[[Leader | None], int], follow: Callable[[Follower], None]) -> int:
    """``lead`` in rank 0, or in a process alone; ``follow`` in the others.

    Returns:
        The exit code, which all ranks share.
    Raises:
        What ended ``lead``, or another rank: in rank 0 alone, since one message is enough.
    """
    if not launched():
        return lead(None)
    _share_cores()
    _connect()
    if dist.get_rank() == 0:
        leader = Leader()
        try:
            code = lead(leader)
        except BaseException as error:
            _ignore_signals()
            said = leader.halt(error)
            leader.dismiss(_exit_code(said))
            if said is not error:
                raise said from None
            raise
        leader.dismiss(code)
        return code
    follower = Follower()
    try:
        follow(follower)
        follower.done()
    except BaseException as error:
        _ignore_signals()
        return follower.failed(error)
    finally:
        follower.leave()
    return follower.code


def _share_cores() -> None:
    """The cores of the machine for the processes on it. For more than one, torchrun sets a single thread each where
    nobody has set a number."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def _connect() -> None:
    """In a thread of its own: while C++ waits for the others, signals must arrive."""
    failure: list[BaseException] = []

    def connect() -> None:
        try:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join()
    if failure:
        reason = str(failure[0]).splitlines()[0]
        raise CheckpointError(
            f"rank {os.environ['RANK']} ({socket.gethostname()}): must reach the other processes of this job, got: "
            f"{reason}; with several networks GLOO_SOCKET_IFNAME names the one to use"
        )


def _ignore_signals() -> None:
    """What is left to do takes a moment, and torchrun signals whoever is still there when the first one ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 3 if isinstance(error, (ValueError, TypeError, OSError)) else 1


# ---- messages -------------------------------------------------------------------------------------------------------


def _send(message: Message, rank: int, tag: int) -> None:
    """A frame with the length and the beginning, then the rest. The receiver waits for a frame at any time, so a short
    message is on its way at once, whatever the receiver does."""
    data = json.dumps(message).encode()
    frame = len(data).to_bytes(8, "little") + data[: FRAME - 8]
    _send_bytes(torch.frombuffer(bytearray(frame.ljust(FRAME)), dtype=torch.uint8), rank, tag)
    if len(data) > FRAME - 8:
        _send_bytes(torch.frombuffer(bytearray(data[FRAME - 8 :]), dtype=torch.uint8), rank, tag)


def _receive(rank: int, tag: int) -> Message:
    frame = torch.empty(FRAME, dtype=torch.uint8)
    _receive_bytes(frame, rank, tag)
    length, data = int.from_bytes(frame[:8].numpy().tobytes(), "little"), frame[8:].numpy().tobytes()
    if length > len(data):
        rest = torch.empty(length - len(data), dtype=torch.uint8)
        _receive_bytes(rest, rank, tag)
        data += rest.numpy().tobytes()
    message: Message = json.loads(data[:length])
    return message


def _send_bytes(data: Tensor, rank: int, tag: int) -> None:
    try:
        dist.send(data, rank, tag=tag)
    except RuntimeError as error:
        raise ConnectionError(errno.ECONNRESET, str(error)) from None


def _receive_bytes(data: Tensor, rank: int, tag: int) -> None:
    try:
        dist.recv(data, rank, tag=tag)
    except RuntimeError as error:
        raise ConnectionError(errno.ECONNRESET, str(error)) from None


def _as_message(error: BaseException) -> Message:
    """An error of a rank, for rank 0 to raise."""
    message: Message = {"is": "failed", "kind": "bug", "text": "".join(traceback.format_exception(error))}
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        message.update(kind="signal", code=_exit_code(error))
    elif isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        message.update(kind="system", text=error.strerror, errno=error.errno, file=file)
    elif isinstance(error, (ValueError, TypeError)):
        message.update(kind="refused", text=str(error))
    return message


def _as_error(message: Message, who: str) -> BaseException:
    kind, text = message["kind"], message["text"]
    if kind == "signal":
        return KeyboardInterrupt() if message["code"] == 130 else SystemExit(message["code"])
    if kind == "system":
        return OSError(message["errno"], f"{text} ({who})", message["file"])
    if kind == "refused":
        return CheckpointError(f"{who}: {text}")
    return RuntimeError(f"{who} failed:\n{text}")


def _gone(who: str) -> ConnectionError:
    return ConnectionError(
        errno.ECONNRESET, f"{who} ended without a word: kill -9, no memory left, or a machine that hangs"
    )


def _place() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


class Payload:
    """The bytes of a result on their way: as many pieces as its tensors have, in pieces of CHUNK."""

    def __init__(self, sizes: Sequence[int], rank: int, buffer: Tensor) -> None:
        self._pieces = deque(min(CHUNK, size - at) for size in sizes for at in range(0, size, CHUNK))
        self._rank, self._buffer = rank, buffer

    def take(self, size: int) -> Iterator[memoryview]:
        """The next ``size`` bytes, the size of a tensor; each piece is valid until the next is asked for."""
        while size:
            size -= self._pieces[0]
            yield self._next()

    def drop(self) -> None:
        """Let the rest arrive, so that the next message can."""
        while self._pieces:
            self._next()

    def _next(self) -> memoryview:
        part = self._buffer[: self._pieces[0]]
        _receive_bytes(part, self._rank, UP)
        self._pieces.popleft()
        return part.numpy().data


# ---- rank 0 ---------------------------------------------------------------------------------------------------------

WORKING, IDLE, LOST = "working", "idle", "lost"
Deliver = Callable[[Message, Payload], None]


class Leader:
    """Rank 0's view of the others.

    ``writing`` is held while a result is written: they come from every rank, and there is one writer.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size()
        self.writing = threading.Lock()
        self._changed = threading.Condition()
        self._places = {rank: f"rank {rank}" for rank in range(1, self.size)}
        self._states = dict.fromkeys(self._places, WORKING)
        self._failure: BaseException | None = None
        self._deliver: Deliver | None = None
        self._halting = False
        self._ended = False
        self._buffer = torch.empty(CHUNK, dtype=torch.uint8)
        self._letters: dict[int, queue.SimpleQueue[Message]] = {rank: queue.SimpleQueue() for rank in self._places}
        self._listeners = {rank: _start(self._listen, rank) for rank in self._places}
        self._speakers = [_start(self._speak, rank) for rank in self._places]

    def begin(self, plan: Mapping[str, Any], deliver: Deliver) -> None:
        """Send the others to work; ``deliver(message, payload)`` gets each of their results, ``writing`` held."""
        self._deliver = deliver
        self._tell({"is": "go", "leader": _place(), **plan})

    def check(self) -> None:
        """Raise what ended another rank, if something did."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until the others have done their share."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or WORKING not in self._states.values())
        self.check()

    def halt(self, error: BaseException) -> BaseException:
        """Stop the others; afterwards nothing arrives any more. May be called again.

        Returns:
            What there is to say: ``error``, or who has died, which torchrun answers with signals to the rest.
        """
        with self._changed:
            self._halting = True
        self._tell({"is": "halt"})
        with self._changed:
            self._changed.wait_for(lambda: WORKING not in self._states.values(), PATIENCE)
            for rank, state in self._states.items():
                self._states[rank] = IDLE if state == IDLE else LOST
            lost = [self._places[rank] for rank, state in self._states.items() if state == LOST]
        if self.writing.acquire(timeout=PATIENCE):  # what was being written is written
            self.writing.release()
        return _gone(" and ".join(lost)) if lost and isinstance(error, (KeyboardInterrupt, SystemExit)) else error

    def dismiss(self, code: int) -> None:
        """Let the others end."""
        self._ended = True
        self._tell({"is": "bye", "code": code})
        for rank, listener in self._listeners.items():
            if self._states[rank] != LOST:
                listener.join(PATIENCE)
        _join([*self._speakers, *self._listeners.values()])

    def _tell(self, message: Message) -> None:
        """Returns at once: a machine that hangs must not keep the others from hearing it."""
        for letters in self._letters.values():
            letters.put(message)

    def _speak(self, rank: int) -> None:
        message: Message = {"is": "ping"}
        with contextlib.suppress(ConnectionError):  # its listener notices
            while message["is"] != "bye":
                try:
                    message = self._letters[rank].get(timeout=PING_SECONDS)
                except queue.Empty:
                    message = {"is": "ping"}
                _send(message, rank, DOWN)

    def _listen(self, rank: int) -> None:
        try:
            while self._heard(rank, _receive(rank, UP)):
                pass
        except BaseException as error:
            gone = isinstance(error, ConnectionError)
            with self._changed:
                failed = self._states[rank] == WORKING and not self._ended
                self._states[rank] = LOST
                if failed and not self._failure:
                    self._failure = _gone(self._places[rank]) if gone else error
                self._changed.notify_all()

    def _heard(self, rank: int, message: Message) -> bool:
        """Whether more is to come."""
        kind = message["is"]
        if kind == "tensor":
            self._take(rank, message)
        elif kind == "left":
            return False
        else:
            with self._changed:
                if kind == "hello":
                    self._places[rank] = f"rank {rank} ({message['place']})"
                elif kind == "failed" and not self._failure:
                    self._failure = _as_error(message, self._places[rank])
                if kind in ("done", "failed", "quiet"):
                    self._states[rank] = IDLE
                self._changed.notify_all()
        return True

    def _take(self, rank: int, message: Message) -> None:
        with self.writing:
            payload = Payload(message["sizes"], rank, self._buffer)
            try:
                if self._deliver is not None and not self._halting and not self._failure:
                    self._deliver(message, payload)
            except ConnectionError:
                raise
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()
            payload.drop()


def _start(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _join(threads: Sequence[threading.Thread]) -> None:
    """Let threads end that have no more to do. One that returns from gloo while Python shuts down would abort the
    process; one that waits for a machine that hangs does not return, and is not waited for."""
    end = time.monotonic() + 1.0
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


# ---- the others -----------------------------------------------------------------------------------------------------


class Follower:
    """Another rank's view of rank 0."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.code = 0
        self._changed = threading.Condition()
        self._plan: Message | None = None
        self._leader = "rank 0"
        self._halted = self._dismissed = self._lost = self._left = False
        self._sending = threading.Lock()
        self._listener = _start(self._listen)
        self._pinger = _start(self._ping)
        self.send({"is": "hello", "place": _place()})

    def plan(self) -> Message:
        """What rank 0 wants to be done."""
        with self._changed:
            self._changed.wait_for(lambda: self._plan or self._over)
        self.check()
        assert self._plan is not None
        return self._plan

    def check(self) -> None:
        """Raise when there is nothing more to do."""
        if self._over:
            raise Stopped

    def send(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Tell rank 0 something, and the bytes of some tensors."""
        flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        with self._sending:
            if self._left or self._lost:  # nobody listens
                raise Stopped
            self._left = message["is"] == "left"
            try:
                _send({**message, "sizes": [len(part) for part in flat]} if flat else message, 0, UP)
                for part in flat:
                    for at in range(0, len(part), CHUNK):
                        _send_bytes(part[at : at + CHUNK], 0, UP)
            except ConnectionError:
                self._lose()
                raise Stopped from None

    def done(self) -> None:
        """Say that this rank has done its share, and wait for the end of the others."""
        self.send({"is": "done"})
        self._wait_for_the_end()

    def failed(self, error: BaseException) -> int:
        """Say what ended this rank, or that it has stopped, and wait for the end of the others.

        Returns:
            The exit code.
        Raises:
            ConnectionError: rank 0 is gone, and no other rank has said so.
        """
        with contextlib.suppress(Stopped):
            self.send({"is": "quiet"} if isinstance(error, Stopped) else _as_message(error))
            self._wait_for_the_end(PATIENCE)
        if self._dismissed:
            return self.code
        if _first_to_say("rank 0 is gone"):
            raise _gone(self._leader)
        return 3

    def leave(self) -> None:
        """The last thing that is called."""
        _join([self._listener, self._pinger])

    def _wait_for_the_end(self, seconds: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._dismissed or self._lost, seconds)
            if seconds is None and not self._dismissed:
                raise Stopped
        if self._dismissed:
            self._listener.join()

    @property
    def _over(self) -> bool:
        return self._halted or self._dismissed or self._lost

    def _lose(self) -> None:
        with self._changed:
            self._lost = True
            self._changed.notify_all()

    def _ping(self) -> None:
        while not self._over:
            with self._changed:
                self._changed.wait_for(lambda: self._over, PING_SECONDS)
            if not self._over:
                with contextlib.suppress(Stopped):
                    self.send({"is": "ping"})

    def _listen(self) -> None:
        try:
            while not self._dismissed:
                message = _receive(0, DOWN)
                with self._changed:
                    if message["is"] == "go":
                        self._plan, self._leader = message, f"rank 0 ({message['leader']})"
                    elif message["is"] == "halt":
                        self._halted = True
                    elif message["is"] == "bye":
                        self.code, self._dismissed = message["code"], True
                    self._changed.notify_all()
            self.send({"is": "left"})
        except BaseException:
            self._lose()


def _first_to_say(what: str) -> bool:
    """Whether no other rank has said it. torchrun's own process keeps the note, so that it outlives rank 0; without
    torchrun rank 0 had it, and rank 1 speaks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.get_rank() == 1
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"precal/{what}", 1)) == 1
    except RuntimeError:
        return True
