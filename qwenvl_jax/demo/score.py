"""Asks a checkpoint the demo's questions, none of which was in training, and prints how it did.

python -m qwenvl_jax.demo.score [MODEL] --assets DIR [--questions N] [--output FILE]
"""

import argparse

from qwenvl_jax.demo.assets import Assets, assets_of
from qwenvl_jax.demo.render import TASKS, Scenes
from qwenvl_jax.evaluate import evaluate
from qwenvl_jax.params.checkpoint import load

LONGEST = 96  # tokens of an answer; three boxes are about 80


def questions(assets: Assets, each: int) -> list[dict]:
    """`each` questions of every task; the first ones of a task are the same whatever their number."""
    return [r for task in TASKS for r in Scenes(assets, "evaluation", length=each, weights={task: 1})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see qwenvl_jax/demo/assets.py")
    parser.add_argument("--questions", type=int, default=500, help="of every task")
    parser.add_argument("--output", help="JSONL file for every question, answer and score")
    args = parser.parse_args()

    asked = questions(assets_of(parser, args.assets), args.questions)
    report = evaluate(load(args.model), asked, batch=64, max_new_tokens=LONGEST, progress=True)
    print(report.table())
    if args.output:
        report.write(args.output)


if __name__ == "__main__":
    main()
