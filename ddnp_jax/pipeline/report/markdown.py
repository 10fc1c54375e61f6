"""A report in Markdown."""

from collections.abc import Iterator, Sequence
from typing import assert_never

from ddnp_jax.pipeline.report.blocks import Block, Bullets, Paragraph, Picture, Section, Table


def document(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole report.

    Args:
      title: Its title.
      lead: What it says first.
      sections: Its parts.
    """
    return "\n\n".join([f"# {title}", lead, *_parts(sections)]) + "\n"


def _parts(sections: Sequence[Section]) -> Iterator[str]:
    for section in sections:
        if section.heading:
            yield f"## {section.heading}"
        yield from map(_block, section.blocks)


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return block.text
        case Bullets():
            return "\n".join(f"- {sentence}" for sentence in block.sentences)
        case Picture():
            return f"![{block.caption}]({block.name}.png)"
        case Table():
            return table(block.header, block.rows, block.text_columns)
        case _:
            assert_never(block)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table whose source is aligned too; the columns after the first `text_columns` are figures."""
    header, *rows = ([cell.replace("|", r"\|") for cell in line] for line in (header, *rows))
    lengths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]  # "-:" is the shortest rule
    sides = ["<"] * text_columns + [">"] * (len(header) - text_columns)
    rule = ["-" * n if side == "<" else "-" * (n - 1) + ":" for n, side in zip(lengths, sides, strict=True)]
    lines = [
        " | ".join(f"{cell:{side}{n}}" for cell, side, n in zip(line, sides, lengths, strict=True))
        for line in (header, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)
