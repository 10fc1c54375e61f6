"""TensorBoard's copy of `metrics.jsonl`: a file of scalar events.

The few messages are encoded here: the packages that write them bring PyTorch or TensorFlow into the process where these
are installed, and write behind a queue, of which a kill loses what is left.
"""

import os
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ddnp_jax import extras

with extras.needed_by("ddnp_jax.training.events"):
    from absl import logging

_POLYNOMIAL = 0x82F63B78  # of CRC-32C, reversed
_VERSION, _SUMMARY, _SESSION = 3, 5, 7  # fields of an event
_STARTED = b"\x08\x01"  # the session's status; TensorBoard drops what it has read of the step and later ones


class Events:
    """The event file in a folder. Whatever becomes of it the run goes on: `metrics.jsonl` has all that it holds."""

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
        self._append(b"".join(_record(_event(entry["step"], _SUMMARY, _summary(entry))) for entry in entries))

    def rewrite(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Begins a new file with these lines of the log, in place of all that the folder has."""
        self.close()
        try:
            self.folder.mkdir(exist_ok=True)
            old = [*self.folder.glob("events.*")]
            self._file = (self.folder / f"events.out.tfevents.{time.time_ns()}").open("wb")
            self._append(_record(_event(0, _VERSION, b"brain.Event:2")) + _record(_event(0, _SESSION, _STARTED)))
            self.write(entries)
            for path in old:  # a TensorBoard that reads a file goes on to the next one from its end, not from nowhere
                os.truncate(path, 0) if path.stat().st_size else path.unlink()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Ends the file; the next one is begun by `rewrite`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, records: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(records)
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logging.warning("%s cannot be written (%s): TensorBoard will not see this run.", self.folder, error.strerror)
        self._file = open(os.devnull, "wb")  # noqa: SIM115


def _summary(entry: Mapping[str, Any]) -> bytes:
    """The scalars of a line: of each value its tag and a float."""
    values = {name: value for name, value in entry.items() if name not in ("stage", "step", "identity")}
    with np.errstate(over="ignore"):  # a value beyond float32 is infinite here
        scalars = [
            _message(1, f"{entry['stage']}/{name}".encode()) + b"\x15" + np.array(value, "<f4").tobytes()
            for name, value in values.items()
        ]
    return b"".join(_message(1, scalar) for scalar in scalars)


def _event(step: int, field: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + _message(field, content)


def _message(field: int, content: bytes) -> bytes:
    """A field of protobuf that holds a message or a text."""
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _checksum(content: bytes) -> bytes:
    """CRC-32C, masked as records have it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table_entry(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc


_TABLE = [*map(_table_entry, range(256))]
