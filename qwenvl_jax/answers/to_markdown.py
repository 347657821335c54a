"""A tree of blocks as GitHub's Markdown.

What a page says is text, so each character that Markdown would read is escaped. Formulas are the exception: $…$, $$…$$,
\\(…\\) and \\[…\\] stay LaTeX, but a `<` in them cannot start a tag.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from qwenvl_jax.answers.blocks import FORMS, INLINE, Block, html, is_kind, text

_TEX = r"(?:[^\\]|\\(?![()\[\]])[\s\S])++"
_MATH = re.compile(
    rf"\$\$((?:[^$\\]|\\[\s\S])++)\$\$|\$(?![\s$])((?:[^$\\]|\\[\s\S])++)(?<!\s)\$(?![0-9])"
    rf"|\\\(({_TEX})\\\)|\\\[({_TEX})\\\]"
)
_SPECIAL = re.compile(r"[\\`*\[\]<~$]|&(?=#|[a-zA-Z])|_+")
_LINE = re.compile(r"#{1,6}(?=\s|$)|>|[-+](?=\s|$)|(?=[-=:|])[-=:| ]+$|[0-9]{1,9}(?=[.)](?:\s|$))")
_EMPHASIS = {"bold": "**", "italic": "*", "strike": "~~"}
_NOTATIONS = {"music sheet": "abc", "chemical formula": "smiles"}


def write(blocks: Sequence["Block | str"], tight: bool = False) -> str:
    """Blocks as Markdown; loose text and inline elements become paragraphs.

    tight: in an item, whose lists follow its text without an empty line.
    """
    gathered: list[Block] = []
    for block in blocks:
        if isinstance(block, Block) and block.kind not in INLINE:
            gathered.append(block)
        elif gathered and gathered[-1].kind == "":
            gathered[-1].children.append(block)
        else:
            gathered.append(Block("", None, [block]))
    out, before = "", ""  # what the last block was: a list's marker, or its kind
    for block in gathered:
        kind = block.kind or "paragraph"
        if kind == "list":
            kind = _mark(block, other=_mark(block, other=False) == before)
        piece = _list(block, kind) if block.kind == "list" else _block(kind, block)
        if piece:
            follows = tight and before == "paragraph" and re.match(r"(?:[-*]|1[.)]) +\S", piece)
            out += ("\n" if follows else "\n\n" if out else "") + piece
            before = kind
    return out


def _block(kind: str, block: Block) -> str:
    children = block.children
    if kind == "paragraph":
        return _paragraph(children)
    if kind == "heading":
        line = re.sub(r"(#+)$", r"\\\1", _inline(children, " "))
        return f"{'#' * block.attributes.get('level', 1)} {line}" if line else ""
    if kind == "table":
        return _table(block)
    if kind == "quote":
        return "\n".join(f"> {line}".rstrip() for line in write(children).split("\n")) if children else ""
    if kind == "rule":
        return "___"  # `---` after a list's marker would be a rule for the whole line
    if kind == "code":
        return _fence(text(block), block.attributes.get("language", ""))
    if kind not in FORMS or kind == "caption":
        return write(children)
    pictures = [block, *(c for c in children if is_kind(c, "picture"))]
    about: list[str] = []
    if kind.startswith("image") or kind == "chart":
        placed = next((p for p in pictures if p.box), block)
        about = [_comment(placed), *filter(None, (_inline([p.attributes.get("alt", "")]) for p in pictures))]
    rest = [c for c in children if not is_kind(c, "picture")]
    notation = "".join(c for c in rest if isinstance(c, str))
    if kind == "formula":
        return _formula(notation)
    about.append(_fence(notation, _NOTATIONS[kind]) if kind in _NOTATIONS else write(rest))
    return "\n\n".join(filter(None, about))


def _comment(picture: Block) -> str:
    box = ", ".join(f"{x:g}" if x != int(x) else str(int(x)) for x in picture.box or ())
    return f"<!-- Image ({box}) -->" if box else "<!-- Image -->"


def _fence(code: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{ticks}{language}\n{code}\n{ticks}" if code else ""


def _formula(formula: str) -> str:
    """A formula in lines of its own; what has more than one formula, or words around it, is a paragraph."""
    tex = _tex(formula)
    if re.search(r"(?<!\\)\$", tex) or _MATH.search(tex):
        return _paragraph([formula])
    lines = [_no_tags(line.strip()) for line in tex.split("\n") if line.strip()]
    body = ("\n" if "%" in tex else " ").join(lines)  # after % comes a comment
    around = "" if any(re.match(r"[`~#>+*=|_-]|[0-9]+[.)]", line) for line in lines) else "\n"
    return f"$${around}{body}{around}$$" if body else ""


def _tex(formula: str) -> str:
    """A formula without what marks it as one."""
    tex = formula.strip()
    for start, end in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")):
        if len(tex) > len(start + end) and tex.startswith(start) and tex.endswith(end):
            return tex[len(start) : -len(end)].strip()
    return tex[2:].strip() if re.match(r"\$\$[^$]*$|\\\[", tex) else tex  # cut off


def _no_tags(tex: str) -> str:
    return re.sub(r"<(?=[a-zA-Z/!?])", "< ", tex)


# --- lists and tables -----------------------------------------------------------------------------------


def _mark(block: Block, other: bool) -> str:
    """The marker of a list; another one keeps it apart from a list before it."""
    return (")" if other else ".") if block.attributes.get("ordered") else ("*" if other else "-")


def _list(block: Block, mark: str) -> str:
    number = min(block.attributes.get("start", 1), 999_000_000)
    items = []
    for i, item in enumerate(block.children):
        start = f"{number + i}{mark} " if mark in ".)" else f"{mark} "
        content = write(item.children if isinstance(item, Block) else [item], tight=True)
        items.append((start + re.sub(r"\n(?=[^\n])", "\n" + " " * len(start), content)).rstrip())
    return ("\n\n" if any("\n\n" in item for item in items) else "\n").join(items)


def _table(block: Block) -> str:
    rows = [[c for c in row.children if isinstance(c, Block)] for row in block.children if is_kind(row, "row")]
    cells = [[_cell(cell) for cell in row] for row in rows]
    if not any(cells):
        return write([c for c in block.children if is_kind(c, "caption")])
    if any(cell is None for row in cells for cell in row):
        return html(block).replace("\n", "&#10;")  # an empty line would end the HTML
    captions = write([c for c in block.children if is_kind(c, "caption")])
    width = max(map(len, cells))
    cells[0] += [""] * (width - len(cells[0]))  # Markdown leaves out what is right of the header
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in cells]
    lines.insert(1, "|" + " --- |" * width)
    return f"{captions}\n\n" * bool(captions) + "\n".join(lines)


def _cell(cell: Block) -> str | None:
    """A cell in one line, or None if Markdown has no form for it."""
    if "rowspan" in cell.attributes or "colspan" in cell.attributes:
        return None
    lines: list[list] = [[]]
    for child in cell.children:
        if isinstance(child, str) or child.kind in INLINE:
            lines[-1].append(child)
        elif child.kind in ("paragraph", "heading"):
            lines += [child.children, []]
        elif child.kind == "formula":
            lines += [[Block("math", None, child.children)], []]
        else:
            return None
    pieces = [_inline(line, "<br>") for line in lines]
    return "<br>".join(filter(None, pieces)).replace("|", "\\|")


# --- text -----------------------------------------------------------------------------------------------


def _paragraph(children: Sequence["Block | str"]) -> str:
    """A paragraph. Its pictures stand before it: a comment at the start of a line would hide the rest of the line."""
    pictures = [p for c in children if isinstance(c, Block) for p in c.walk() if p.kind == "picture"]
    lines = (line.strip(" ") for line in _inline(children, "\\\n", pictures=False).split("\n"))
    prose = "\n".join(_LINE.sub(_escaped_line, line, count=1) if _LINE.match(line) else line for line in lines)
    about = [piece for p in pictures for piece in (_comment(p), _inline([p.attributes.get("alt", "")]))]
    return "\n\n".join(filter(None, [*about, prose]))


def _escaped_line(found: re.Match) -> str:
    return f"{found[0]}\\" if found[0][0].isdigit() else f"\\{found[0]}"


def _inline(children: Sequence["Block | str"], line_break: str = "\\\n", pictures: bool = True) -> str:
    """Text and inline elements, with no space or break at the ends."""
    kept = list(_unwrapped(children))
    for end in (0, -1):
        while kept and (is_kind(kept[end], "break") or kept[end] == " "):
            kept.pop(end)
    return _run(kept, line_break, pictures, "").strip(" ")


def _unwrapped(children: Sequence["Block | str"]) -> Iterator["Block | str"]:
    """What stands in spans, in place of the spans."""
    for child in children:
        if isinstance(child, Block) and (child.kind == "span" or child.kind not in INLINE):
            yield from _unwrapped(child.children)
        else:
            yield child


def _run(children: Sequence["Block | str"], line_break: str, pictures: bool, within: str) -> str:
    out = ""
    for i, child in enumerate(children := list(_unwrapped(children))):
        if isinstance(child, str):
            out += _escaped(child)
            continue
        inner = _run(child.children, line_break, pictures, within or child.kind)
        core = inner.strip(" ")
        lead, trail = inner[: len(inner) - len(inner.lstrip(" "))], inner[len(inner.rstrip(" ")) :] if core else ""
        if child.kind == "break":
            out = out[:-1] if out.endswith(" ") else out
            out += line_break
        elif child.kind == "picture":
            out += _comment(child) + _escaped(child.attributes.get("alt", "")) if pictures else ""
        elif child.kind == "math":
            out += _escaped(f"${_tex(text(child))}$")
        elif child.kind == "literal":
            out += _literal(text(child))
        elif not core.replace(line_break.strip(" "), "").strip():
            out += inner
        elif child.kind == "link":
            out += f"{lead}[{core}]({_address(child.attributes.get('href', ''))}){trail}" if within != "link" else inner
        else:
            mark, follows = _EMPHASIS.get(child.kind, ""), children[i + 1] if i + 1 < len(children) else ""
            after = trail or (follows if isinstance(follows, str) else "*")
            if mark and within not in _EMPHASIS and _can_mark(lead or out[-1:], core, after):
                out += f"{lead}{mark}{core}{mark}{trail}"
            else:
                tag = {"bold": "strong", "italic": "em", "strike": "del"}.get(child.kind, INLINE[child.kind])
                out += f"{lead}<{tag}>{core}</{tag}>{trail}"
    return out


def _can_mark(before: str, core: str, after: str) -> bool:
    """Whether Markdown reads ** between these as the start and the end of emphasis."""

    def apart(char: str) -> bool:
        return not char or char in " \n" or (unicodedata.category(char)[0] == "P" and char not in "*~")

    opens = core[0].isalnum() or apart(before[-1:])
    closes = core[-1].isalnum() or apart(after[:1])
    beside = core[:2] == "\\\n" or core[-1] == "\n" or before[-1:] in list("*~") or after[:1] in list("*~")
    return opens and closes and not beside


def _escaped(prose: str) -> str:
    """Text with all that Markdown would read escaped, but for formulas."""
    out, at = [], 0
    for found in _MATH.finditer(prose := re.sub(r"[\t\n\r\f]", " ", prose)):
        tex = next(part for part in found.groups() if part is not None)
        if "`" in tex or ("$" in tex and (found[3] or found[4])):
            continue  # Markdown would read code, or another formula
        mark = "$$" if found[1] or found[4] else "$"
        out += [_escape(prose[at : found.start()]), mark, _no_tags(tex.strip()), mark]
        at = found.end()
    return "".join([*out, _escape(prose[at:])])


def _escape(prose: str) -> str:
    def one(found: re.Match) -> str:
        if found[0][0] != "_":
            return "\\" + found[0]
        sides = prose[max(found.start() - 1, 0) : found.start()], prose[found.end() : found.end() + 1]
        return found[0] if all(side.isalnum() for side in sides) else "\\_" * len(found[0])

    return _SPECIAL.sub(one, prose)


def _literal(code: str) -> str:
    code = " ".join(code.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", code)), default=0))
    pad = " " if code[:1] == "`" or code[-1:] == "`" else ""
    return f"{ticks}{pad}{code}{pad}{ticks}" if code else ""


def _address(link: str) -> str:
    """A link's address as Markdown writes it; an entity in it would be read as what it stands for."""
    link = re.sub(r"[\s<>\\`|()]", lambda found: f"%{ord(found[0]):02X}", link)
    return re.sub(r"&(?=#?\w+;)", "&amp;", link)
