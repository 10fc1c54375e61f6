"""JAX's way to the first process, led through a thread that sees first when another one ends.

JAX's processes learn of one another through the first. Where the connection to it breaks, jaxlib aborts the process
with its stack on standard error; that another than the first has died, it notices by the missing heartbeat only. The
threads here take jaxlib's connections, make each again to the other side, and pass on what comes. They keep from jaxlib
that the other side has broken off, and end the process themselves, with a sentence.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ddnp_jax import ending

JOINING_SECONDS = 300  # within which all processes must have been started
# For a process to end by itself after another one: in order, or by the same error, which it says itself.
GRACE_SECONDS = 10
_HERE = "127.0.0.1"
_BYTES = 2**16  # at a time


class Relay:
    """Stands between this process's JAX and the processes that it is connected with.

    Attributes:
      address: 'host:port' at which JAX is to find the first process, or to be it.
      joined: Set when all processes are connected; until then, JAX tries again where a connection breaks.
    """

    def __init__(self, first_process: str, process_id: int) -> None:
        """Starts the threads.

        Args:
          first_process: 'host:port' that all processes were given.
          process_id: Number of this process.

        Raises:
          ValueError: The first process cannot listen there.
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
        """Whether another process has ended; it may take a moment to be heard of, for which this waits."""
        return self._broken.wait(GRACE_SECONDS)

    def _serve(self, listener: socket.socket, target: tuple[str, int]) -> None:
        """Makes every connection to the listener again to the target; jaxlib is at one end of the two."""
        while True:
            accepted, _ = listener.accept()
            try:
                made = socket.create_connection(target)
            except OSError:  # nobody is there yet
                accepted.close()
                continue
            near, far = (made, accepted) if self._is_first else (accepted, made)
            ended = threading.Event()
            _start(self._outwards, near, far, ended)
            _start(self._inwards, far, near, ended)

    def _wait_for_all(self) -> None:
        time.sleep(JOINING_SECONDS)
        if not self.joined:
            ending.leave_to_resume(f"the other processes of the run did not come within {JOINING_SECONDS} s")

    def _outwards(self, near: socket.socket, far: socket.socket, ended: threading.Event) -> None:
        _pass(near, far)
        ended.set()
        _close(far)

    def _inwards(self, far: socket.socket, near: socket.socket, ended: threading.Event) -> None:
        is_lost = _pass(far, near) and self.joined and not ended.is_set()
        if self._is_first or not is_lost:
            _close(near)  # the first process's jaxlib does not mind, and waits for it at its end
        if is_lost:
            self._broken.set()
            time.sleep(GRACE_SECONDS)
            if jax.distributed.is_initialized():  # else all have reached the end, and this process is ending too
                ending.leave_to_resume("another process of the run ended")


def _pass(source: socket.socket, sink: socket.socket) -> bool:
    """Passes bytes on until one side ends; returns whether it was the source."""
    while found := _received(source):
        try:
            sink.sendall(found)
        except OSError:
            return False
    return True


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(_BYTES)
    except OSError:  # an end as good as any
        return b""


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended already
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
