"""Atomic writing of files, and JSON."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SEAL = "checksum"  # field of a file that `write_sealed` wrote


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: after a crash or a power failure, the file is either the old or the new one.

    Args:
      path: Path of the file, in an existing folder.
      content: Content of the file.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")  # in the same folder, because renaming is atomic only there
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Writes the entries of a folder to disk, on systems that support it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, atomically like `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON value, atomically like `write_bytes`; for invalid values, the file does not change."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a file of JSON.

    Raises:
      ValueError: The file is damaged; the message names it.
      OSError: The file cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore a good copy, or delete it.") from error


def checksum(value: Any) -> str:
    """SHA-256 of a JSON value; it does not depend on the order of fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Writes fields of JSON values with their checksum, atomically like `write_bytes`."""
    write_json(path, {**fields, _SEAL: checksum(fields)})


def read_sealed(path: str | Path) -> dict[str, Any]:
    """Reads fields written by `write_sealed`.

    Raises:
      ValueError: The file is damaged; the message names it.
      OSError: The file cannot be read.
    """
    fields = read_json(path)
    if not isinstance(fields, dict) or fields.pop(_SEAL, None) != checksum(fields):
        raise ValueError(f"{path} is damaged: its checksum is wrong; restore a good copy, or delete it.")
    return fields


def user_cache() -> Path:
    """Folder of this library's per-user cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddnp_jax"
