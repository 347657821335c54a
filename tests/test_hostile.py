"""A small part of the campaign of hostile.py, whose bombs are tested one by one elsewhere."""

import multiprocessing

import hostile
import pytest


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("pictures", 100),
        ("clips", 8),
        ("messages", 40),
        ("records", 40),
        pytest.param("checkpoints", 60, marks=pytest.mark.slow),
    ],
)
def test_only_samples_or_input_errors(kind, count):
    row = hostile.campaign(kind, count, seed=1, bombs=False)
    assert row["cases"] == count == sum(row["outcomes"].values())
    assert "FAULT" not in row["outcomes"], row["faults"]
    assert len(row["outcomes"]) > 1  # some are refused, or some pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_bombs(kind):
    """In a process of its own, whose peak of memory is that of the bombs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row = pool.apply(hostile.campaign, (kind, 0))
    assert row["faults"] == [] and row["cases"] >= (kind != "records")


def test_a_fault_is_reported():
    outcome, _, _, message = hostile.attempt("x", lambda: 1 // 0)
    assert outcome == "FAULT"
    assert message.startswith("ZeroDivisionError at test_hostile.py:")


def test_cases_depend_on_seed_and_number_alone():
    a, b = (hostile.mutated(hostile.random.Random("pictures 0 7"), bytes(1000), [bytes(9)]) for _ in range(2))
    assert a == b != hostile.mutated(hostile.random.Random("pictures 0 8"), bytes(1000), [bytes(9)])
