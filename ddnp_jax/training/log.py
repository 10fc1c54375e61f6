"""`metrics.jsonl`, the metrics of a run over time, and its copy for TensorBoard."""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ddnp_jax import files, parallel
from ddnp_jax.training.events import Events

TENSORBOARD = "tensorboard"  # folder of the events, beside the log
_CRC = "crc"  # field of every line: the checksum of the others


class MetricsLog:
    """One line per chunk and per evaluation; a resumed stage rewrites those after its checkpoint."""

    def __init__(self, path: Path, identity: str = "") -> None:
        """Takes the file and the run's identity, which the first line stores; "" accepts the log of any run."""
        self._path, self._identity = path, identity
        self._events = Events(path.parent / TENSORBOARD)

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` after `step`, which will be written again, and a last line that was cut off.

        Every process must call.

        Raises:
          ValueError: A line is damaged (the message gives its number), or the log belongs to another run.
        """
        parallel.on_first_process(lambda: self._rewind(stage, step))

    def check(self) -> None:
        """Raises as `rewind`, and writes nothing."""
        self._entries(self._whole_lines())

    def _rewind(self, stage: str, step: int) -> None:
        lines = self._whole_lines()
        entries = zip(lines, self._entries(lines), strict=True)
        kept = [line for line, entry in entries if entry["stage"] != stage or entry["step"] <= step]
        files.write_bytes(self._path, b"".join(kept))
        if len(kept) < len(lines):
            self._events.close()  # the next line writes them anew

    def restore_events(self) -> None:
        """Rewrites the events if their folder is missing. Every process must call this."""
        parallel.on_first_process(self._restore_events)

    def _restore_events(self) -> None:
        if not self._events.folder.exists():
            self._rewrite_events()

    def _rewrite_events(self) -> None:
        self._events.rewrite(self._entries(self._whole_lines()))

    def lines(self, stage: str) -> list[dict[str, Any]]:
        """Returns the entries of a stage, in order; empty if it took no steps or its log is lost.

        Raises:
          ValueError: A line is damaged (the message gives its number), or the log belongs to another run.
        """
        return [entry for entry in self._entries(self._content().splitlines()) if entry["stage"] == stage]

    def best(self, stage: str) -> float | None:
        """Highest top-1 accuracy of a stage on held-out training images, in percent; None if none was logged."""
        lines = self.lines(stage)
        return max((line["validation_top1"] for line in lines if "validation_top1" in line), default=None)

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Appends one line, and its numbers to the events."""
        if jax.process_index() == 0:
            header = self._line("run", 0, identity=self._identity) if self._is_empty() else ""
            with self._path.open("a") as file:
                file.write(header + self._line(stage, step, **values))
                file.flush()
                os.fsync(file.fileno())
            if self._events.is_open:
                self._events.write([{"stage": stage, "step": step, **values}])
            else:
                self._rewrite_events()

    def _line(self, stage: str, step: int, **values: Any) -> str:
        entry = {"stage": stage, "step": step, **values}
        return json.dumps({**entry, _CRC: _crc(entry)}) + "\n"

    def _whole_lines(self) -> list[bytes]:
        """All lines but a last one that was cut off."""
        return [line for line in self._content().splitlines(keepends=True) if line.endswith(b"\n")]

    def _content(self) -> bytes:
        return self._path.read_bytes() if self._path.exists() else b""

    def _is_empty(self) -> bool:
        return not self._path.exists() or self._path.stat().st_size == 0

    def _entries(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        entries = [self._entry(line, number) for number, line in enumerate(lines, start=1)]
        if self._identity and entries and entries[0].get("identity", self._identity) != self._identity:
            raise ValueError(f"{self._path} is the log of another run; put this run's back, or delete it.")
        return entries

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise self._damaged(number, f"is not JSON ({error})") from error
        if not (isinstance(entry, dict) and {"stage", "step"} <= entry.keys()):
            raise self._damaged(number, "has no stage and step")
        written = entry.pop(_CRC, None)
        if written is not None and written != _crc(entry):
            raise self._damaged(number, "has a wrong checksum")
        own = {name: value for name, value in entry.items() if name not in ("stage", "identity")}
        if wrong := [name for name, value in own.items() if not _is_number(value)]:
            raise self._damaged(number, f"has {wrong[0]}={own[wrong[0]]!r}, which is not a number")
        return entry

    def _damaged(self, number: int, what: str) -> ValueError:
        return ValueError(f"{self._path}, line {number}, {what}; repair or delete the line.")


def _crc(entry: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entry).encode()):08x}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
