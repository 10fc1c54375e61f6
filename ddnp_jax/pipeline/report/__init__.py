"""What a run has shown: `report.json`, `report.md`, `report.html` and two plots; and several runs beside each other.

Figures are rounded once, where they are printed; `report.json` keeps all digits.
"""

from ddnp_jax.pipeline.report.compare import compare, comparison_html
from ddnp_jax.pipeline.report.figures import COLORS, plain_axes, write_figure
from ddnp_jax.pipeline.report.markdown import table
from ddnp_jax.pipeline.report.schema import Cost, Export, File, Latency, PerStage, Report, Training, Verification
from ddnp_jax.pipeline.report.storage import read, write
from ddnp_jax.pipeline.report.tables import mean
from ddnp_jax.pipeline.report.text import CONVENTIONS

__all__ = [
    "COLORS",
    "CONVENTIONS",
    "Cost",
    "Export",
    "File",
    "Latency",
    "PerStage",
    "Report",
    "Training",
    "Verification",
    "compare",
    "comparison_html",
    "mean",
    "plain_axes",
    "read",
    "table",
    "write",
    "write_figure",
]
