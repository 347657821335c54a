"""Asks a checkpoint the demo's evaluation questions and prints the scores.

python notebooks/demo score [MODEL] --assets DIR [--questions N] [--second] [--output FILE]
"""

import argparse
from itertools import islice

from demo.assets import Assets, assets_of
from demo.render import METRICS, TASKS, Scenes
from qwenvl_jax.eval.evaluator import evaluate
from qwenvl_jax.params.checkpoint import load

LONGEST = 96  # tokens of an answer; three boxes take about 80


def questions(assets: Assets, each: int) -> list[dict]:
    """`each` questions per task; a larger number only adds questions."""
    return [r for task in TASKS for r in Scenes(assets, "evaluation", length=each, weights={task: 1})]


def second_questions(assets: Assets, each: int) -> list[dict]:
    """`each` questions per task about the second object only: a model must read which object it names."""

    def found(task):
        for record in Scenes(assets, "evaluation", turns=2, weights={task: 1}):
            first, _, *second = record["messages"]
            if second and (task != "count" or second[1]["content"].isdecimal()):
                text = {"type": "text", "text": second[0]["content"]}
                messages = [{"role": "user", "content": [first["content"][0], text]}, second[1]]
                yield {"messages": messages, "task": f"second_{task}", "metric": METRICS[task]}

    return [record for task in ("clip", "count") for record in islice(found(task), each)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--assets", help="where fonts, emoji and tables are; see notebooks/demo/assets.py")
    parser.add_argument("--questions", type=int, default=500, help="questions per task")
    parser.add_argument("--second", action="store_true", help="ask about the second object of clips and scenes instead")
    parser.add_argument("--output", help="JSONL file for every question, answer and score")
    args = parser.parse_args()

    ask = second_questions if args.second else questions
    asked = ask(assets_of(parser, args.assets), args.questions)
    how = dict(batch=64, max_new_tokens=LONGEST, progress=True)
    print(evaluate(load(args.model), asked, output=args.output, **how).table())
