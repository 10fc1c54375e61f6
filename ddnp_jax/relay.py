"""Relays the connections between JAX's processes, to detect at once when another process of the run has ended.

All of JAX's processes are connected to the first one. When this connection breaks, jaxlib aborts the process and prints
a stack trace; when a process other than the first dies, jaxlib notices only that its heartbeat is missing. The threads
of this module accept jaxlib's connections, open a second connection to the other side for each, and forward the bytes.
They hide from jaxlib that the other side has closed its connection, and end the process themselves, with a readable
message.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ddnp_jax import ending

JOINING_SECONDS = 300  # all processes must be started within this time
# Time for a process to end by itself after another one: normally, or by the same error, which it then reports.
GRACE_SECONDS = 10
_HERE = "127.0.0.1"
_BYTES = 2**16  # bytes to read at once


class Relay:
    """Forwards the connections between JAX in this process and the other processes.

    Attributes:
      address: Address 'host:port' to give to JAX: the first process listens there, the others connect to it.
      joined: Whether all processes are connected; until then, JAX retries when a connection breaks.
    """

    def __init__(self, first_process: str, process_id: int) -> None:
        """Starts the threads.

        Args:
          first_process: Address 'host:port' of the first process, as given to all processes.
          process_id: Number of this process.

        Raises:
          ValueError: This is the first process, and it cannot listen on the port.
        """
        self.joined = False
        self._broken = threading.Event()
        host, _, port = first_process.rpartition(":")
        self._is_first = process_id == 0
        if self._is_first:
            listener, target = _listener(int(port)), (_HERE, _free_port())
            self.address = f"{_HERE}:{target[1]}"
        else:
            listener, target = socket.create_server((_HERE, 0)), (host.strip("[]"), int(port))
            self.address = f"{_HERE}:{listener.getsockname()[1]}"
        _start(self._serve, listener, target)
        _start(self._wait_for_all)

    def is_broken(self) -> bool:
        """Whether another process has ended; waits up to `GRACE_SECONDS` for the news."""
        return self._broken.wait(GRACE_SECONDS)

    def _serve(self, listener: socket.socket, target: tuple[str, int]) -> None:
        """Opens a connection to the target for every accepted connection; jaxlib is at the end of one of the two."""
        while True:
            accepted, _ = listener.accept()
            try:
                made = socket.create_connection(target)
            except OSError:  # the target does not listen yet
                accepted.close()
                continue
            near, far = (made, accepted) if self._is_first else (accepted, made)
            ended = threading.Event()
            _start(self._outwards, near, far, ended)
            _start(self._inwards, far, near, ended)

    def _wait_for_all(self) -> None:
        time.sleep(JOINING_SECONDS)
        if not self.joined:
            ending.leave_to_resume(f"the other processes of the run did not connect within {JOINING_SECONDS} s")

    def _outwards(self, near: socket.socket, far: socket.socket, ended: threading.Event) -> None:
        _pass(near, far)
        ended.set()
        _close(far)

    def _inwards(self, far: socket.socket, near: socket.socket, ended: threading.Event) -> None:
        is_lost = _pass(far, near) and self.joined and not ended.is_set()
        if self._is_first or not is_lost:
            _close(near)  # jaxlib of the first process tolerates this, and waits for it before it exits
        if is_lost:
            self._broken.set()
            time.sleep(GRACE_SECONDS)
            if jax.distributed.is_initialized():  # otherwise the run is complete, and this process is exiting too
                ending.leave_to_resume("another process of the run ended")


def _pass(source: socket.socket, sink: socket.socket) -> bool:
    """Forwards bytes until one side closes its connection; returns whether that side was the source."""
    while found := _received(source):
        try:
            sink.sendall(found)
        except OSError:
            return False
    return True


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(_BYTES)
    except OSError:  # treated like a connection that was closed normally
        return b""


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the connection is closed already
        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
    connection.close()


def _start(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"the first process cannot listen on port {port} ({error.strerror}); give another coordinator_address."
        ) from error


def _free_port() -> int:
    with socket.create_server((_HERE, 0)) as free:
        return free.getsockname()[1]
