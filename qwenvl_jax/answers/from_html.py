"""HTML from strangers, read into a tree of blocks in linear time.

The reader is our own. The standard library's raises on some texts (`<![x[`, `&#999…;` of thousands of digits), takes
quadratic time on others, and reads broken tags differently from one release of Python to the next. Only what a page
needs gets into the tree, so that nothing else can come out of it: text, numbers, a few words from a tag, and links to
web and mail addresses.
"""

import re
from collections import Counter
from html import unescape

from qwenvl_jax.answers.blocks import FORMS, INLINE, TAGS, VERBATIM, Block, Rectangle

_DEPTH = 20
_HOLDERS = {"list": "item", "table": "row", "row": "cell"}  # what holds nothing but these
_HELD = {child: parent for parent, child in _HOLDERS.items()}
_SAME = {"strong": "b", "em": "i", "del": "s", "strike": "s", "ins": "u", "th": "td", "menu": "ul", "dt": "p"}
_SAME |= {"dd": "p", "tt": "code", "kbd": "code", "samp": "code"} | dict.fromkeys(
    ("h1", "h2", "h3", "h4", "h5", "h6"), "h"
)
_DIVISIONS = ("div", "section", "article", "main", "header", "footer", "aside", "nav", "figure", "figcaption")
_KINDS = {tag: kind for kind, tag in TAGS.items() if kind not in (*FORMS, "math")}
_KINDS |= {"ol": "list", "caption": "caption", "math": "math"} | dict.fromkeys(_DIVISIONS, "division")
_CLASSES = {"figure": "image", "figcaption": "caption", "header": "header", "footer": "footer"}
_DROPPED = ("script", "style", "title", "iframe", "noembed", "noframes", "template", "object")  # with what is in them
_KNOWN = {"thead", "tbody", "tfoot", "html", "body", "head", "center", "font", "small", "big", "label", "abbr", "mark"}
_KNOWN |= {"dl", "colgroup", "col", "ruby", "rb", "rt", "rp", "time", "cite", "form", "input", "wbr", "meta", "link"}
_KNOWN |= {"embed", "base", "svg", "button", "address", "details", "summary", "q", "var", "bdi", "bdo", *_DROPPED}
_TAGS = {*_KINDS, *_SAME, *_KNOWN}
_SPACE = " \t\n\r\f"
_RUN = re.compile(r"[ \t\n\r\f]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_LONG = re.compile(r"&#[xX]?[0-9a-fA-F]{9,};?")  # html.unescape raises for thousands of digits
# A `<` in quotes may stay there unless it could start a tag, so a broken tag ends where the next one starts.
_QUOTED = r""""(?:[^"<]|<(?![a-zA-Z/!?]))*+"|'(?:[^'<]|<(?![a-zA-Z/!?]))*+\'"""
_TOKEN = re.compile(
    rf"""<!--|<[!?][a-zA-Z\[-][^<>]*>?|<(?P<end>/?)(?P<name>[a-zA-Z][\w:.-]*+)"""
    rf"""(?:(?P<rest>(?:[\s/](?:[^<>"']++|{_QUOTED})*+)?)>|(?P<broken>(?:[\s/][^<>]*+)?)(?P<close>>?))"""
)
_ATTRIBUTE = re.compile(r"""([^\s=/"'<>]++)(?:\s*+=\s*+(?:"([^"]*+)"|'([^']*+)'|()["']?([^\s"'>]*+)))?""")
_BARE = re.compile(r"""["']?([^"'a-zA-Z<>]*+)""")  # a box without quotes, or without the second one
_NUMBER = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{0,9})?")
_NUMBERS = re.compile(rf"\s*[\[(]*\s*{_NUMBER.pattern}(?:[\s,;)(\[\]]+{_NUMBER.pattern})*\s*[\])/]*\s*")
_ONLY_BOX = re.compile(f' data-bbox="{" ".join([f"({_NUMBER.pattern})"] * 4)}"')
_PLAIN_REST = re.compile(r"([^<&]*+)</(td|th|li)>")  # of a cell or an item


def read(text: str) -> tuple[list[Block], int]:
    """The blocks of a text, and the number of its boxes, tags and comments that cannot be read."""
    text, cut = re.subn(r"</?\Z", "", _CONTROL.sub("", text.replace("\r\n", "\n")))
    # The last end tag of each name.
    ends = {found[1].lower(): found.start() for found in re.finditer(r"</([a-zA-Z][\w:.-]*+)", text)}
    framed = re.search(r"<(?:html|body)[\s>]|```(?:html|xml)?\s*<", text, re.I) is not None
    page, at, dropped, comments = _Reader(framed), 0, "", text.rfind("-->")
    while found := _TOKEN.search(text, at):
        if not dropped and at < found.start():
            page.text(text[at : found.start()])
        tag, is_end, name, rest, broken = found.group(0, "end", "name", "rest", "broken")
        at, name, rest, is_whole = found.end(), (name or "").lower(), rest or broken or "", tag[-1] == ">"
        if dropped:
            dropped = "" if is_end and name == dropped else dropped
        elif tag == "<!--":
            page.malformed += at > comments
            at = text.index("-->", at) + 3 if at <= comments else at
        elif not name:
            page.malformed += not is_whole
        elif not (is_whole and name in _TAGS and (not rest or "=" in rest)) and not _is_tag(found, name, ends):
            page.text(tag)
        elif is_end:
            page.end(_SAME.get(name, name))
        elif not is_whole and at == len(text):  # cut off
            page.malformed += 1
        elif name not in _DROPPED:
            page.malformed += not is_whole
            plain = _PLAIN_REST.match(text, at) if name in ("td", "th", "li") else None
            if page.start(name, rest, plain[1] if plain and plain[2] == name else None) and plain:
                at = plain.end()
        elif at <= ends.get(name, -1):
            dropped = name
        elif name == "script" or (at := text.find("<", at)) < 0:  # its end is missing
            at = len(text)
    page.text(text[at:])
    page.leave(1)
    return page.stack[0].parts, page.malformed + cut


def _is_tag(found: re.Match, name: str, ends: dict[str, int]) -> bool:
    """Whether it is a tag rather than text such as `a<b` or `#include <stdio.h>`."""
    rest, known = found["rest"] or found["broken"] or "", name in _TAGS
    if found[0].endswith(">"):
        is_prose = len(name) == 1 and rest.strip("/ ") and "=" not in rest
        return bool(found["end"]) or (not is_prose if known else name in ends or "=" in rest)
    if found.end() == len(found.string):
        return known or "=" in rest or any(tag.startswith(name) for tag in (*_KINDS, *_KNOWN) if not rest)
    return known and "=" in rest


class _Open:
    """An element that is being read."""

    __slots__ = ("attributes", "box", "kind", "parts", "reopened", "tag")

    def __init__(self, kind: str, tag: str, box=None, attributes=None):
        self.kind, self.tag, self.box, self.attributes = kind, tag, box, dict(attributes or ())
        self.parts: list = []
        self.reopened = 0  # the last item of a list that was opened again


class _Reader:
    """A stack of open elements, and what to do with the next tag or text.

    The stack is always a tree that `html` can write: a cell is in a row, a row in a table, an item in a list;
    paragraphs and inline elements hold no blocks.
    """

    def __init__(self, framed: bool):
        self.stack = [_Open("page", "")]
        self.malformed = self.image = 0
        self.outside = framed  # where text is what the model says about the page
        self.open: Counter[str] = Counter()  # tags on the stack
        self.refused: list[str] = []  # tags that are too deep
        self.pages: Counter[str] = Counter()
        self.nested = self.verbatim = 0  # open elements that nest, and that are in VERBATIM
        self.head = False  # in <thead>

    def leave(self, index: int) -> None:
        """Closes the elements from this place of the stack on."""
        while len(self.stack) > index:
            node = self.stack.pop()
            self.open[node.tag] -= 1
            self.nested -= node.kind not in _HELD
            self.verbatim -= node.kind in VERBATIM
            block = Block(node.kind, node.box, self._children(node), node.attributes, self.image)
            if block.children or block.box or block.kind in _HELD or block.kind in FORMS:
                self.stack[-1].parts.append(block)

    def _children(self, node: _Open) -> list:
        if self.verbatim or not node.parts:
            return node.parts
        if node.kind in VERBATIM:
            text = _flat(node.parts, powers=node.kind in ("formula", "math"))
            text = re.sub(r"^(?:[ \t]*\n)+", "", text).rstrip(_SPACE) if node.kind == "code" else text.strip(_SPACE)
            pictures = [p for b in node.parts if isinstance(b, Block) for p in b.walk() if p.kind == "picture"]
            return [*pictures, text] if text else pictures
        if len(node.parts) == 1 and isinstance(text := node.parts[0], str):
            text = _RUN.sub(" ", text)
            text = text if node.kind in INLINE else text.strip(" ")
            return [text] if text else []
        parts: list = []
        for part in node.parts:
            if isinstance(part, str) and parts and isinstance(parts[-1], list):
                parts[-1].append(part)
            else:
                parts.append([part] if isinstance(part, str) else part)
        if node.kind in INLINE:
            return [_RUN.sub(" ", "".join(p)) if isinstance(p, list) else p for p in parts]
        children: list = []
        for i, part in enumerate(parts):
            if isinstance(part, list):
                part = _RUN.sub(" ", "".join(part))
                part = part.lstrip(" ") if i == 0 or _breaks(parts[i - 1]) else part
                part = part.rstrip(" ") if i == len(parts) - 1 or _breaks(parts[i + 1]) else part
            if part:
                children.append(part)
        return children

    def push(self, kind: str, tag: str, box=None, attributes=None) -> bool:
        """Opens an element; False if it would be too deep."""
        if kind not in _HELD:
            if self.nested >= _DEPTH:
                return False
            self.nested += 1
        self.stack.append(_Open(kind, tag, box, attributes))
        self.open[tag] += 1
        self.verbatim += kind in VERBATIM
        return True

    def start(self, name: str, rest: str, plain: str | None = None) -> bool:
        """Opens an element. plain: all that it has, if that is only text; then it may be closed at once, and True."""
        if name in ("html", "body"):
            self.leave(1)
            self.pages[name] += 1
            self.image, self.outside = max(self.pages.values()) - 1, False
        elif name in ("thead", "tbody", "tfoot"):
            self.head = name == "thead"
            if table := self.nearest("table"):
                self.leave(table + 1)
        elif name == "input" and re.search("checkbox|radio", rest, re.I):
            self.text("☑ " if re.search("checked", rest, re.I) else "☐ ")
        kind, attributes, box, readable = (not rest and _BARE_TAGS.get(name)) or _described(name, rest)
        if kind is None or (self.outside and kind in INLINE):
            return False
        if kind == "link":
            self.end("a")
        if kind == "cell" and self.head:
            attributes = attributes | {"header": True}
        self.malformed += not readable
        if kind in ("break", "picture") and (len(self.stack) == 1 or self.verbatim):
            settled = kind == "picture" or self.verbatim
        elif _HELD.get(kind) == self.stack[-1].kind:
            settled = True
            if plain is not None and not self.refused:
                inner = _RUN.sub(" ", plain).strip(" ")
                self.stack[-1].parts.append(Block(kind, box, [inner] if inner else [], dict(attributes), self.image))
                return True
        else:
            settled = self.settle(kind, name, attributes)
        if kind in ("break", "picture", "rule"):
            if settled:
                self.stack[-1].parts.append(Block(kind, box, [], dict(attributes), self.image))
        elif not settled or not self.push(kind, _SAME.get(name, name), box, attributes):
            self.refused.append(_SAME.get(name, name))
        return False

    def settle(self, kind: str, name: str, attributes: dict) -> bool:
        """Closes what cannot hold an element, and opens what it must be in; False if that would be too deep."""
        if self.verbatim:
            if kind == "literal" and (code := self.nearest("code")):
                self.stack[code].attributes |= attributes
            if kind in INLINE or (kind == "division" and not attributes):
                return True
            self.leave(next(i for i, node in enumerate(self.stack) if node.kind in VERBATIM))
        if kind in INLINE:
            return self.fill()
        self.outside = False
        index = len(self.stack)
        while (last := self.stack[index - 1].kind) in INLINE or last in ("paragraph", "heading"):
            index -= 1
        self.leave(index)
        top = self.stack[-1]
        if name == "caption" and (table := self.nearest("table")):
            self.leave(table + 1)
        elif kind in _HELD:
            return self.hold(kind)
        elif kind == top.kind == "list":  # a list in a list belongs to the item before it
            again = top.reopened < len(top.parts)  # once, so that the time stays linear
            top.reopened = len(top.parts)
            item = top.parts.pop() if again else Block("item")
            self.push("item", "li", item.box, item.attributes)
            self.stack[-1].parts = item.children
        elif top.kind in _HOLDERS:  # the end tag of a list or table is missing
            self.leave(self.nearest("list" if top.kind == "list" else "table"))
        return True

    def hold(self, kind: str) -> bool:
        """Opens the row, table or list that an element must be in, if none is open."""
        parent = _HELD[kind]
        for i in range(len(self.stack) - 1, 0, -1):
            open_kind = self.stack[i].kind
            if open_kind == parent or (kind == "cell" and open_kind == "table"):
                self.leave(i + 1)
                return open_kind == parent or self.push("row", "tr")
            if kind == "item" and open_kind == "cell":
                break
        return self.settle(parent, "", {}) and self.push(parent, TAGS[parent])

    def fill(self) -> bool:
        """Opens the paragraph, item or cell that a text must be in."""
        if len(self.stack) == 1:
            self.push("paragraph", "p")
        while (kind := self.stack[-1].kind) in _HOLDERS:
            self.push(_HOLDERS[kind], TAGS[_HOLDERS[kind]])
        return True

    def nearest(self, kind: str) -> int:
        """The place on the stack of the innermost open element of this kind, or 0."""
        return next((i for i in range(len(self.stack) - 1, 0, -1) if self.stack[i].kind == kind), 0)

    def end(self, tag: str) -> None:
        if self.refused and self.refused[-1] == tag:
            self.refused.pop()
        elif tag in ("html", "body"):
            self.leave(1)
            self.outside = True
        elif tag == "thead":
            self.head = False
        elif self.open[tag] > 0:
            for i in range(len(self.stack) - 1, 0, -1):
                node = self.stack[i]
                if node.tag == tag:
                    return self.leave(i)
                ends_outside = (node.kind, tag) in (("table", "tr"), ("table", "td"), ("list", "li"))
                if ends_outside or (node.kind == "cell" and tag not in ("tr", "td", "table")):
                    return None

    def text(self, text: str) -> None:
        if not self.verbatim:
            if len(self.stack) == 1 and (self.outside or text.lstrip(_SPACE).startswith("```")):
                self.outside = self.outside or bool(text.strip(_SPACE))
                return
            if text.strip(_SPACE):
                self.fill()
            elif len(self.stack) == 1 or self.stack[-1].kind in _HOLDERS:
                return
        if text:
            self.stack[-1].parts.append(_plain(text))


def _plain(text: str) -> str:
    """The text of HTML text: entities are replaced."""
    return _CONTROL.sub("", unescape(_LONG.sub("\ufffd", text))) if "&" in text else text


def _breaks(part) -> bool:
    """Whether the text beside it ends a line."""
    return isinstance(part, Block) and (part.kind == "break" or part.kind not in INLINE)


def _flat(parts: list, powers: bool) -> str:
    """The text of a notation, line by line; <sup> and <sub> as in LaTeX if `powers`."""
    out: list[str] = []
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        elif part.kind == "break":
            out.append("\n")
        elif inner := _flat(part.children, powers):
            if powers and part.kind in ("sub", "sup"):
                inner = f"{'_' if part.kind == 'sub' else '^'}{{{inner}}}"
            out.append("\n" + inner if out and part.kind not in INLINE else inner)
    return "".join(out)


def _said(rest: str) -> dict[str, str]:
    """The attributes of a tag, the first of each name."""
    said: dict[str, str] = {}
    for found in _ATTRIBUTE.finditer(rest if "=" in rest else ""):
        name, value = found[1].lower().removeprefix("data-"), found[2] or found[3] or found[5] or ""
        if name in ("bbox", "polygon") and found[4] is not None and (bare := _BARE.match(rest, found.end(4))):
            value = bare[1]
        said.setdefault(name, _RUN.sub(" ", _plain(value)).strip())
    return said


def _described(name: str, rest: str) -> tuple[str | None, dict, Rectangle | None, bool]:
    """(kind, attributes, box, whether the box can be read) of an element."""
    if (bare := _BARE_TAGS.get(name)) and (placed := _ONLY_BOX.fullmatch(rest)):
        a, b, c, d = map(float, placed.groups())
        return *bare[:2], (min(a, c), min(b, d), max(a, c), max(b, d)), True
    said = _said(rest)
    return *_kind(name, said), *_box(said)


def _kind(name: str, said: dict[str, str]) -> tuple[str | None, dict]:
    """The kind of an element and its attributes; None for a tag that means nothing here."""
    kind = _KINDS.get(_SAME.get(name, name))
    words = ""
    if shown := said.get("class", _CLASSES.get(name)):
        words = " ".join(re.sub(r"[^\w .+#-]+", "", shown)[:64].split())
        form = words.lower().replace("_", " ").partition(".")[0]
        if kind == "span" and form == "formula":
            kind = "math"
        elif kind in ("division", "paragraph") and form in (*FORMS, "code"):
            kind = form
    if kind == "math" and said.get("display") == "block":
        kind = "formula"
    kept: dict[str, object] = {}
    if kind == "heading":
        kept = {"level": int(name[1])} if name[1:] not in ("", "1") else {}
    elif kind == "list" and name == "ol":
        kept = {"ordered": True}
        if re.fullmatch("[0-9]{1,9}", said.get("start", "")) and int(said["start"]) != 1:
            kept["start"] = int(said["start"])
    elif kind == "cell":
        kept = {"header": True} if name == "th" else {}
        for span, most in (("rowspan", 65534), ("colspan", 1000)):  # the limits of HTML
            if (digits := said.get(span)) and re.fullmatch("[0-9]+", digits):
                count = min(int(digits.lstrip("0")[:9] or 0), most)
                kept |= {span: count} if count > 1 or (span == "rowspan" and count == 0) else {}
    elif kind == "link":
        return ("link", {"href": said["href"]}) if _is_safe(said.get("href", "")) else (None, {})
    elif kind in ("code", "literal"):
        kept = {"language": language[1]} if (language := re.search(r"lang(?:uage)?-([\w+#.-]+)", words)) else {}
    elif kind == "division" and words:
        kept = {"class": words}
    elif name_of := {"music sheet": "format", "chemical formula": "format", "picture": "alt"}.get(kind or ""):
        kept = {name_of: said[name_of]} if said.get(name_of) else {}
    return kind, kept


def _is_safe(link: str) -> bool:
    """Whether a link is to a web or mail address, or within the document."""
    link = re.sub(r"[\x00-\x20\x7f-\x9f]+", "", unescape(link)).lower()
    return link.startswith(("http://", "https://", "mailto:", "#"))


def _box(said: dict[str, str]) -> tuple[Rectangle | None, bool]:
    """The box of an element, and whether what it says of one can be read. A polygon becomes the box around it."""
    value = said.get("bbox", said.get("polygon"))
    if value is None:
        return None, True
    numbers = [float(n) for n in _NUMBER.findall(value)] if _NUMBERS.fullmatch(value) else []
    if len(numbers) != 4 and ("bbox" in said or len(numbers) < 6 or len(numbers) % 2):
        return None, False
    return (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])), True


_BARE_TAGS = {name: (*_kind(name, {}), None, True) for name in _TAGS}
