"""The wordings of the demo's questions, a few for each, so that a user's wording works too."""

import numpy as np

READ = ("Read the text.", "What does it say?", "What is written here?", "Transcribe the text.")
NAME = ("What is it?", "What is this?", "What do you see?", "Name the object.")
LIST = ("List everything.", "List all objects.", "What is there?", "Name everything in order.")
COUNT = ("How many {} are there?", "How many {} do you see?", "How many {}?", "Count the {}.")
LOCATE = ("Locate every {}.", "Find every {}.", "Give the box of every {}.")
LOCATE_ONE = ("Locate the {}.", "Find the {}.", "Where is the {}?")
LOCATE_ALL = ("Locate all {}.", "Find all {}.", "Where are the {}?")  # with the plural
VALUE = ("What is the value of {}?", "How much is {}?", "What does the chart show for {}?")
HIGHEST = ("Which is the highest?", "Which has the highest value?", "What has the largest value?")
LOWEST = ("Which is the lowest?", "Which has the lowest value?", "What has the smallest value?")
WHEN = ("When does the {} appear?", "At what time does the {} appear?", "When do you first see the {}?")
ALL = (*READ, *NAME, *LIST, *COUNT, *LOCATE, *LOCATE_ONE, *LOCATE_ALL, *VALUE, *HIGHEST, *LOWEST, *WHEN)


def ask(rng: np.random.Generator, forms: tuple[str, ...], what: str = "") -> str:
    """One of the forms with `what` in it; sometimes without its capital or its final mark."""
    question = forms[rng.integers(len(forms))]
    hasty = rng.random(2) < 0.1
    if hasty[0]:
        question = question[0].lower() + question[1:]
    if hasty[1]:
        question = question[:-1]
    return question.format(what)
