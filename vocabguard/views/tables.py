"""Tables in the terminal: where there is little room, whole columns go rather than letters of every cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod
from rich.table import Table
from rich.text import Text

# Blank cells that come with each column, and the one that closes the table.
_GAP, _EDGE = 2, 1


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        words: whether it holds words, which go to the left and wrap between them, instead of numbers.
        spare: columns with the highest are left out first where all do not fit; 0 is always there.
    """

    name: str
    words: bool = False
    spare: int = 0


@dataclass
class Grid:
    """A table whose columns are chosen by the width that there is.

    Attributes:
        rows: their cells; texts are taken as they are, without markup.
        ends: rows with a line below them.
    """

    columns: Sequence[Column]
    rows: list[list[Text]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    def add(self, *cells: str | Text, style: str = "", end: bool = False) -> None:
        """Add a row."""
        if end:
            self.ends.add(len(self.rows))
        self.rows.append([cell if isinstance(cell, Text) else Text(cell) for cell in cells])
        self.styles.append(style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """The table for this width."""
        shown = list(range(len(self.columns)))
        while sum(self._width(i, whole=False) + _GAP for i in shown) + _EDGE > options.max_width:
            spare = max(shown, key=lambda i: self.columns[i].spare)
            if not self.columns[spare].spare:
                break
            shown.remove(spare)
        # Padding on one side of every column: rich's versions count the width of collapsed padding differently.
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
        room = options.max_width - _EDGE - sum(self._width(i, whole=False) + _GAP for i in shown)
        for i in shown:
            words, least = self.columns[i].words, self._width(i, whole=False)
            # rich would take room from any column of words, and cut off what is left over.
            more = max(0, min(room, self._width(i, whole=True) - least))
            room -= more
            justify: JustifyMethod = "left" if words else "right"
            name = self.columns[i].name
            table.add_column(name, justify=justify, no_wrap=not words, overflow="fold", width=least + more)
        for place, (cells, style) in enumerate(zip(self.rows, self.styles, strict=True)):
            chosen = [cells[i] if i < len(cells) else Text("") for i in shown]
            table.add_row(*chosen, style=style, end_section=place in self.ends)
        yield table

    def _width(self, index: int, *, whole: bool) -> int:
        """Cells of the terminal that a column needs for its longest text, or for the longest word of a text."""
        column = self.columns[index]
        texts = [column.name, *(row[index].plain for row in self.rows if index < len(row))]
        if column.words and not whole:
            texts = [word for text in texts for word in text.split(" ")]
        return max(map(cell_len, texts), default=1)
