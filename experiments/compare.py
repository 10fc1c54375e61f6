"""`python -m experiments.compare RUN/report.json ...`: one table over several runs, mean and deviation over seeds."""

import sys

from ddnp_jax.pipeline import report

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("error: name at least one report.json: python -m experiments.compare RUN/report.json ...")
    try:
        print(report.compare([report.read(path) for path in sys.argv[1:]]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
