"""`python -m experiments.compare RUN/report.json ...`: several runs in one table, mean and deviation over seeds.

With --html=PATH the table is also written as a page, with plots of accuracy against cost.
"""

from ddnp_jax import files
from ddnp_jax.pipeline import report
from experiments import launch


def main() -> None:
    """Prints the table, and writes the page that is asked for."""
    parser = launch.Parser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", metavar="RUN/report.json")
    parser.add_argument("--html", metavar="PATH", help="file that the page is written to")
    arguments = parser.parse_args()
    reports = [report.read(path) for path in arguments.reports]
    print(report.compare(reports))
    if arguments.html is not None:
        files.write_text(arguments.html, report.comparison_html(reports))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
