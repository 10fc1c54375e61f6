"""What a report consists of, whichever form it is written in.

Texts are Markdown of two kinds alone: **bold** and `code`.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A paragraph.

    Attributes:
      text: What it says.
      is_warning: Whether it is a warning.
    """

    kind: ClassVar[str] = "paragraph"
    text: str
    is_warning: bool = False


@dataclasses.dataclass(frozen=True)
class Bullets:
    """Sentences, each a point of a list."""

    kind: ClassVar[str] = "bullets"
    sentences: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
      name: Name of its file, without the ending.
      caption: What it shows.
    """

    kind: ClassVar[str] = "picture"
    name: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      header: Name of each column.
      rows: Cells of each line.
      text_columns: Number of first columns that hold text; the others hold figures.
      has_total: Whether the last line sums up those above it.
    """

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    has_total: bool = False

    @property
    def body(self) -> Sequence[Sequence[str]]:
        """The lines without the total."""
        return self.rows[:-1] if self.has_total else self.rows

    @property
    def total(self) -> Sequence[str]:
        """The line that sums up; nothing where there is none."""
        return self.rows[-1] if self.has_total else ()


Block = Paragraph | Bullets | Picture | Table


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      heading: Its heading; "" for the first part, which stands below the title.
      blocks: What it consists of.
    """

    heading: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class KeyFigure:
    """One of the few figures that a result comes to.

    Attributes:
      name: What it is.
      value: The figure with its unit.
      remarks: What it is compared with, and what else belongs to it.
    """

    name: str
    value: str
    remarks: Sequence[str]
