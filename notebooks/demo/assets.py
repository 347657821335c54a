"""Finds the fonts, emoji and tables for the demo's data. They are too large for the package."""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from qwenvl_jax.errors import InputError

VARIABLE = "QWENVL_DEMO_ASSETS"
WEBFONTS = (
    "pt-serif", "lora", "merriweather", "noto-serif", "source-serif-4", "playfair-display", "eb-garamond",
    "roboto-slab", "roboto-mono", "courier-prime", "inconsolata", "caveat", "crimson-text", "ibm-plex-mono",
    "patrick-hand",
)  # fmt: skip
HOW = f"""get them with

  pip install --no-deps --target DIR trdg==1.8.0 vega-datasets==0.9.0
  npm install --prefix DIR emoji-datasource-google@16.0.0 {" ".join(f"@fontsource/{name}@5" for name in WEBFONTS)}

and give DIR, or set {VARIABLE} to it"""


class Assets(NamedTuple):
    """Folders and files to draw from.

    Sources and licences. Fonts: from trdg and Fontsource, under OFL 1.1 or Apache-2.0 (listed in `fonts.py`).
    Words: trdg's copy of the dwyl/english-words list (Unlicense). Emoji: Google's Noto Emoji (Apache-2.0), as packed by
    emoji-datasource. Tables: public-domain ones of vega-datasets (listed in `tables.py`).
    """

    fonts: Path  # trdg's *.ttf
    webfonts: Path  # Fontsource's packages, one per family
    words: Path  # one per line
    emoji: Path  # 64-pixel PNG files named by code point
    tables: Path  # *.csv and *.json


def assets_of(parser, directory: str | None) -> Assets:
    """`find_assets` for a script: if they are missing, the parser prints how to get them and exits."""
    try:
        return find_assets(directory)
    except InputError as error:
        parser.error(str(error))


def find_assets(directory: str | Path | None = None) -> Assets:
    """The assets under `directory`, or else under $QWENVL_DEMO_ASSETS.

    Without either, it uses installed Python packages and `node_modules` in the working directory. Raises InputError
    that names the missing part and the two commands that fetch everything.
    """
    given = directory or os.environ.get(VARIABLE)
    root = Path(given) if given else None
    trdg, vega = (_package(name, root) for name in ("trdg", "vega_datasets"))
    modules = (root or Path()) / "node_modules"
    found = Assets(
        fonts=trdg / "fonts" / "latin",
        webfonts=modules / "@fontsource",
        words=trdg / "dicts" / "en.txt",
        emoji=modules / "emoji-datasource-google" / "img" / "google" / "64",
        tables=vega / "_data",
    )
    for name, path in [*found._asdict().items(), *(("webfonts", found.webfonts / name) for name in WEBFONTS)]:
        if not path.exists():
            raise InputError(f"the demo's {name} are not at {path}; {HOW}")
    return found


def _package(name: str, root: Path | None) -> Path:
    """A package's folder, without importing it: its dependencies may be missing."""
    spec = None if root else importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else (root or Path()) / name
