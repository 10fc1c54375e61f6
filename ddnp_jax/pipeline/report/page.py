"""A report as one self-contained HTML page."""

import io
import re
from collections.abc import Mapping, Sequence

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ddnp_jax.pipeline.report import figures
from ddnp_jax.pipeline.report.blocks import KeyFigure, Picture, Section, Table

_FONT = ["DejaVu Sans"]  # matplotlib's own, by which it places its texts; a browser without it takes another
_WIDE = 7  # columns of a table that fits into lines of a length that is easy to read
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# Colours that the page sets, because they differ between a light and a dark background.
_COLORS = {
    figures.TEXT: "currentColor",
    figures.GRID: "var(--grid)",
    figures.BLUE: "var(--blue)",
    figures.LIGHT_BLUE: "var(--light-blue)",
    figures.SKY_BLUE: "var(--sky-blue)",
}


def document(
    title: str,
    lead: str,
    sections: Sequence[Section],
    drawn: Mapping[str, Figure],
    key_figures: Sequence[KeyFigure] = (),
) -> str:
    """The whole page.

    Args:
      title: Its title.
      lead: What it says first.
      sections: Its parts.
      drawn: Plots by the names of the sections' pictures.
      key_figures: What stands out below the lead.

    Returns:
      HTML with its style and its plots in it.

    Raises:
      KeyError: A picture is not in `drawn`.
    """
    blocks = [block for section in sections for block in section.blocks]
    drawings = {each.name: _svg(each, drawn[each.name]) for each in blocks if isinstance(each, Picture)}
    is_wide = any(isinstance(each, Table) and len(each.header) > _WIDE for each in blocks)
    return _template().render(
        title=title,
        lead=lead,
        sections=sections,
        drawings=drawings,
        key_figures=key_figures,
        is_wide=is_wide,
    )


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("ddnp_jax.pipeline.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["inline"] = _inline
    return environment.get_template("page.html")


def _inline(text: str) -> Markup:
    """A text with its **bold** and `code`; everything else in it is shown as it is."""

    def marked(found: re.Match[str]) -> str:
        code, strong = found.groups()
        return f"<code>{code}</code>" if code else f"<strong>{strong}</strong>"

    return Markup(re.sub(r"`([^`]+)`|\*\*(.+?)\*\*", marked, str(escape(text))))


def _svg(picture: Picture, figure: Figure) -> Markup:
    """A plot as an element of the page, in the page's colors."""
    content = io.BytesIO()
    # Letters stay letters, which a reader can select; the same figure is the same text whenever it is drawn.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": _FONT, "svg.hashsalt": picture.name}):
        figure.savefig(content, format="svg", transparent=True, metadata=_NO_METADATA)
    _, _, drawing = content.getvalue().decode().partition("<svg ")
    attributes, _, inner = drawing.partition(">")
    attributes = re.sub(r' ?(?:width|height)="[^"]*"', "", attributes)
    inner = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{picture.name}-", inner)  # of one page, so no two may be the same
    for color, name in _COLORS.items():
        inner = re.sub(rf"((?:fill|stroke): ){color}", rf"\1{name}", inner, flags=re.IGNORECASE)
    label, width = escape(picture.caption), f"{figure.get_size_inches()[0]:g}in"
    return Markup(f'<svg role="img" aria-label="{label}" style="--width: {width}" {attributes}>{inner}')
