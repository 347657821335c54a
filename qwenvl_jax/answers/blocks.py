"""A page as a tree of blocks, and the tree as HTML, as plain text and as rows of tables."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TypeGuard

from qwenvl_jax.errors import InputError, shown

Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2

# The report's forms: <div class="KIND">. The text of those in VERBATIM is a notation, not prose.
FORMS = ("formula", "chart", "image", "image caption", "image ocr", "music sheet", "chemical formula", "caption")
VERBATIM = frozenset(("formula", "music sheet", "chemical formula", "code", "math"))
INLINE = {"bold": "b", "italic": "i", "underline": "u", "strike": "s", "sub": "sub", "sup": "sup", "literal": "code"}
INLINE |= {"link": "a", "break": "br", "span": "span", "math": "span", "picture": "img"}
TAGS = {"paragraph": "p", "heading": "h", "list": "ul", "item": "li", "table": "table", "row": "tr", "cell": "td"}
TAGS |= {"code": "pre", "quote": "blockquote", "rule": "hr", "division": "div"} | INLINE | dict.fromkeys(FORMS, "div")


_WRITTEN = ("class", "format", "start", "rowspan", "colspan", "href", "alt")
_PLACES = 100_000  # of one table, after spans are filled


@dataclass(frozen=True, slots=True)
class Block:
    """An element of a page.

    kind: paragraph, heading, list, item, table, row, cell, code, quote, rule, division, one of FORMS, one of INLINE.
    box: (x1, y1, x2, y2) in the text's coordinates, None if the text has none.
    children: blocks and strings. Formulas, music, molecules and code have pictures and one string.
    attributes: what differs from the default: `level` of a heading; `ordered` and `start` of a list; `header`,
        `rowspan` and `colspan` of a cell; `format` of music and molecules; `language` of code; `href` of a link; `alt`
        of a picture; `class` of a division.
    image: which picture of the conversation, from 0. Each <html> or <body> of the text starts the next.
    """

    kind: str
    box: Rectangle | None = None
    children: list["Block | str"] = field(default_factory=list)
    attributes: dict = field(default_factory=dict)
    image: int = 0

    def walk(self) -> Iterator["Block"]:
        """This block and all in it, in reading order."""
        yield self
        for child in self.children:
            if isinstance(child, Block):
                yield from child.walk()


def html(block: Block, boxes: bool = False, parent: str = "") -> str:
    """One block as HTML, with `data-bbox` if asked for. Raises InputError for an unknown kind."""
    tag, attributes = TAGS.get(block.kind), block.attributes
    if tag is None:
        raise InputError(f"a block's kind is {shown(block.kind)}; it must be one of {', '.join(TAGS)}")
    said: dict[str, object] = {}
    if block.kind == "caption" and parent == "table":
        tag = "caption"
    elif block.kind in FORMS:
        said = {"class": block.kind}
    elif block.kind == "heading":
        tag = f"h{attributes.get('level', 1)}"
    elif block.kind == "list" and attributes.get("ordered"):
        tag = "ol"
    elif block.kind == "cell" and attributes.get("header"):
        tag = "th"
    elif block.kind == "math":
        said = {"class": "formula"}
    elif language := attributes.get("language"):
        said = {"class": f"language-{language}"}
    said |= {
        n: attributes[n] for n in ("class", "format", "start", "rowspan", "colspan", "href", "alt") if n in attributes
    }
    if boxes and block.box:
        said["data-bbox"] = " ".join(str(int(x)) if x == int(x) else repr(float(x)) for x in block.box)
    if block.kind == "picture" and not said:
        return "<img/>" if boxes else ""
    opened = tag + "".join(f' {name}="{escape(str(value))}"' for name, value in said.items())
    if block.kind in ("break", "rule", "picture"):
        return f"<{opened}/>"
    inside = [html(c, boxes, block.kind) if isinstance(c, Block) else escape(c, quote=False) for c in block.children]
    if block.kind in FORMS and block.kind in VERBATIM:
        inside = [f"<div>{x}</div>" if isinstance(c, str) else x for c, x in zip(block.children, inside, strict=True)]
    return f"<{opened}>{''.join(inside)}</{tag}>"


def rows(table: Block) -> list[list[str]]:
    """The cells of a table as texts, row by row; see `Document.tables`."""
    lines = [[c for c in row.children if isinstance(c, Block)] for row in table.children if is_kind(row, "row")]
    budget = _PLACES - sum(map(len, lines))
    grid: list[list[str]] = []
    below: dict[int, tuple[int, str]] = {}  # column → (rows that are still covered, text)
    for i, line in enumerate(lines):
        row: list[str] = []
        for cell in [*line, None]:
            end = max(below, default=0) if cell is None and budget > 0 else 0
            while len(row) in below or len(row) < end:
                left, covering = below.pop(len(row), (0, ""))  # a cell above covers the place, or nothing does
                budget -= left == 0
                below |= {len(row): (left - 1, covering)} if left > 1 else {}
                row.append(covering)
            if cell is None:
                break
            wide, high = cell.attributes.get("colspan", 1), cell.attributes.get("rowspan", 1)
            high = min(high or len(lines), len(lines) - i)  # 0: to the end of the table
            if wide * high > max(budget, 1):
                wide = high = 1
            budget -= wide * high - 1
            said = text(cell)
            below |= {len(row) + n: (high - 1, said) for n in range(wide)} if high > 1 else {}
            row += [said] * wide
        grid.append(row)
    width = max(map(len, grid), default=0)
    return [row + [""] * (width - len(row)) for row in grid] if width * len(grid) <= _PLACES else grid


def text(block: Block) -> str:
    """Plain text of one block."""
    if block.kind == "break":
        return "\n"
    if block.kind == "picture":
        return block.attributes.get("alt", "")
    if block.kind == "table":
        return "\n".join(filter(None, (text(child) for child in block.children if isinstance(child, Block))))
    if block.kind == "row":  # a cell once, also one with spans: repeated text would grow with each table in a table
        return "\t".join(" ".join(text(c).split()) for c in block.children if isinstance(c, Block))
    if block.kind == "list":
        first, ordered = block.attributes.get("start", 1), block.attributes.get("ordered")
        items = [
            (f"{first + i}. " if ordered else "- ", text(c))
            for i, c in enumerate(block.children)
            if isinstance(c, Block)
        ]
        return "\n".join(mark + item.replace("\n", "\n" + " " * len(mark)) for mark, item in items)
    pieces: list[str] = []
    was_inline = True
    for child in block.children:
        inline = isinstance(child, str) or child.kind in INLINE
        piece = child if isinstance(child, str) else text(child)
        if piece:
            pieces += [piece] if (inline and was_inline) or not pieces else ["\n", piece]
            was_inline = inline
    return "".join(pieces)


def is_kind(child: "Block | str", kind: str) -> TypeGuard[Block]:
    return isinstance(child, Block) and child.kind == kind
