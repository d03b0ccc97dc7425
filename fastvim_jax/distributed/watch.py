"""Notice at once that another process of the run has ended, and end this one with a message.

Otherwise GPUs would wait in a reduction for a process that was killed, until JAX misses its heartbeats and aborts the
others with a C++ stack. Here every process keeps a TCP connection to process 0 open. The system closes the connections
of a process when it ends, however it ends. Process 0 then tells all others. `leave_watch` says goodbye first, so that
the end of a run is no loss.

A host that loses its power closes nothing: JAX's heartbeats notice that (`start._LOST_AFTER`). So nothing is said if a
connection cannot be made, for example because of a firewall.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jax._src import distributed
from jax.experimental import multihost_utils

from fastvim_jax.distributed.start import Launch

LOST_STATUS = 75
"""Exit status after the loss of another process: EX_TEMPFAIL of sysexits.h, as after a signal. Try again."""
_TOKEN = 16  # bytes
_ADDRESS, _PATIENCE = "fastvim/watch", 60_000  # name at JAX's coordinator; milliseconds
_LONGEST_END = (
    3_600_000  # milliseconds in which one process may still write files after another has ended
)
_CONNECT = 5.0  # seconds
_GRACE = 3.0
"""Seconds in which this process may still end by an error of its own, whose message says more."""
_GOODBYE, _LOST = b"b", b"l"
_watches: list[Watch] = []


class Watch:
    """Watch over the other processes of a run; see the module.

    Args:
        lost: called in a thread when another process has ended without goodbye.
        grace: seconds between the loss and the call. Process 0 waits twice as long, because its own end makes JAX abort
            the others. If process 0 is lost, nobody waits.
        meet: waits until all processes have called it.
    """

    def __init__(
        self,
        lost: Callable[[], None],
        grace: float = _GRACE,
        meet: Callable[[], None] = lambda: None,
    ) -> None:
        self._lost = lost
        self._grace = grace
        self._meet = meet
        self._left = False
        self._connections: set[socket.socket] = set()

    def leave(self) -> None:
        """Say goodbye when all processes do, so that nobody takes the end of this one for a loss.

        Until then this process watches on: another one may still fail, for example when it closes its files.
        """
        self._meet()
        self._left = True
        for each in tuple(self._connections):
            _send(each, _GOODBYE)

    def join(self, address: tuple[str, int], token: bytes) -> socket.socket:
        """Connect to process 0."""
        connection = socket.create_connection(address, timeout=_CONNECT)
        connection.settimeout(None)
        self._connections.add(connection)
        _send(connection, token)
        return connection

    def listen(self, connection: socket.socket) -> None:
        """Wait until process 0 tells of a lost process, or is lost itself."""
        with connection:
            said = _receive(connection)
            if said != _GOODBYE:
                self._end(self._grace if said == _LOST else 0.0)

    def serve(self, listener: socket.socket, token: bytes, others: int) -> None:
        """Accept the connections of the others, as process 0. When one closes without goodbye, tell the rest.

        Returns after all `others` have said goodbye.
        """
        with contextlib.ExitStack() as opened:
            waiting = opened.enter_context(selectors.DefaultSelector())
            waiting.register(opened.enter_context(listener), selectors.EVENT_READ)
            while others:
                for key, _ in waiting.select():
                    if key.fileobj is listener:
                        accepted = opened.enter_context(listener.accept()[0])
                        waiting.register(accepted, selectors.EVENT_READ)
                        continue
                    connection: socket.socket = key.fileobj  # type: ignore[assignment]
                    said = _receive(connection)
                    known = connection in self._connections
                    if not known and said == token:
                        self._connections.add(connection)
                        continue
                    waiting.unregister(connection)
                    connection.close()
                    if not known:  # no process of this run
                        continue
                    self._connections.discard(connection)
                    others -= 1
                    if said != _GOODBYE:
                        for other in tuple(self._connections):
                            _send(other, _LOST)
                        self._end(2 * self._grace)
                        return

    def _end(self, grace: float) -> None:
        time.sleep(grace)
        if not self._left:
            self._lost()


def start_watch(launch: Launch | None) -> Watch:
    """Watch over the other processes from now on. All processes must call this, each with its `launch`.

    If another one is lost, this one prints that and ends at once with `LOST_STATUS`. It saves nothing, because its
    devices may wait forever. When its work has ended well, the process calls `leave_watch`, or `leave` of the result.
    """
    if launch is None:
        return Watch(lambda: None)
    message = f"fastvim: {lost_message(launch.process, launch.processes)}"

    def end_process() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(LOST_STATUS)

    # JAX's coordinator passes the address on. An array would need the devices, which may fail to start in one process.
    coordinator: Any = distributed.global_state.client
    watch = Watch(
        end_process, meet=lambda: coordinator.wait_at_barrier("fastvim/end", _LONGEST_END)
    )
    _watches.append(watch)
    work: Callable[[], None] | None = None
    if launch.process == 0:
        token, listener = secrets.token_bytes(_TOKEN), _listener(launch.processes)
        port = listener.getsockname()[1]
        coordinator.key_value_set_bytes(_ADDRESS, token + port.to_bytes(4, "big"))
        work = functools.partial(watch.serve, listener, token, launch.processes - 1)
    else:
        told = coordinator.blocking_key_value_get_bytes(_ADDRESS, _PATIENCE)
        token, port = told[:_TOKEN], int.from_bytes(told[_TOKEN:], "big")
        host = launch.coordinator.rpartition(":")[0].strip("[]")
        with contextlib.suppress(OSError):
            work = functools.partial(watch.listen, watch.join((host, port), token))
    if work is not None:
        threading.Thread(target=work, daemon=True).start()
    # Devices connect to each other at their first work together. Later, one process may list files for minutes, and the
    # others would wait 30 s for it on CPUs.
    multihost_utils.sync_global_devices("fastvim/start")
    return watch


def leave_watch() -> None:
    """Leave the watch that this process started, if any; see `Watch.leave`. All processes must call this."""
    while _watches:
        _watches.pop().leave()


def lost_message(process: int, processes: int) -> str:
    """Say that another process of this run has ended, and what to do."""
    return (
        f"process {process} of {processes} lost another process of this run, and ends, too. The output of the lost one "
        "says why it ended. The same command, given again to all of them, continues from the latest checkpoint."
    )


def _listener(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        family: socket.AddressFamily = socket.AF_INET6
        return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _send(connection: socket.socket, said: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(said)


def _receive(connection: socket.socket) -> bytes:
    """Return what the other side said, or nothing if it has ended."""
    try:
        return connection.recv(_TOKEN)
    except OSError:
        return b""
