"""The folder of a run: it belongs to one run, and only one process at a time may use it."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from ddnp_jax import files, parallel

CONFIG = "config.json"
LOCK = "run.lock"
_SHOWN = 10  # of the fields that differ


@contextlib.contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Locks a workdir against other runs; the folder is created if absent, and removed if it stays empty.

    The lock is the operating system's (flock), so that it is released when the process ends for any reason. It works
    across machines if their file system supports locks, as NFS does since version 4; if it does not, a warning is
    logged. In a run with several processes, the first one holds the lock.

    Args:
      workdir: Folder of the run.

    Raises:
      ValueError: Another run uses it (the message names its host and process), or it is not a folder.
      OSError: It cannot be created or written, or disappears before the end.
    """
    if "://" in str(workdir):
        raise ValueError(f"workdir={workdir} is a URL, not a folder; mount the storage and give the mounted folder.")
    held = contextlib.ExitStack()
    parallel.on_first_process(lambda: held.enter_context(_lock(Path(workdir))))
    with held:
        try:
            yield
        except FileNotFoundError as error:
            if Path(workdir).exists():
                raise
            raise OSError(
                f"workdir={workdir} was moved or deleted while the run worked in it; put it back, and start the same "
                "command again."
            ) from error


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir={workdir} is a file; give a folder, which is made where there is none.")
    is_new = not workdir.exists()
    path = workdir / LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(path)
    except OSError as error:
        raise OSError(f"workdir={workdir} cannot be written ({error.strerror}); give a folder that can.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # something was written into it
                workdir.rmdir()


def _acquired(path: Path) -> int:
    """A descriptor of the lock file, which this process has locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, path)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"another run works in {path.parent}: {holder}. Wait for it, stop it, or give this run another workdir."
            ) from None
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        os.close(descriptor)  # of a run that ended just now, and removed its file
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
    return descriptor


def _flock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        logging.warning(
            "%s cannot be locked (%s): take care that no other run works in this folder.", path, error.strerror
        )


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.read(descriptor, 1000))
        return f"process {found['process']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"


def check_room(workdir: str | Path, needed: float) -> None:
    """Checks that the disk of a workdir has room for the checkpoints of a stage.

    Args:
      workdir: Folder of the run; it need not exist yet.
      needed: Required bytes.

    Raises:
      ValueError: The disk has fewer free bytes.
    """
    folder = Path(workdir).absolute()
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    if free < needed:
        raise ValueError(
            f"the disk of workdir={workdir} has {free / 2**20:,.0f} MiB free, and the checkpoints of a stage need some "
            f"{needed / 2**20:,.0f} MiB; make room, or give a folder of another disk."
        )


def claim_workdir(workdir: str | Path, config: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
    """Claims a workdir for this run, or checks that its `config.json` contains the same config.

    Args:
      workdir: Folder of the run; created if absent.
      config: Nested mappings of JSON values.
      ignore: Fields, or prefixes of fields ('parallel' for all 'parallel.*'), that may differ when a run resumes.

    Raises:
      ValueError: The workdir belongs to a run with another config (the message lists the fields that differ), or
        is not shared by all processes.
    """
    path = Path(workdir) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)

    def claim() -> None:
        if not path.exists():
            files.write_json(path, config)

    parallel.on_first_process(claim)
    if not path.exists():
        raise ValueError(f"{workdir} is not the same folder in every process; put it where all of them see it.")
    check_workdir(workdir, config, ignore)


def check_workdir(workdir: str | Path, config: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
    """Like `claim_workdir`, but writes nothing: a workdir that no run has claimed is free."""
    path = Path(workdir) / CONFIG
    if not path.exists():
        return
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} contains no configuration of a run; restore a good copy, or use another workdir.")
    theirs = _fields(found)
    # Runs of versions that did not note what they were given resume.
    free = (*ignore, *(() if any(name.startswith("given.") for name in theirs) else ("given",)))
    ours = _fields(json.loads(json.dumps(config)))  # tuples become lists, as in the file
    differing = [
        f"  {name}: workdir has {_shown(theirs, name)}, this run has {_shown(ours, name)}"
        for name in dict.fromkeys([*theirs, *ours])
        if _shown(theirs, name) != _shown(ours, name) and not any(f"{name}.".startswith(f"{p}.") for p in free)
    ]
    if differing:
        if len(differing) > _SHOWN:
            differing[_SHOWN:] = [f"  and {len(differing) - _SHOWN} more"]
        lines = "\n".join([f"{workdir} belongs to a run with another config:", *differing])
        raise ValueError(f"{lines}\nGive this run another workdir, or the workdir's values.")


def _fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to 'a.b.c' fields."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and value
        fields |= _fields(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return fields


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "no such field"
