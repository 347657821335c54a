"""Draws a contact sheet per task, as a PNG file, to look at the demo's questions.

python notebooks/demo sheet FOLDER [--assets DIR]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo.assets import assets_of
from demo.render import TASKS, Scenes

_WIDE = 300
_FRAMES = 5  # per row


def contact_sheet(records: Sequence[dict], columns: int = 4) -> Image.Image:
    """The pictures of the records, with question and answer below; clips with every frame."""
    cards = [_card(record) for record in records]
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (_WIDE * columns, sum(heights)), (120, 120, 120))
    for i, row in enumerate(rows):
        for j, card in enumerate(row):
            sheet.paste(card, (j * _WIDE, sum(heights[:i])))
    return sheet


def _card(record: dict) -> Image.Image:
    media, text = record["messages"][0]["content"]
    if "image" in media:
        picture = media["image"].copy()
        if record["task"] == "locate":
            for found in json.loads(record["answer"]):
                x1, y1, x2, y2 = found["bbox_2d"]
                ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), outline=(255, 0, 0))
    else:
        frames = media["video"]
        n, h, w, _ = frames.shape
        scale = (_WIDE - 10) / (_FRAMES * w)
        picture = Image.new("RGB", (_FRAMES * w, -(-n // _FRAMES) * h))
        for i, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame), (i % _FRAMES * w, i // _FRAMES * h))
        picture = picture.resize((int(picture.width * scale), int(picture.height * scale)))
    lines = [text["text"]] + [record["answer"][i : i + 46] for i in range(0, len(record["answer"]), 46)]
    card = Image.new("RGB", (_WIDE - 4, picture.height + 14 * len(lines) + 10), (200, 200, 200))
    card.paste(picture, (4, 4))
    draw, face = ImageDraw.Draw(card), ImageFont.load_default(11)
    for i, line in enumerate(lines):
        draw.text((4, picture.height + 6 + 14 * i), line, (0, 0, 0) if i == 0 else (0, 0, 160), face)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    args = parser.parse_args()
    assets = assets_of(parser, args.assets)
    args.folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        source = Scenes(assets, "evaluation", weights={task: 1})
        contact_sheet([source[i] for i in range(24)]).save(args.folder / f"{task}.png")
