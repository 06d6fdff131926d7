"""The run's side of a worker: starts it, asks it with a time limit, kills it when it hangs."""

import collections
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import protocol

ROOT = Path(__file__).resolve().parent.parent.parent


class WorkerError(Exception):
    """A worker answered with an error; it still lives."""


class PeerAbsentError(WorkerError):
    """A package of the peer is not installed."""


class WorkerLostError(WorkerError):
    """A worker hung and was killed, or ended by itself."""


class Worker:
    """A process that serves one peer. Starts with the first request, and again with the next one after it was lost.

    Args:
        module: Module of the peer.
        folders: Put in front of the module path, as the one where the peer's packages were unpacked.
        environment: Variables to set.
        options: Handed to the peer's `make_peer`.
        starts: How often it may be started; a peer that keeps hanging must not eat the time of the others.
        log: File for what it prints; None throws that away but for the last lines.
    """

    def __init__(
        self,
        module: str,
        *,
        folders: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        starts: int = 3,
        log: Path | None = None,
    ):
        self.module = module
        self.description: protocol.Message | None = None
        self._folders, self._environment = list(folders), dict(environment or {})
        self._options = dict(options or {})
        self._starts_left, self._log = starts, log
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._printed: collections.deque[str] = collections.deque(maxlen=30)

    def hello(self, timeout: float) -> protocol.Message:
        """Start the process if it does not run, and ask what it is; answers are remembered.

        Raises:
            PeerAbsentError: A package of the peer is not installed.
            WorkerError: Anything else went wrong.
        """
        if self._process is None:
            self._start()
            try:
                self.description = self._exchange({"do": "hello", "options": self._options}, timeout)
            except WorkerLostError:
                raise
            except WorkerError:
                self.stop()
                raise
        assert self.description is not None, "a running worker has said what it is"
        return self.description

    def ask(self, message: protocol.Message, timeout: float) -> protocol.Message:
        """The answer to a request.

        Raises:
            WorkerLostError: No answer in time (the process is killed), or the process ended.
            WorkerError: The worker answered with an error.
        """
        if self._process is None:
            raise WorkerLostError("it does not run")
        return self._exchange(message, timeout)

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None

    def stop(self, grace: float = 5.0) -> None:
        """End the process: politely, then by force."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            assert process.stdin is not None
            process.stdin.write(protocol.encode({"do": "quit"}))
            process.stdin.close()
            process.wait(grace)
        self._kill()

    def _start(self) -> None:
        if self._starts_left <= 0:
            raise WorkerLostError("it was lost too often and is not started again")
        self._starts_left -= 1
        path = [*self._folders, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", self.module, *self._folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | self._environment,
            start_new_session=True,  # compilers that it starts go with it
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        threading.Thread(target=self._keep_output, args=(self._process.stderr,), daemon=True).start()

    def _keep_output(self, stream: IO[str]) -> None:
        for line in stream:
            self._printed.append(line)
            if self._log is not None:
                with self._log.open("a") as log:
                    log.write(line)

    def _exchange(self, message: protocol.Message, timeout: float) -> protocol.Message:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(protocol.encode(message))
            process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._kill()
            raise WorkerLostError(f"no answer to {message['do']!r} in {timeout:g} s: killed") from None
        except OSError:
            line = None
        if line is None:
            self._kill()
            printed = "".join(self._printed).strip().splitlines()
            raise WorkerLostError(
                f"it ended with status {process.returncode} at {message['do']!r}: {printed[-1] if printed else ''}"
            )
        answer = protocol.decode(line)
        if not answer.pop("ok"):
            raise (PeerAbsentError if answer.get("absent") else WorkerError)(answer["error"])
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session is its own: the group holds nothing else
        process.wait(30)
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()


def _forward(stream: IO[str], answers: "queue.Queue[str | None]") -> None:
    try:
        for line in stream:
            answers.put(line)
    except ValueError:  # closed from the other side
        pass
    answers.put(None)
