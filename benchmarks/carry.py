"""Copies the assets of the demo's data into benchmarks/carried/assets, for `gpu.sh`: the tenth that is needed.

    python benchmarks/carry.py [--assets DIR]

Put wheels that the machine lacks into benchmarks/carried/wheels. Neither folder is part of the repository.
"""

import argparse
import shutil
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))  # for `demo`
from demo.assets import Assets, assets_of
from demo.emoji import EMOJI
from demo.fonts import FONTS, UNSEEN_FONTS


def files(assets: Assets) -> list[Path]:
    """Every file that records are drawn from."""
    fonts = chain(*FONTS.values(), *UNSEEN_FONTS.values())
    found = [(assets.webfonts if name.endswith(".woff") else assets.fonts) / name for name in fonts]
    return [*found, *(assets.emoji / f"{code}.png" for code in EMOJI.values()), assets.words, *assets.tables.iterdir()]


def carry(assets: Assets, target: Path) -> None:
    """Copies the files into `target`, in the layout of `find_assets`."""
    places = {
        assets.fonts: "trdg/fonts/latin",
        assets.words.parent: "trdg/dicts",
        assets.webfonts: "node_modules/@fontsource",
        assets.emoji: "node_modules/emoji-datasource-google/img/google/64",
        assets.tables: "vega_datasets/_data",
    }
    for file in filter(Path.is_file, files(assets)):
        root = next(folder for folder in places if file.is_relative_to(folder))
        copy = target / places[root] / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    args = parser.parse_args()
    target = Path(__file__).resolve().parent / "carried" / "assets"
    carry(assets_of(parser, args.assets), target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
