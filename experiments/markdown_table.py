"""How every table here is written."""

from collections.abc import Sequence

from tabulate import tabulate


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown, in columns that line up."""
    # Cells are texts as they are to be read: tabulate would cut the zeros off "0.50".
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
