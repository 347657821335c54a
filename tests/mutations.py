"""Damage to answers, for tests that readers take any text."""

import random
from collections.abc import Sequence


def mutated(rng: random.Random, answers: Sequence[str], pieces: Sequence[str]) -> str:
    """One of the answers with up to seven changes: cuts, missing letters, pieces put in, another answer behind it."""
    text = rng.choice(answers)
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:at]
            case 1:
                text = text[:at] + text[at + rng.randrange(1, 9) :]
            case 2:
                text = text[:at] + rng.choice(pieces) * rng.choice([1, 1, 1, 2, 30]) + text[at:]
            case 3:
                text += rng.choice(["\n", "", " "]) + rng.choice(answers)
    return text
