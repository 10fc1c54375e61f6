"""TensorBoard's copy of `metrics.jsonl`: a file of scalar events.

TensorBoard's own records are written, not by its writer: that one works behind a queue, and a kill loses what waits.
"""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ddnp_jax import extras

with extras.needed_by("ddnp_jax.training.events"):
    from absl import logging
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    """The event file in a folder. If writing it fails the run continues: `metrics.jsonl` has the same content."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder, which is made when there is something to write."""
        self.folder = folder
        self._file: BinaryIO | None = None

    @property
    def is_open(self) -> bool:
        """Whether `write` continues a file, which nobody has deleted."""
        return self._file is not None and Path(self._file.name).exists()

    def write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines of the log to the open file, each number as the scalar `stage/metric` at its step."""
        self._append([Event(step=entry["step"], summary=_scalars(entry)) for entry in entries])

    def rewrite(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Begins a new file with these lines of the log, in place of all that the folder has."""
        self.close()
        try:
            self.folder.mkdir(exist_ok=True)
            old = [*self.folder.glob("events.*")]
            self._file = (self.folder / f"events.out.tfevents.{time.time_ns()}").open("wb")
            # TensorBoard drops what it has read of the step and later ones at the start of a session.
            started = SessionLog(status=SessionLog.START)
            self._append([Event(file_version="brain.Event:2"), Event(session_log=started)])
            self.write(entries)
            for path in old:  # a TensorBoard reading a file continues with the next one from its end
                os.truncate(path, 0) if path.stat().st_size else path.unlink()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Ends the file; the next one is begun by `rewrite`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, events: Iterable[Event]) -> None:
        assert self._file is not None
        records = RecordWriter(self._file)
        try:
            for event in events:
                event.wall_time = time.time()
                records.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logging.warning("%s cannot be written (%s): TensorBoard will not see this run.", self.folder, error.strerror)
        self._file = open(os.devnull, "wb")  # noqa: SIM115


def _scalars(entry: Mapping[str, Any]) -> Summary:
    """The scalars of a line: of each value its tag and a float."""
    values = {name: value for name, value in entry.items() if name not in ("stage", "step", "identity")}
    with np.errstate(over="ignore"):  # a value beyond float32 is infinite here
        return Summary(
            value=[
                Summary.Value(tag=f"{entry['stage']}/{name}", simple_value=np.float32(value))
                for name, value in values.items()
            ]
        )
