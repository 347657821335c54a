"""`qwenvl chat`: a conversation at the keyboard; the answers stream.

A thread of its own compiles and computes, so Ctrl-C stops an answer at once. The thread ends after its current step.
"""

import contextlib
import json
import os
import queue
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from qwenvl_jax.cli import converse, drawing
from qwenvl_jax.cli.errors import BAD_INPUT, INTERRUPTED, OK, explain
from qwenvl_jax.errors import InputError, install
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.types import Visual

HELP = "Talk to a model about images and videos."
EXAMPLES = (
    "qwenvl chat",
    "qwenvl chat --model Qwen/Qwen2.5-VL-3B-Instruct --max-pixels 700000 --temperature 0",
)
_KEYS = "/image FILE   /video FILE   /help   /quit   (Ctrl-C stops an answer)"
_HELP = '''\
/image FILE   attach an image (a path, a URL or demo:scene.png) to the next message; without FILE, list what is attached
/video FILE   attach a video
/drop         remove the attachments of the next message
/retry        send the last message again
/draw FILE    draw the objects of the last answer on the image, or on the frames of the video (several: FILE-1, …)
/objects      print it as JSON, in pixels of the image files
/reset        forget the conversation
/quit         end the chat; so do Ctrl-D, and Ctrl-C twice
"""           begin a message of several lines, and end it; with prompt_toolkit, Alt-Enter begins a line
Ctrl-C        stop an answer; what was written so far stays in the conversation'''
_BLOCK = '"""'
_COMPILING = "compiling…"
_SAVE, _RESTORE = "\x1b7", "\x1b8\x1b[K"  # the cursor's place; the second one clears the line behind it


class Attachment(NamedTuple):
    """An opened image or video: later turns do not read the file again."""

    kind: str
    source: str
    visual: Visual
    text: str  # its name, size and tokens
    budget: Budget  # of the message up to here


def add_arguments(parser) -> None:
    converse.add_arguments(parser)
    parser.set_defaults(distributed=False)


def run(args) -> int:
    options = converse.sampling(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    mesh = converse.mesh(args)  # before the model is read: a wrong mesh is an error at once
    where, encode, attach = converse.encoder(args)
    chat = Chat(converse.engine(where, args, mesh), encode, attach, options, opening)
    read = _reader()
    if sys.stdin.isatty():
        print(_KEYS)
    interrupted = False  # whether the last event was a Ctrl-C
    while True:
        try:
            line = _message(read)
        except EOFError:
            return OK
        except KeyboardInterrupt:
            if interrupted:
                print()
                return INTERRUPTED
            print("\nCtrl-C again, or /quit, ends the chat")
            interrupted = True
            continue
        if line == "/quit":
            return OK
        try:
            chat.obey(line)
            interrupted = False
        except KeyboardInterrupt:
            print("\nstopped; Ctrl-C again ends the chat", flush=True)
            interrupted = True


class Chat:
    """The conversation so far, and the message that is being written."""

    def __init__(self, engine, encode: Callable, attach: Callable, options, opening: list[dict]):
        self._engine, self._encode, self._attach, self._options = engine, encode, attach, options
        self._opening = opening
        self._worker: threading.Thread | None = None
        self.reset()

    def reset(self) -> None:
        self._messages, self._sent, self._draft = list(self._opening), list[Attachment](), list[Attachment]()
        self._unsent = ""  # the text of a message without an answer
        self._result: Any = None  # of the last answer, unless it was stopped

    def obey(self, line: str) -> None:
        """Runs a command, or sends a message. Raises KeyboardInterrupt after it has put everything in order."""
        word, _, rest = line.partition(" ")
        if not line:
            return
        if word == "/reset":
            self.reset()
            print("the conversation is empty")
        elif word in ("/image", "/video"):
            self._add(word[1:], rest.strip()) if rest.strip() else self._list()
        elif word == "/drop":
            self._drop()
        elif word == "/retry":
            self._retry()
        elif word in ("/draw", "/objects"):
            self._show(word, rest.strip())
        elif word == "/help":
            print(_HELP)
            if sys.stdin.isatty() and not _prompt_toolkit():
                print(f"For editing of several lines: {install('chat')}")
        elif word.startswith("/") and os.sep not in word[1:]:
            print(f"{word}: no such command\n{_KEYS}")
        else:
            self._send(line)

    def _add(self, kind: str, where: str) -> None:
        try:
            for path in _paths(where):
                source = converse.media_path(path)
                before = self._draft[-1].budget if self._draft else None
                self._draft.append(Attachment(kind, source, *self._attach(kind, source, before)))
                print(f"attached {self._draft[-1].text}", flush=True)
        except Exception as error:
            _complain(error)

    def _list(self) -> None:
        for title, attachments in ("sent", self._sent), ("with the next message", self._draft):
            for attachment in attachments:
                print(f"{title}: {attachment.text}")
        if not (self._sent or self._draft):
            print("nothing is attached; /image FILE attaches an image, /video FILE a video")

    def _drop(self) -> None:
        for attachment in self._draft:
            print(f"dropped {attachment.text}")
        if not self._draft:
            print("the next message has no attachments")
        self._draft = []

    def _send(self, text: str) -> None:
        media = [{"type": a.kind, a.kind: a.visual} for a in self._draft]
        turn = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
        self._unsent, count = text, len(self._messages)
        try:
            self._answer(self._messages, turn)
        finally:  # also after Ctrl-C
            if len(self._messages) > count:
                self._sent, self._draft, self._unsent = self._sent + self._draft, [], ""
            else:
                kept = f" and {len(self._draft)} attachment(s)" if self._draft else ""
                print(f"your message{kept} stayed here; /retry sends it again", file=sys.stderr, flush=True)

    def _retry(self) -> None:
        if self._unsent:
            self._send(self._unsent)
        elif len(self._messages) > len(self._opening):
            self._answer(self._messages[:-2], self._messages[-2])
        else:
            print("there is no message to send again")

    def _show(self, word: str, where: str) -> None:
        """Prints or draws the objects of the last answer."""
        try:
            file = drawing.check(_path(where.strip("'\""))) if word == "/draw" else None
            if self._result is None:
                raise InputError(f"{word} is about an answer, but there is none yet that was not stopped")
            if file is None:
                print(json.dumps(drawing.objects_of(self._result)), flush=True)
                return
            drawn_on = drawing.pictures([(a.kind, a.source, a.visual) for a in self._sent])
            drawing.finish(file, drawn_on, self._result, self._engine.config)
        except Exception as error:
            _complain(error)

    def _answer(self, before: list[dict], turn: dict) -> None:
        """Streams the answer to a turn, and puts both behind `before`, unless the turn failed without any text."""
        text, status = "", _Status()
        try:
            self._wait(status)
            self._result = None
            sample, pieces, stop = self._encode([*before, turn]), queue.SimpleQueue[object](), threading.Event()
            self._worker = threading.Thread(target=self._compute, args=(sample, pieces, stop), daemon=True)
            try:
                self._worker.start()
                while (piece := status.get(pieces, self._engine, text)) is not None:
                    if isinstance(piece, BaseException):
                        raise piece
                    print(piece, end="", flush=True)
                    text += str(piece)
            finally:
                stop.set()
            print()
        except KeyboardInterrupt:
            if text:
                self._keep(before, turn, text)
            raise
        except BrokenPipeError:
            raise
        except Exception as error:
            print(end="\n" if text else "", flush=True)
            _complain(error)
        else:
            self._keep(before, turn, text)

    def _keep(self, before: list[dict], turn: dict, text: str) -> None:
        self._messages = [*before, turn, {"role": "assistant", "content": text}]

    def _compute(self, sample, pieces: queue.SimpleQueue, stop: threading.Event) -> None:
        """On its thread: puts the answer's pieces into the queue, then None or the error."""
        try:
            with contextlib.closing(self._engine.stream(sample, self._options)) as stream:
                for piece in stream:
                    pieces.put(piece)
                    if stop.is_set():
                        return
                self._result = stream.result
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    def _wait(self, status: "_Status") -> None:
        """Waits until the last answer's thread has ended: an engine computes for one thread at a time."""
        try:
            while self._worker is not None and self._worker.is_alive():
                self._worker.join(0.1)
                status.show(self._engine, "")
        finally:
            status.hide()


class _Status:
    """Says "compiling…" behind what is printed, on a terminal, and removes it, with the ^C that Ctrl-C adds to it."""

    def __init__(self):
        self._shown: bool = False

    def get(self, pieces: queue.SimpleQueue, engine, text: str):
        """The next piece; what is said meanwhile is removed again, also by Ctrl-C."""
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    return pieces.get(timeout=0.1)
                self.show(engine, text)
        finally:
            self.hide()

    def show(self, engine, text: str) -> None:
        """text: what was printed before. Nothing is said near the end of a line, since the next line could scroll."""
        used = 2 * len(text.rpartition("\n")[2])  # a character has at most two columns
        fits = used + len(_COMPILING) + len("^C") < shutil.get_terminal_size().columns
        if not engine.compiling:
            self.hide()
        elif fits and not self._shown and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._shown = True  # first: Ctrl-C may come before print returns
            print(_SAVE, _COMPILING, sep="", end="", flush=True)

    def hide(self) -> None:
        if self._shown:
            print(_RESTORE, end="", flush=True)
            self._shown = False


def _complain(error: Exception) -> None:
    """Prints the sentence for bad input; raises other errors."""
    code, sentence = explain(error)
    if code != BAD_INPUT:
        raise error
    print(f"qwenvl: {sentence}", file=sys.stderr, flush=True)


def _paths(typed: str) -> list[str]:
    """The paths or URLs in the text after a command, which is one path as it is, or what a terminal pastes for
    dropped files: quoted, with backslashes before spaces, or as file:// URLs, one after the other.

    Raises InputError for a file that does not exist.
    """
    for text in (typed, typed.strip("'\"")):
        if (_remote(text) and " " not in text) or os.path.exists(os.path.expanduser(text)):
            return [_path(text)]
    try:
        paths = [_path(part) for part in shlex.split(typed)]
    except ValueError:  # an apostrophe
        paths = [typed]
    missing = [path for path in paths if not (_remote(path) or os.path.exists(path))]
    if missing and len(missing) == len(paths):
        raise InputError(f"{_path(typed)}: no such file")
    for path in paths:
        if path in missing:
            raise InputError(f"{path}: no such file")
    return paths


def _path(text: str) -> str:
    """Resolves file:// and ~; other URLs stay."""
    if text.startswith("file://"):
        return unquote(urlsplit(text).path)
    return text if _remote(text) else os.path.expanduser(text)


def _remote(text: str) -> bool:
    return ("://" in text and not text.startswith("file://")) or text.startswith(("data:", "demo:"))


def _message(read: Callable[[str], str]) -> str:
    """The next message or command. Between two triple quotes it has several lines."""
    line = read("> ").strip()
    if not line.startswith(_BLOCK):
        return line
    lines = [line.removeprefix(_BLOCK)]
    while not lines[-1].rstrip().endswith(_BLOCK):
        try:
            lines.append(read("… "))
        except EOFError:
            break
    return "\n".join(lines).strip().removesuffix(_BLOCK).strip()


def _prompt_toolkit():
    """The module, or None."""
    try:
        import prompt_toolkit
    except ImportError:
        return None
    return prompt_toolkit


def _reader() -> Callable[[str], str]:
    """Prompt → a line. On a terminal it has history, and with prompt_toolkit several lines."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    toolkit = _prompt_toolkit() if sys.stdout.isatty() else None
    if toolkit is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history
        return input
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event):
        event.current_buffer.insert_text("\n")

    return toolkit.PromptSession(key_bindings=keys).prompt
