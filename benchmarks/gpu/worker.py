"""The process of one peer: `python -m benchmarks.gpu.worker benchmarks.peers.fa3`.

The peer's module holds `make_peer(options)`. Requests come on standard input, answers go to what was standard output
when the process started; whatever libraries print goes to standard error.
"""

import importlib
import os
import site
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from benchmarks.gpu import inputs, protocol
from benchmarks.peers.base import AbstractPeer, Program, time_calls

MakePeer = Callable[[Mapping[str, Any]], AbstractPeer]
"""Makes a peer from the options of "hello"."""

_LINES_OF_ERROR = 3


class _Session:
    """Requests to a peer; one method per `do`."""

    def __init__(self, make_peer: MakePeer):
        self._make_peer = make_peer
        self._peer: AbstractPeer | None = None
        self._programs: dict[str, Program] = {}

    @property
    def peer(self) -> AbstractPeer:
        if self._peer is None:
            raise ValueError("expected `hello` first")
        return self._peer

    def hello(self, message: protocol.Message) -> protocol.Message:
        self._peer = self._make_peer(message.get("options", {}))
        return {"contestants": list(self.peer.names), **self.peer.describe()}

    def prepare(self, message: protocol.Message) -> protocol.Message:
        name, case, files = protocol.read_prepare(message)
        if reason := self.peer.why_not(name, case):
            return {"missing": reason}
        program = self.peer.prepare(name, case, files)
        self._programs[name] = program
        arrays = program.call()
        self.peer.sync()
        fetched = program.fetch(arrays, inputs.checked_queries(case, files, name))
        paths = {}
        for kind, array in (("output", fetched.output), ("lse", fetched.lse), ("made", fetched.made)):
            if array is not None:
                paths[kind] = str(files.folder / f"{kind}_{name}.npy")
                np.save(paths[kind], array)
        return {"finite": fetched.finite, "calls": program.calls, "runs": program.runs, **paths}

    def plan(self, message: protocol.Message) -> protocol.Message:
        plan = self._programs[message["contestant"]].plan
        if plan is None:
            return {"ms": None}
        times = []
        for _ in range(3):
            self.peer.sync()
            start = time.perf_counter()
            plan()
            self.peer.sync()
            times.append(1e3 * (time.perf_counter() - start))
        return {"ms": float(np.median(times))}

    def time(self, message: protocol.Message) -> protocol.Message:
        program = self._programs[message["contestant"]]
        ms, calls = time_calls(program.call, self.peer.sync, message["target_ms"])
        return {"ms": ms / program.calls, "calls": calls * program.calls}

    def device_time(self, message: protocol.Message) -> protocol.Message:
        program = self._programs[message["contestant"]]
        ms = self.peer.device_ms(program, message["calls"])
        return {"ms": None if ms is None else ms / program.calls}

    def release(self, _: protocol.Message) -> protocol.Message:
        self._programs.clear()
        self.peer.release()
        return {}


_REQUESTS = ("hello", "prepare", "plan", "time", "device_time", "release")


def serve(make_peer: MakePeer, requests: IO[str], answers: IO[str]) -> None:
    """Answer until "quit" or the end of the requests."""
    session = _Session(make_peer)
    for line in requests:
        message = protocol.decode(line)
        do = message.get("do")
        if do == "quit":
            return
        try:
            if do not in _REQUESTS:
                raise ValueError(f"expected one of {', '.join(_REQUESTS)}; got do={do!r}")
            answer: dict[str, Any] = {"ok": True, **getattr(session, do)(message)}
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            last = " | ".join(traceback.format_exception_only(error)[-1].strip().splitlines()[:_LINES_OF_ERROR])
            # A package that is not there, and not a bug inside one that is.
            absent = isinstance(error, ModuleNotFoundError)
            answer = {"ok": False, "error": last[:500], "absent": absent}
        answers.write(protocol.encode(answer))
        answers.flush()


def main(argv: list[str]) -> int:
    """Serve the peer whose module is named; the folders hold its packages."""
    if not argv:
        print("usage: python -m benchmarks.gpu.worker MODULE [FOLDER ...]", file=sys.stderr)
        return 2
    for folder in argv[1:]:
        site.addsitedir(folder)  # packages there may name further folders in .pth files, as CuTe DSL does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(lambda options: importlib.import_module(argv[0]).make_peer(options), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
