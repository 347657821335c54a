"""Qwen3-VL's Markdown, with the boxes of pictures and tables, as HTML for `from_html.read`.

    <!-- Image (x1, y1, x2, y2) -->
    <!-- Table (x1, y1, x2, y2) -->
    \\begin{tabular}{|l|c|} a & b \\\\ \\hline \\multicolumn{2}{|c|}{c} \\end{tabular}

Also headings, lists, quotes, fences, pipe tables, formulas (with \\begin{align} and the like), and LaTeX's environments
of tables and figures with their captions. HTML in the Markdown stays HTML.
"""

import re
from collections.abc import Callable
from html import escape

_PLACED = re.compile(
    r"\s*<!--\s*(?P<what>Image|Picture|Photo|Figure|Diagram|Chart|Table)\s*"
    r"(?:[:：]?\s*[(\[](?P<box>[^()\[\]]*+(?:[)\]]\s*,?\s*[(\[][^()\[\]]*+)?)[)\]]\s*[:：,-]?(?!->)|(?=-->)|[:：])"
    r"(?P<words>(?:[^-<>]|-(?!->))*+)-->\s*",
    re.I,
)
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_UNDERLINE = re.compile(r" {0,3}(?:={2,}|-{2,})\s*")  # of a heading
_FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})\s*([\w+#.-]*)")
_ITEM = re.compile(r"([ \t]*)(?:[-*+•]|([0-9]{1,9})[.)])(?:[ \t]+|$)(.*)")
_INDENTED = re.compile(r"(?: {4}|\t)(?=.*\S)")
_RULE = re.compile(r" {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}")
_DELIMITERS = re.compile(r"\s*+\|?(?:\s*+:?-++:?\s*+\|)*+(?:\s*+:?-++:?\s*+)?")
_TABULAR = re.compile(r"\s*\\begin\{(?:tabular[x*]?|longtable|array)\}")
_MATH = r"(?P<env>(?:equation|align|alignat|gather|multline|eqnarray|flalign|displaymath|math|split|cases)\*?)"
_EQUATION = re.compile(rf"\s*\\begin\{{{_MATH}\}}")
_DISPLAYED = re.compile(r"\s*\\\[(?:\s*|(?=.*(?:[\^=]|\\[A-Za-z])).*\\\]\s*)\Z")  # other "\[" are brackets
_FLOAT = re.compile(r"\s*\\begin\{((?:wrap)?(?:table|figure)\*?)\}")
_LAYOUT = re.compile(
    r"\\(?:begin|end)\{(?:wrap)?(?:table|figure)\*?\}(?:\[[^\]\n]*+\])?|\\label\{[^{}\n]*+\}"
    r"|\\(?:centering|raggedright|small|footnotesize|scriptsize|tiny)(?![A-Za-z])|\\(?:vspace|hspace)\*?\{[^{}\n]*+\}"
)
_CAPTION = re.compile(r"\\caption\*?(?:\[[^\]\n]*+\])?\{((?:[^{}\\]|\\.|\{[^{}]*+\})*+)\}")
_GRAPHICS = re.compile(r"\\includegraphics(?:\[[^\]\n]*+\])?\{[^{}\n]*+\}")
_MULTI = re.compile(r"\s*\\multi(column|row)\s*\{\s*([0-9]{1,5})\s*\}\s*(?:\[[^\]]*\])?\s*\{(?:[^{}]|\{[^{}]*\})*\}\s*")
_RULES = re.compile(r"\\(?:hline|toprule|midrule|bottomrule)\b|\\c(?:line|midrule)(?:\([lr]*\))?\s*\{[^{}]*\}")
_ROW = re.compile(r"(?:[^\\&]|\\[^\\])++|&|\\\\(?:\s*\[[^\]\n]*\])?")
_INLINE = re.compile(
    r"(?P<tex>\$\$(?:[^$\\]|\\[\s\S])++\$\$|\$(?![\s$])(?:[^$\\\n]|\\.)++(?<!\s)\$(?![0-9])"
    r"|\\\((?:[^\\]|\\[^()])++\\\)"
    rf"|\\begin\{{{_MATH}\}}(?:[^\\]|\\(?!(?:begin|end)\{{(?P=env)\}})[\s\S])*+\\end\{{(?P=env)\}})"
    r"|\\(?P<char>[!-/:-@\[-`{-~])|(?<!`)(?P<ticks>`++)(?P<code>[^`]++)(?P=ticks)(?!`)"
    r"|\*\*(?P<b>(?![\s*])[^*\n]++)\*\*|\*(?P<i>(?![\s*])[^*\n]++)\*|~~(?P<s>[^~\n]++)~~"
    r"|(?P<alt>!?)\[(?P<words>[^\[\]\n]*+)\]\((?P<to>[^()\s]*+)\)"
)
_MARKS = re.compile(r"[$\\`*~\[]")  # one of these begins every inline element


def to_html(markdown: str) -> str:
    """Markdown as HTML."""
    inner = re.sub(r"\A\s*```(?:markdown|md)[ \t]*\n|\n```\s*\Z", "\n", markdown.replace("\r\n", "\n"))
    return _blocks(inner.split("\n"), "")


def _blocks(lines: list[str], place: str) -> str:
    """Lines of Markdown as HTML. place: the box of the next table, as an attribute."""
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if found := _PLACED.match(line):
            numbers, words = re.sub(r"[,()\[\]]", " ", found["box"] or ""), escape(found["words"].strip())
            box = "" if found["box"] is None else f' data-bbox="{escape(numbers)}"'
            is_table = found["what"].lower() == "table"
            if is_table:
                out += [f'<div class="caption">{words}</div>'] if words else []
            else:
                alt = f'<img alt="{words}">' if words else ""
                out.append(f'<div class="image"{box}>{alt}</div>')
            place, lines[at] = box if is_table else place, line[found.end() :]
            continue
        written, at = _block(lines, at, place)
        place = "" if written.startswith("<table") else place
        out.append(written)
    return "\n".join(out)


def _block(lines: list[str], at: int, place: str) -> tuple[str, int]:
    """The block that starts at a line, as HTML, and the line after it."""
    line = lines[at]
    if not line.strip():
        return "", at + 1
    if found := _HEADING.match(line):
        level, words = len(found[1]), found[2].rstrip()
        words = core if (core := words.rstrip("#"))[-1:] in ("", " ", "\t") else words  # closing signs
        return f"<h{level}>{_read(words)}</h{level}>", at + 1
    if found := _FENCE.match(line):
        return _fenced(lines, at, found, found.start(1))
    if found := _EQUATION.match(line):
        begin, close = (f"\\{which}{{{found['env']}}}" for which in ("begin", "end"))
        alone = close in line
        end = at if alone else _until(lines, at + 1, lambda x: close in x or begin in x or not x.strip())
        tex, closed, rest = "\n".join(lines[at : end + 1]).partition(close)
        if closed and tex.count(begin) == 1 and not rest.strip(" .,"):
            return f'<div class="formula">{escape((tex + close).strip())}</div>', end + 1
    if found := _FLOAT.match(line):
        close = f"\\end{{{found[1]}}}"
        end = at if close in line else _until(lines, at + 1, lambda x: close in x or _FLOAT.match(x) is not None)
        end += end < len(lines) and close in lines[end]
        return _float("\n".join(lines[at:end]), place), end
    if _TABULAR.match(line):
        end = _until(lines, at, lambda x: r"\end{" in x)
        return _latex(_TABULAR.sub("", "\n".join(lines[at : end + 1]), count=1), place), end + 1
    if line.lstrip().startswith(("$$", "\\[")):
        start, close = ("$$", "$$") if line.lstrip().startswith("$$") else ("\\[", "\\]")
        alone = close in line.lstrip()[2:]
        end = at if alone else _until(lines, at + 1, lambda x: close in x or start in x or not x.strip())
        tex = "\n".join(lines[at : end + 1]).strip()
        if tex.endswith(close) and tex.count(start) == (2 if start == close else 1):
            return f'<div class="formula">{escape(tex)}</div>', end + 1
    if _RULE.fullmatch(line):
        return "<hr>", at + 1
    if at + 1 < len(lines) and "|" in line and "-" in lines[at + 1] and _DELIMITERS.fullmatch(lines[at + 1]):
        end = _until(lines, at + 2, lambda x: "|" not in x)
        rows = [_pipes(lines[at], "th"), *(_pipes(row, "td") for row in lines[at + 2 : end])]
        return f"<table{place}>{''.join(rows)}</table>", end
    if _ITEM.match(line):
        return _list(lines, at)
    if line.lstrip().startswith(">"):
        end = _until(lines, at, lambda x: not x.lstrip().startswith(">"))
        inner = [re.sub(r"\A(?:\s*>)+ ?", "", x) for x in lines[at:end]]
        is_plain = not any(_starts(x) or not x.strip() for x in inner)
        return f"<blockquote>{_read(' '.join(inner)) if is_plain else _blocks(inner, '')}</blockquote>", end
    if re.match(r"\s*<(?:table|div|ul|ol|pre|p|h[1-6]|figure|details)[\s>]", line, re.I):
        end = _until(lines, at + 1, lambda x: not x.strip() or _PLACED.match(x) is not None)
        raw = "\n".join(lines[at:end])
        return re.sub(r"\A\s*<table\b", f"<table{place}", raw, flags=re.I), end
    if _is_code(lines, at):
        end = _until(lines, at, lambda x: x.strip() != "" and not _INDENTED.match(x))
        code = "\n".join(_INDENTED.sub("", x, count=1) for x in lines[at:end])
        return f"<pre>{escape(code.rstrip())}</pre>", end
    end = _until(lines, at + 1, lambda x: not x.strip() or _starts(x) or _UNDERLINE.fullmatch(x) is not None)
    if end < len(lines) and _UNDERLINE.fullmatch(lines[end]):
        level = 1 if "=" in lines[end] else 2
        return f"<h{level}>{_read(' '.join(x.strip() for x in lines[at:end]))}</h{level}>", end + 1
    text = re.sub(r"(?:(?<! ) {2,}|(?<!\\)\\)\n", "<br>", "\n".join(lines[at:end]))
    return f"<p>{_read(text)}</p>", end


def _until(lines: list[str], at: int, ends: Callable[[str], bool]) -> int:
    return next((i for i in range(at, len(lines)) if ends(lines[i])), len(lines))


def _starts(line: str) -> bool:
    """Whether a line starts a block though no empty line is before it."""
    starts = (_PLACED, _HEADING, _FENCE, _TABULAR, _EQUATION, _FLOAT, _ITEM, _DISPLAYED)
    return any(p.match(line) for p in starts) or line.lstrip().startswith("$$")


def _is_code(lines: list[str], at: int) -> bool:
    """Whether lines are code by their indent: two or more after an empty line, not in a list, and no HTML."""
    if not all(_INDENTED.match(x) for x in lines[at : at + 2]) or at + 2 > len(lines) or lines[at].lstrip()[0] == "<":
        return False
    before = next((lines[i] for i in range(at - 1, -1, -1) if lines[i].strip()), "")
    return (not at or not lines[at - 1].strip()) and not (_ITEM.match(before) or before[:1] in (" ", "\t"))


def _fenced(lines: list[str], at: int, found: re.Match, indent: int, in_list: bool = False) -> tuple[str, int]:
    """The code after a fence, without the fence's indent, and the line after it.

    In a list, code that has no closing fence ends before the next line without an indent.
    """

    def closes(line: str) -> bool:
        return line.strip().startswith(found[1])

    end = _until(lines, at + 1, lambda x: closes(x) or (in_list and x[:1] not in ("", " ", "\t")))
    margin = re.compile(rf"\A[ \t]{{0,{indent}}}")
    code = escape("\n".join(margin.sub("", x) for x in lines[at + 1 : end]))
    closed = end < len(lines) and closes(lines[end])
    return f'<pre><code class="language-{found[2]}">{code}</code></pre>', end + closed


def _float(text: str, place: str) -> str:
    """A LaTeX table or figure with its caption."""
    words = _read(_words(" ".join(" ".join(_CAPTION.findall(text)).split())))
    rest = _GRAPHICS.sub(" ", _LAYOUT.sub(" ", _CAPTION.sub(" ", text)))
    inner = _blocks([line.strip() for line in rest.split("\n")], place).strip("\n")
    if _GRAPHICS.search(text):
        inner = f'<div class="image"></div>{inner}'
    if words and inner.startswith("<table"):
        start, close, cells = inner.partition(">")
        return f"{start}{close}<caption>{words}</caption>{cells}"
    return inner + (f'<div class="caption">{words}</div>' if words else "")


def _read(text: str) -> str:
    """The inline elements of a text as HTML."""

    def one(found: re.Match) -> str:
        if found["env"]:
            return f'<span class="formula">{escape(found["tex"], quote=False)}</span>'
        if found["tex"] or found["char"]:
            return escape(found["tex"] or found["char"], quote=False)
        if found["code"]:
            return f"<code>{escape(found['code'].strip(), quote=False)}</code>"
        for tag in ("b", "i", "s"):
            if found[tag]:
                return f"<{tag}>{_read(found[tag])}</{tag}>"
        if found["alt"]:
            return f'<img alt="{escape(found["words"])}">'
        return f'<a href="{escape(found["to"])}">{_read(found["words"])}</a>'

    return _INLINE.sub(one, text) if _MARKS.search(text) else text


def _pipes(line: str, tag: str) -> str:
    """A row of a pipe table."""
    cells = re.split(r"(?<!\\)\|", re.sub(r"\A\s*\||(?<!\\)\|\s*\Z", "", line))
    return "<tr>" + "".join(f"<{tag}>{_read(cell.replace(chr(92) + '|', '|'))}</{tag}>" for cell in cells) + "</tr>"


def _mark(item: re.Match | None) -> str:
    """The marker of an item, without its number."""
    return item.string[item.end(1) : item.start(3)].strip().lstrip("0123456789") if item else ""


def _list(lines: list[str], at: int) -> tuple[str, int]:
    """A list, and the line after it; an item that is indented deeper starts a list in the item before it."""
    out: list[str] = []
    stack: list[tuple[int, str]] = []  # indent and tag of the open lists
    first = _mark(_ITEM.match(lines[at]))
    while at < len(lines):
        line, found = lines[at], _ITEM.match(lines[at])
        if not line.strip():
            after = lines[at + 1] if at + 1 < len(lines) else ""
            item = _ITEM.match(after)
            is_other = item is not None and not item[1] and _mark(item) != first  # another list
            if is_other or not (item or (after[:1] in (" ", "\t") and _FENCE.match(after))):
                break
            at += 1
            continue
        if not found:
            if line[0] not in " \t":
                break
            if fence := _FENCE.match(line):
                code, at = _fenced(lines, at, fence, fence.start(1), in_list=True)
                out.append(code)
            else:
                out.append(" " + _read(line.strip()))
                at += 1
            continue
        indent, tag = len(found[1].expandtabs(4)), "ol" if found[2] else "ul"
        while stack and (indent < stack[-1][0] or (indent == stack[-1][0] and tag != stack[-1][1])):
            out.append(f"</li></{stack.pop()[1]}>")
        if stack and indent <= stack[-1][0] + 1:
            out.append("</li>")
        else:
            stack.append((indent, tag))
            out.append(f'<{tag} start="{found[2]}">' if found[2] else f"<{tag}>")
        if fence := _FENCE.match(found[3]):
            code, at = _fenced(lines, at, fence, found.start(3), in_list=True)
            out.append(f"<li>{code}")
            continue
        words = re.sub(r"\A\[([ xX])\] ", lambda box: "☐ " if box[1] == " " else "☑ ", found[3])
        out.append(f"<li>{_read(words)}")
        at += 1
    return "".join([*out, *(f"</li></{tag}>" for _, tag in reversed(stack))]), at


def _latex(tabular: str, place: str) -> str:
    """The inside of a LaTeX table, after \begin{tabular}, as an HTML table."""
    body = _RULES.sub(" ", tabular.partition("\\end{")[0])
    body = re.sub(r"\A\s*(?:\[[^\]]*\]|\{(?:[^{}]|\{[^{}]*\})*\}\s*)+", "", body)  # position, width and columns
    rows: list[list[str]] = [[""]]
    for piece in _ROW.findall(body):
        if piece.startswith("\\\\"):
            rows.append([""])
        elif piece == "&":
            rows[-1].append("")
        else:
            rows[-1][-1] += piece
    out: list[str] = []
    covered: dict[int, int] = {}  # column → rows below that a cell with \multirow covers
    for row in rows:
        if len(row) == 1 and not row[0].strip():
            continue
        column, cells = 0, ""
        for cell in row:
            if covered.get(column, 0) > 0 and not cell.strip():
                covered[column] -= 1
                column += 1
                continue
            spans = {"column": 1, "row": 1}
            while "\\multi" in cell and (found := _MULTI.match(cell)):
                spans[found[1]] = max(int(found[2]), 1)
                cell = re.sub(r"\A\{|\}\s*\Z", "", cell[found.end() :])
            wide = min(spans["column"], 1000)
            covered |= {column + n: spans["row"] - 1 for n in range(wide)}
            column += wide
            said = "".join(f' {name}span="{n}"' for name, n in (("col", wide), ("row", spans["row"])) if n > 1)
            cells += f"<td{said}>{_read(_words(cell))}</td>"
        out.append(f"<tr>{cells}</tr>")
    return f"<table{place}>{''.join(out)}</table>"


def _words(cell: str) -> str:
    """LaTeX's commands for the look of a text, as HTML."""
    if "\\" not in cell:
        return cell
    for command, tag in (("textbf", "b"), ("textit", "i"), ("emph", "i"), ("underline", "u")):
        if command in cell:
            cell = re.sub(rf"\\{command}\{{([^{{}}]*+)\}}", rf"<{tag}>\1</{tag}>", cell)
    return cell.replace("\\newline", "<br>")
