"""`python -m experiments.compare RUN/report.json ...`: one table over several runs, mean and deviation over seeds."""

import json
import sys
from pathlib import Path

from ddnp_jax import report

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("error: name at least one report.json: python -m experiments.compare RUN/report.json ...")
    print(report.compare([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
