"""The one form of all tables in experiments/."""

from collections.abc import Sequence

from tabulate import tabulate


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown, in columns that line up."""
    # Cells are finished texts. As numbers, tabulate would write "0.50" as "0.5".
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
