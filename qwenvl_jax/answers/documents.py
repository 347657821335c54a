"""QwenVL-HTML: the pages that an answer describes, as a tree of blocks with their boxes.

Qwen2.5-VL writes a page as HTML in reading order, and each element says where it stands (arXiv:2502.13923, 2.2.1):

    <html><body>
    <h2 data-bbox="x1 y1 x2 y2">…</h2> <p data-bbox="x1 y1 x2 y2">…</p>
    <div class="formula" data-bbox="x1 y1 x2 y2"><img data-bbox="x1 y1 x2 y2"/><div>$$…$$</div></div>
    </body></html>

Qwen3-VL also writes Markdown with the boxes of pictures and tables (`answers/from_markdown.py`). `parse` reads both.
Answers are untrusted: the tree holds text, numbers and links to web and mail addresses, nothing else.

    page = parse(answer).converted([boxes.sizes(visual, config)], "resized")
    page.markdown(), page.tables(), [(block.kind, block.box) for block in page.walk()]
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwenvl_jax.answers import blocks, from_html, from_markdown, to_markdown
from qwenvl_jax.answers.blocks import Block
from qwenvl_jax.answers.boxes import Sizes, check_coordinates
from qwenvl_jax.errors import InputError, shown

_HTML = re.compile(r"<(?:html|body)[\s>]|data-bbox|```(?:html|xml)\s*<|\A\s*<(?!!--|think)", re.I)  # or it is Markdown

_CODE = re.compile(r"(<pre\b[^<>]*>\s*)?(<code\s+class\b[^<>]*>(?=[^<]*+</code>)[^<\n]*+\n[^<]*+</code>)")
_THINKS = re.compile(r"\s*<think(?:ing)?>")
_THOUGHT = re.compile(r"(?<![\\`])</think(?:ing)?>")


@dataclass(frozen=True, slots=True)
class Document:
    """The pages of an answer. malformed: boxes that are not four numbers, and tags and comments that do not end."""

    blocks: list[Block]
    malformed: int = 0

    def walk(self) -> Iterator[Block]:
        """All blocks, in reading order."""
        for block in self.blocks:
            yield from block.walk()

    def markdown(self) -> str:
        """GitHub's Markdown, formulas as $…$. A picture is Qwen3-VL's comment, <!-- Image (x1, y1, x2, y2) -->.

        A table with spans, or with blocks in its cells, is an HTML table.
        """
        return to_markdown.write(self.blocks)

    def html(self) -> str:
        """HTML without boxes, one top-level element a line. It has no scripts, styles, events, ids or pictures."""
        return "\n".join(filter(None, (blocks.html(block) for block in self.blocks)))

    def text(self) -> str:
        """Plain text: blocks are separated by empty lines, cells by tabs."""
        return "\n\n".join(filter(None, map(blocks.text, self.blocks)))

    def tables(self) -> list[list[list[str]]]:
        """The rows of each table, as texts, with those in cells and charts.

        A cell with a span stands in every place that it covers, and short rows are filled with "", while the table
        has at most 100,000 places.
        """
        return [blocks.rows(block) for block in self.walk() if block.kind == "table"]

    def qwenvl(self) -> str:
        """QwenVL-HTML, which `parse` reads back as the same blocks. Raises InputError for unknown kinds and images."""
        if lost := next((block for block in self.blocks if block.image < 0), None):
            raise InputError(f"{shown(lost)} is in picture {lost.image}; pictures count from 0: correct its image")
        pages: list[list[str]] = [[] for _ in range(max((block.image for block in self.blocks), default=0) + 1)]
        for block in self.blocks:
            pages[block.image].append(blocks.html(block, boxes=True))
        return "\n".join("\n".join(["<html><body>", *page, "</body></html>"]) for page in pages)

    def converted(self, pictures: Sequence[Sizes], source: str, target: str = "original") -> "Document":
        """The document with its boxes in `target` coordinates; what lies outside the page is moved to its edge.

        pictures: those of the conversation. If there is one, every block is in it. Otherwise, a box on a page that has
        no picture is left out and counts as malformed. source: the model's coordinates, one of `boxes.COORDINATES`.
        Raises InputError for unknown coordinates.
        """
        for what, name in (("source", source), ("target", target)):
            check_coordinates(str(name), what)
        lost = 0

        def convert(block: Block) -> Block:
            nonlocal lost
            image, box = 0 if len(pictures) == 1 else block.image, block.box
            is_there = 0 <= image < len(pictures)
            lost += box is not None and not is_there
            if box and is_there:
                (w, h), (wide, high) = pictures[image].of(source), pictures[image].of(target)
                x1, x2 = (min(max(x * wide / w, 0.0), float(wide)) for x in box[::2])
                y1, y2 = (min(max(y * high / h, 0.0), float(high)) for y in box[1::2])
                box = (x1, y1, x2, y2)
            children = [child if isinstance(child, str) else convert(child) for child in block.children]
            return replace(block, box=box if is_there else None, children=children, image=image)

        converted = [convert(block) for block in self.blocks]
        return Document(converted, self.malformed + lost)


def parse(text: str) -> Document:
    """The pages in an answer, in QwenVL-HTML or in Qwen3-VL's Markdown; never raises.

    Tags may be cut off, missing or wrongly nested. What surrounds <html>, <body> or a ```html fence is left out.
    Thinking before `</think>` is left out, also if it does not end. Nesting deeper than 20 is flattened.
    """
    if thought := _THOUGHT.search(text):
        text = text[thought.end() :]
    elif _THINKS.match(text):
        text = ""
    text = text if _HTML.search(text) else from_markdown.to_html(text)
    # Lines of code in a language are a block, also without <pre>.
    return Document(*from_html.read(_CODE.sub(lambda m: m[0] if m[1] else f"<pre>{m[0]}</pre>", text)))
