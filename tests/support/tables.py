"""Tables in Markdown, read."""


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables' rows in a text, headers too and the lines below them not."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if set("".join(row)) - set("-:")]
