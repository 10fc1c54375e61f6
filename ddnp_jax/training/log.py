"""`metrics.jsonl`: what a run has measured over time."""

import json
from pathlib import Path
from typing import Any

import jax

from ddnp_jax import files


class MetricsLog:
    """One line per chunk and per evaluation; a resumed stage writes those after its checkpoint again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` after `step`: they will be written again."""
        if jax.process_index() == 0 and self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            entries = ((line, json.loads(line)) for line in lines if line.endswith("\n"))
            kept = [line for line, entry in entries if entry["stage"] != stage or entry["step"] <= step]
            files.write_text(self._path, "".join(kept))

    def best(self, stage: str) -> float | None:
        """Highest top-1 accuracy of a stage on held-out training images, in percent; None of no steps."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [json.loads(line) for line in lines]
        found = [
            entry["validation_top1"] for entry in entries if entry["stage"] == stage and "validation_top1" in entry
        ]
        return max(found, default=None)

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Appends one line."""
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
