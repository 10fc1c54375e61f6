"""Fair timing: every candidate runs in its own process, and the rounds of all candidates alternate, A B A B ...

Each candidate has the entire machine while the others wait, and a slowdown of the machine affects all candidates.
Neither JAX nor PyTorch is imported here, because the maximum resident set of a process starts from that of its parent.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple, Self

from tqdm import tqdm


class Candidate(NamedTuple):
    """A program to measure, in its own process.

    Attributes:
      run_round: Runs `steps` steps and waits until they are complete.
      steps: Number of steps per round.
      peak_bytes: Returns the peak memory so far.
      about: Description: "platform" (of JAX), "device" and "version".
      clock: Clock for the time of rounds, in seconds.
    """

    run_round: Callable[[], Any]
    steps: int
    peak_bytes: Callable[[], int]
    about: dict[str, str]
    clock: Callable[[], float] = time.perf_counter


class Measurement(NamedTuple):
    """Seconds per step in each round, and peak memory."""

    seconds: list[float]
    peak_bytes: int


class Worker:
    """A candidate in its own process, which runs a round on request."""

    def __init__(self, candidate: Callable[..., Candidate], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, candidate, *arguments), daemon=True)
        self._process.start()
        other_end.close()  # so that waiting for an answer fails when the process ends
        self.about: dict[str, str] = self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join()

    def run_round(self) -> tuple[float, int]:
        """Runs a round; returns seconds per step and the peak memory so far."""
        return self._receive("round")

    def _receive(self, request: str | None = None) -> Any:
        try:
            if request:
                self._pipe.send(request)
            return self._pipe.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            self._process.join()
            code = self._process.exitcode
            if code == 1:  # the process has already printed its error
                raise SystemExit(code) from None
            raise SystemExit(f"error: a measured process ended early (exit code {code}).") from None


def _serve(pipe: Connection, candidate: Callable[..., Candidate], *arguments: Any) -> None:
    try:
        run_round, steps, peak_bytes, about, clock = candidate(*arguments)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    run_round()  # compiles
    run_round()  # warms up allocators and caches
    pipe.send(about)
    try:
        while pipe.recv():
            started = clock()
            run_round()
            pipe.send(((clock() - started) / steps, peak_bytes()))
    except EOFError:
        return  # the parent process is done


def interleave(
    candidates: Mapping[str, tuple[Any, ...]],
    rounds: int,
    title: str,
    others: Callable[[str], Mapping[str, tuple[Any, ...]]] = lambda platform: {},
) -> tuple[dict[str, Measurement], dict[str, dict[str, str]]]:
    """Runs candidates in separate processes, with one round of each in turn.

    Args:
      candidates: By name, a function that returns a `Candidate`, and its arguments.
      rounds: Number of rounds per candidate.
      title: Title of the progress bar.
      others: Returns additional candidates, which depend on the platform of the first candidate.

    Returns:
      The measurements and the descriptions (`Candidate.about`), by name.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(*candidate)) for name, candidate in candidates.items()}
        platform = next(iter(workers.values())).about["platform"]
        workers |= {name: stack.enter_context(Worker(*candidate)) for name, candidate in others(platform).items()}
        rounds_of: dict[str, list[tuple[float, int]]] = {name: [] for name in workers}
        for _ in tqdm(range(rounds), desc=title, unit="round"):
            for name, worker in workers.items():
                rounds_of[name].append(worker.run_round())
        measured = {name: Measurement([s for s, _ in taken], taken[-1][1]) for name, taken in rounds_of.items()}
        return measured, {name: worker.about for name, worker in workers.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median of the ratios of all rounds."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def resident_bytes() -> int:
    """The maximum resident set of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
