"""Times and spans in answers: in prose, JSON and lists, read and written."""

import json
import random

import pytest
from mutations import mutated
from timing import timed

from qwenvl_jax.answers.moments import Moment, first_time, parse, write
from qwenvl_jax.errors import InputError

COOKBOOK = """```json
[
    {
        "start_time": "00:00.00",
        "end_time": "00:05.50",
        "description": "A cut brisket on a board."
    },
    {
        "start_time": "00:05.50",
        "end_time": "01:02.25",
        "description": "The \\"0815 BBQ\\" logo at 3 o'clock."
    }
]
```"""
BRISKET = [(0, 5.5, "A cut brisket on a board."), (5.5, 62.25, 'The "0815 BBQ" logo at 3 o\'clock.')]

TABLE = [
    # one time
    ("12.5 seconds", [(12.5, None, "")]),
    ("12s", [(12, None, "")]),
    ("12 sec.", [(12, None, "")]),
    ("00:12", [(12, None, "")]),
    ("01:02:03.5", [(3723.5, None, "")]),
    ("12:34.56s", [(754.56, None, "")]),
    ("75:30", [(4530, None, "")]),
    ("<2.0 seconds>", [(2, None, "")]),
    ("**12** seconds", [(12, None, "")]),
    ("1m5s", [(65, None, "")]),
    ("500 ms", [(0.5, None, "")]),
    (".5 seconds", [(0.5, None, "")]),
    ("1,234.5 seconds", [(1234.5, None, "")]),
    ("t = 12.5", [(12.5, None, "")]),
    ("Timestamp: 12.5", [(12.5, None, "")]),
    ("０:１２", [(12, None, "")]),
    ("2 people appear at 00:12", [(12, None, "2 people appear at 00:12")]),
    ("It is red. The truck appears at 1.5 seconds. Then it goes.", [(1.5, None, "The truck appears at 1.5 seconds.")]),
    ("It starts at 1 minute and 5 seconds.", [(65, None, "It starts at 1 minute and 5 seconds.")]),
    ("At the 1-minute mark it rains.", [(60, None, "it rains.")]),
    ("It falls in the 12th second", [(12, None, "It falls in the 12th second")]),
    ("It falls at second 12", [(12, None, "It falls at second 12")]),
    ("It falls twenty-five seconds in", [(25, None, "It falls twenty-five seconds in")]),
    ("第12秒，一只狗进来。", [(12, None, "一只狗进来。")]),
    ("狗在1分05秒处出现。", [(65, None, "狗在1分05秒处出现。")]),
    ("第十二秒", [(12, None, "")]),
    ("大约在一分三十秒", [(90, None, "大约在一分三十秒")]),
    ("90 seconds (1:30)", [(90, None, "")]),
    ("时间：00:12", [(12, None, "")]),
    ("00:05:123", [(5.123, None, "")]),
    ("around 12 seconds into the video", [(12, None, "")]),
    ("1. Dog runs (0:05).", [(5, None, "Dog runs")]),
    ("<timestamp>5.0s</timestamp>", [(5, None, "")]),
    ("A los 5 segundos, через 6 секунд, 7초", [(5, None, "A los 5 segundos, через 6 секунд, 7초"),
     (6, None, "A los 5 segundos, через 6 секунд, 7초"), (7, None, "A los 5 segundos, через 6 секунд, 7초")]),
    ("0:05!", [(5, None, "")]),
    ("12", [(12, None, "")]),
    ("12.5", [(12.5, None, "")]),
    ("The answer is 12.", [(12, None, "")]),
    ("<think>\nAt 3 seconds?\n</think>\n\n<answer>12.5</answer>", [(12.5, None, "")]),
    # a word and a unit
    ("Timestamp: 12.5s", [(12.5, None, "")]),
    ("The timestamp is 12.5s.", [(12.5, None, "")]),
    ("t=12.5s", [(12.5, None, "")]),
    ("second 12.5s", [(12.5, None, "")]),
    ("at t = 3.25sec", [(3.25, None, "")]),
    ("timestamp: 1.5min", [(90, None, "")]),
    ("Timestamp: 1 minute 5 seconds", [(65, None, "")]),
    ("t=1,234.5s", [(1234.5, None, "")]),
    ("t=5h", [(18000, None, "")]),
    ("Timestamp: 12.5秒, a dog", [(12.5, None, "a dog")]),
    ('{"timestamp": "t=12.5s"}', [(12.5, None, "")]),
    ("timestamp 12.5s - 20.5s", [(12.5, 20.5, "")]),
    ("t = 12.5s to t = 20s", [(12.5, 20, "")]),
    ("t=12.5 to 20.5s", [(12.5, 20.5, "")]),
    ("timestamps: 1 to 2 minutes", [(60, 120, "")]),
    ("version t=12.5.3 and t=5x", []),
    ("<thinking>\nAt 3 seconds?\n</thinking>\n\n5 s", [(5, None, "")]),
    ("at minute 3", [(180, None, "")]),
    ("minutes 3 to 5", [(180, 300, "")]),
    ("every minute 3 dogs", []),
    ("2分", [(120, None, "")]),
    ("在2分处", [(120, None, "")]),
    ("5′30″", [(330, None, "")]),
    ("1'30\"", [(90, None, "")]),
    ("a man of 6'2\", a board of 6'02\" long and a 30″ screen", []),
    ("12｡5秒", [(12.5, None, "")]),
    ("-5 seconds: dog", [(5, None, "dog")]),
    ("from 00:12 to the end", [(12, None, "")]),
    ("from 00:12 to the end of the video: dog", [(12, None, "dog")]),
    # one span
    ("from the start to 00:12", [(0, 12, "")]),
    ("from the beginning of the video until 5 seconds, a dog", [(0, 5, "a dog")]),
    ("从开头到00:12，狗", [(0, 12, "狗")]),
    ("从1分30秒到2分", [(90, 120, "")]),
    ("从第1分30秒到第2分", [(90, 120, "")]),
    ("1分到2分", [(60, 120, "")]),
    ("from 1m30s to 2m", [(90, 120, "")]),
    ("from 1m to 2m, 他得了5分", []),
    ("starts at 3.2 seconds and ends at 5.", [(3.2, 5, "")]),
    ("from 3.2 seconds to 5.", [(3.2, 5, "")]),
    ("at 5 seconds, to 10 people", [(5, None, "to 10 people")]),
    ("1′30″ - 2′10″", [(90, 130, "")]),
    ("3 -5 seconds", [(3, 5, "")]),
    ("00:12 - 00:45", [(12, 45, "")]),
    ("00:12–00:45", [(12, 45, "")]),
    ("[00:12, 00:45]", [(12, 45, "")]),
    ('("00:12", "00:45")', [(12, 45, "")]),
    ("12.5 - 20.0 seconds", [(12.5, 20, "")]),
    ("12.5s-20.0s", [(12.5, 20, "")]),
    ("<12.5 seconds> to <20.0 seconds>", [(12.5, 20, "")]),
    ("from 12.5 to 20 seconds", [(12.5, 20, "")]),
    ("from 12.5 seconds until 1 minute 20 seconds", [(12.5, 80, "")]),
    ("between 3 and 5 seconds", [(3, 5, "")]),
    ("between about 00:12 and about 00:45", [(12, 45, "")]),
    ("from second 5 to second 9", [(5, 9, "")]),
    ("seconds 5 to 9", [(5, 9, "")]),
    ("2 to 3 minutes", [(120, 180, "")]),
    ("The event happens in 12.5 - 20.0 seconds.", [(12.5, 20, "The event happens in 12.5 - 20.0 seconds.")]),
    ("He starts to run at 0:05 and stops at 0:12.", [(5, 12, "He starts to run at 0:05 and stops at 0:12.")]),
    ("It rains in the first 5 seconds", [(0, 5, "It rains in the first 5 seconds")]),
    ("Start time: 00:12\nEnd time: 00:45\nDescription: A man enters.", [(12, 45, "A man enters.")]),
    ("**Start:** 12.5 s, **End:** 20 s", [(12.5, 20, "")]),
    ("从00:12到00:45，一个男人进来。", [(12, 45, "一个男人进来。")]),
    ("前5秒", [(0, 5, "")]),
    ("在3秒与5秒之间", [(3, 5, "")]),
    ("3秒至5秒", [(3, 5, "")]),
    ("<answer>12.54 to 17.83</answer>", [(12.54, 17.83, "")]),
    ("[12.5, 20.0]", [(12.5, 20, "")]),
    ("From 3.5 to 5.0.", [(3.5, 5, "")]),
    ("00:00:12,500 --> 00:00:15,000\nHello.", [(12.5, 15, "Hello.")]),
    ("between the 12-second and 15-second marks", [(12, 15, "")]),
    ("from the 12-second mark to the 15-second mark", [(12, 15, "")]),
    ("The event starts at 5.0 and ends at 9.0 seconds", [(5, 9, "")]),
    ("Start: 5, End: 9", [(5, 9, "")]),
    ("start_time=5.0, end_time=9.0", [(5, 9, "")]),
    ("t=5s to t=9s", [(5, 9, "")]),
    ("<5.0> to <9.0>", [(5, 9, "")]),
    ("从第3秒开始，到第5秒结束", [(3, 5, "")]),
    ("开始时间：3秒，结束时间：5秒", [(3, 5, "")]),
    ("Time: 00:05-00:09, Event: dog", [(5, 9, "dog")]),
    ("Scene 1 (00:00 - 00:05): dog", [(0, 5, "dog")]),
    ("Dog runs: 0:05-0:09", [(5, 9, "Dog runs")]),
    ("2nd to 5th second", [(2, 5, "")]),
    ("<start>5.0</start><end>9.0</end>", [(5, 9, "")]),
    ('<event start="00:05" end="00:09">dog</event>', [(5, 9, "dog")]),
    ("[START] 0:05 [END] 0:09", [(5, 9, "")]),
    # several that share a unit
    ("at 5, 10 and 15 seconds", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("at 5.0, 10.0, and 15.0 s", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("5 and 10 minutes", [(300, None, ""), (600, None, "")]),
    ("第5、10和15秒", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("at seconds 5, 10, and 15", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("timestamps 5 and 9", [(5, None, ""), (9, None, "")]),
    ("t=12.5, 13.5", [(12.5, None, ""), (13.5, None, "")]),
    ("5-10, 15-20 seconds", [(5, 10, ""), (15, 20, "")]),
    ("from 5 to 10 and 15 to 20 seconds", [(5, 10, ""), (15, 20, "")]),
    ("第5到10、15到20秒", [(5, 10, ""), (15, 20, "")]),
    ("12.5-20.0, 30.0-40.0", [(12.5, 20, ""), (30, 40, "")]),
    ("From 5 to 10 and 15 to 20.", [(5, 10, ""), (15, 20, "")]),
    ("[5, 10, 15]", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("at 5s, 10 and 15s", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("at the 5th, 10th and 15th second", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("at 5, then 10, and then 15 seconds", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("between 5-10 and 15-20 seconds", [(5, 10, ""), (15, 20, "")]),
    ("[5, 10, 15] seconds", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("Timestamps: [5, 10, 15]", [(5, None, ""), (10, None, ""), (15, None, "")]),
    ("It lasts about 5 or 10 seconds, for 5, 10 or 15 seconds.", []),
    ("In 2019, 5 seconds in", [(5, None, "In 2019, 5 seconds in")]),
    ("second 2, 10 people", [(2, None, "10 people")]),
    # several
    ("0.0 - 5.2: a; 5.2 - 9.1: b", [(0, 5.2, "a"), (5.2, 9.1, "b")]),
    ("0.0-5.2: a, b, 5.2-9.1: c", [(0, 5.2, "a, b"), (5.2, 9.1, "c")]),
    ("0.0 - 5.2: The score is 3, 4-5", [(0, 5.2, "The score is 3, 4-5")]),
    ("0:05, 0:12 and 0:30", [(5, None, ""), (12, None, ""), (30, None, "")]),
    ("1. **00:00 - 00:05**: A man enters.\n2. **00:05 - 00:12**: A cat.\n",
     [(0, 5, "A man enters."), (5, 12, "A cat.")]),
    ("- 00:12\n- 00:45", [(12, None, ""), (45, None, "")]),
    ("### 00:00-00:10\n- A man.\n\n### 00:10-00:20\n- A dog.", [(0, 10, "A man."), (10, 20, "A dog.")]),
    ("0.0 - 24.2 seconds, A person turns.  24.2 - 30 seconds, A person sits.",
     [(0, 24.2, "A person turns"), (24.2, 30, "A person sits.")]),
    ("At 00:12, the truck stops, and at 00:45 it leaves.", [(12, None, "the truck stops"), (45, None, "it leaves.")]),
    ("| Start | End | Event |\n|---|---|---|\n| 00:00 | 00:05 | A man |\n| 00:05 | 00:09 | A dog |",
     [(0, 5, "A man"), (5, 9, "A dog")]),
    ("[0.0, 3.5]: walks\n[3.5, 7]: runs", [(0, 3.5, "walks"), (3.5, 7, "runs")]),
    ("[[1, 2], [3.5, 4]]", [(1, 2, ""), (3.5, 4, "")]),
    ("[1, 2], [3.5, 4]", [(1, 2, ""), (3.5, 4, "")]),
    # JSON
    (COOKBOOK, BRISKET),
    (COOKBOOK.removeprefix("```json\n").removesuffix("\n```"), BRISKET),
    ("Here:\n" + COOKBOOK + "\nThat is all.", BRISKET),
    ('{"start_time": "12.00", "end_time": "20", "description": "d"}', [(12, 20, "d")]),
    ('{"timestamp": "00:12", "event": "d"}', [(12, None, "d")]),
    ('[{"time": "00:12 - 00:45", "caption": "d"}]', [(12, 45, "d")]),
    ('{"events": [{"start": 1.5, "end": null, "label": "d"}, {"from": "3s", "to": "4s"}]}',
     [(1.5, None, "d"), (3, 4, "")]),
    ('{"query": "d", "relevant_windows": [["00:12", "00:45"], [50, 60]]}', [(12, 45, "d"), (50, 60, "d")]),
    ('{"segment": [0.5, 5.25], "sentence": "d"}', [(0.5, 5.25, "d")]),
    ('["00:12", "00:45"]', [(12, 45, "")]),
    ('{"timestamps": ["0:01", "0:02", "0:03"]}', [(1, None, ""), (2, None, ""), (3, None, "")]),
    ('{"00:12": "A man", "00:45 - 00:50": "A dog"}', [(12, None, "A man"), (45, 50, "A dog")]),
    ('"start_time": "00:05", "end_time": "00:09", "description": "d"', [(5, 9, "d")]),
    ('{"timestamps": [[0, 5], [5, 9]], "sentences": ["a", "b"]}', [(0, 5, "a"), (5, 9, "b")]),
    ('{"events": [["00:05", "00:09", "dog"], [9, 12.5, "cat"]]}', [(5, 9, "dog"), (9, 12.5, "cat")]),
    ('{"dog": "0:05-0:09", "cat": "9s"}', [(5, 9, "dog"), (9, None, "cat")]),
    ('{"timestamp": 5, "duration": 2.5, "text": "d"}', [(5, 7.5, "d")]),
    ('{"start_ms": 1500, "end_ms": 2500}', [(1.5, 2.5, "")]),
    ('{"startMs": "1500", "endMs": 2500}', [(1.5, 2.5, "")]),
    ('{"timestamp_ms": 1500}', [(1.5, None, "")]),
    ('{"time_ms": [1500, 2500]}', [(1.5, 2.5, "")]),
    ('{"timestamp_ms": "00:05"}', [(5, None, "")]),
    ('{"time (s)": 5}', [(5, None, "")]),
    ('{"start_sec": 1, "end_sec": 2}', [(1, 2, "")]),
    ('{"time_in_seconds": 3}', [(3, None, "")]),
    ('{"start_s": 1, "duration_s": 2}', [(1, 3, "")]),
    ('{"clip":[3,5],"caption":"x"}', [(3, 5, "x")]),
    ('{"event": [3, 5], "caption": "x"}', [(3, 5, "x")]),
    ('{"events": [[3, 5], [7, 9]], "captions": ["a", "b"]}', [(3, 5, "a"), (7, 9, "b")]),
    ('{"clip": 2, "time": 5}', [(5, None, "")]),
    ('{"items": 5}', []),
    ('{"timestamp_start": "5 seconds", "timestamp_end": "1 minute"}', [(5, 60, "")]),
    ('{"开始时间": "00:12", "结束时间": "00:45", "描述": "狗"}', [(12, 45, "狗")]),
    ("[{'start_time': 00:12, 'end_time': 00:45, 'description': 'it's on',},]", [(12, 45, "it's on")]),
    ('{"start": null, "end": null}', []),
    ('{"answer": "at 00:12"}', [(12, None, "")]),
    ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}', []),
    ('{"from": "Ann", "to": "Bob"}', []),
    ('{"12.5 - 20.0": "A man"}', [(12.5, 20, "A man")]),
    ('{"00:12": {"description": "A man"}, "00:20-00:30": ["a", "b"]}', [(12, None, "A man"), (20, 30, "a, b")]),
    # no moments
    ('{"start_frame": 12, "end_frame": 40}', []),
    ("It starts at frame 12 and ends at frame 40.", []),
    ('{"score": "3-2"}', []),
    ("", []),
    ("The dog barks for 3 seconds.", []),
    ("The clip is 12 seconds long.", []),
    ("It is a 10-second clip.", []),
    ("5 seconds later", []),
    ("It is a 5 minute walk.", []),
    ("持续5秒", []),
    ("The clock shows 3:45 PM.", []),
    ("2024-01-01 12:34:56", []),
    ("The ratio is 16:9 and the score 3:2.", []),
    ("A woman in her 30s from the 1980s.", []),
    ("There are 3 to 5 people, 2 m apart; it was 3-2.", []),
    ("24 fps, 60 m/s, 5分", []),
]  # fmt: skip
MALFORMED = [
    ("12:75", [], 1),
    ("-5 seconds", [], 1),
    ("It is at -5 seconds.", [], 1),
    ("00:01:75 and 00:12", [(12, None, "00:01:75 and 00:12")], 1),
    ("from 00:45 to 00:12", [], 1),
    ('[{"start_time": "00:45", "end_time": "00:12"}, {"start_time": "1", "end_time": "2"}]', [(1, 2, "")], 1),
    ('{"start_time": "soon", "end_time": "00:12"}', [], 1),
    ('{"start_time": -1, "end_time": 3}', [], 1),
    ('{"end_time": "00:12"}', [], 1),
    ('{"timestamp": "soon"}', [], 1),
    # cut short
    (COOKBOOK[: COOKBOOK.index("01:02.25")], BRISKET[:1], 1),
    (COOKBOOK[: COOKBOOK.index("The ") + 9], [BRISKET[0], (5.5, 62.25, "")], 0),
    (COOKBOOK[: COOKBOOK.index("05.50") + 9], [(0, 5.5, "")], 0),
    ('[{"start_time": "00:0', [], 1),
    ('{"relevant_windows": [[1, 2], [3', [], 1),
    ("00:12 - 00:45: A man\n00:45 - 01:0", [(12, 45, "A man")], 1),
]


def rows(text: str):
    moments, malformed = parse(text)
    return [tuple(m) for m in moments], malformed


@pytest.mark.parametrize("answer, moments", TABLE)
def test_answers(answer, moments):
    assert rows(answer) == (moments, 0)


@pytest.mark.parametrize("answer, moments, malformed", MALFORMED)
def test_what_cannot_be_read_is_counted(answer, moments, malformed):
    assert rows(answer) == (moments, malformed)


@pytest.mark.parametrize("answer, want", [
    ("2 people appear at 00:12", 12), ("12", 12), ("12.5", 12.5), ("-", None), ("", None), ("no idea", None),
    ("3 dogs, 2 cats, then at 4.5 seconds a truck", 4.5), ("The dog barks for 3 seconds at 00:12", 12),
    ("In frame 7, at 0:04", 4), ("The 2 men leave at the 12-second mark", 12), ("第3个人在第12秒出现", 12),
    ("There are 3 of them between 5 and 9 seconds", 5), ("12 seconds long", 12), ("1, 2 or 3", 1), ("1e999", None),
    ('[{"id": 1, "start_time": "00:12"}]', 12), ("<think>At 3 s.</think> 5 s", 5), ("from 00:45 to 00:12", 45),
    ("1:02.5", 62.5), ("Maybe 7?", 7), ("2分", 120), ("5′30″", 330), ("1分到2分", 60),
])  # fmt: skip
def test_first_time(answer, want):
    assert first_time(answer) == want


def test_a_long_sentence_is_cut():
    (moment,), _ = parse("x " * 1000 + "at 00:12 " + "y " * 1000)
    assert "at 00:12" in moment.text and len(moment.text) < 620


# ------------------------------------------------------------------------------------------ writing

FORMS = ["json", "json_seconds", "clock", "seconds", "tags", "chinese"]


@pytest.mark.parametrize("form, want", [
    ("json", '```json\n[\n    {"start_time": "00:01.50", "end_time": "01:01:02.125", "description": "A"},\n'
             '    {"timestamp": "00:05.00", "description": ""}\n]\n```'),
    ("json_seconds", '```json\n[\n    {"start_time": 1.5, "end_time": 3662.125, "description": "A"},\n'
                     '    {"timestamp": 5.0, "description": ""}\n]\n```'),
    ("clock", "00:01.5 - 01:01:02.125: A\n00:05"),
    ("seconds", "1.5 - 3662.125 seconds: A\n5.0 seconds"),
    ("tags", "<1.5 seconds> - <3662.125 seconds>: A\n<5.0 seconds>"),
    ("chinese", "从1.5秒到3662.125秒：A\n第5.0秒"),
])  # fmt: skip
def test_forms(form, want):
    assert write([Moment(1.5, 3662.125, "A"), Moment(5)], form) == want
    assert write([], form) == ("```json\n[]\n```" if "json" in form else "")


TEXTS = ["", "A man enters.", "Two dogs, 3 cats (red)", "一只狗进来。", "He sits", "x: y", "the 16:9 picture"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_read_again(form, seed):
    rng = random.Random(seed)
    scales = [1, 60, 3600, 100_000]
    moments = []
    for _ in range(rng.randrange(1, 6)):
        start = rng.choice([0.0, round(rng.random() * rng.choice(scales), rng.randrange(4)), rng.random(), 1e-7, 0.1])
        end = rng.choice([None, start, start + round(rng.random() * 100, 3)])
        texts = [*TEXTS, 'At 00:12: "{x}" [1, 2]\n\\ "', " outer "] if "json" in form else TEXTS
        moments.append(Moment(start, end, rng.choice(texts)))
    assert parse(write(moments, form)) == (moments, 0)


@pytest.mark.parametrize("moment", [Moment(-1.0), Moment(2.0, 1.0), Moment(float("nan")), Moment(1.0, float("inf"))])
def test_no_moment_is_not_written(moment):
    with pytest.raises(InputError, match="is no moment"):
        write([moment])


@pytest.mark.parametrize("form", ["json", "clock"])
@pytest.mark.parametrize("moment", [Moment(1e8, None, "x"), Moment(1.0, 3_600_000.0)])
def test_a_time_that_a_clock_cannot_show(moment, form):
    with pytest.raises(InputError, match=f'are too long for the form {form}; use "json_seconds"'):
        write([moment], form)
    assert parse(write([moment], "json_seconds")) == ([moment], 0)


@pytest.mark.parametrize("text", ["x </think> y", "<answer>5 s</answer>", "</THINK> <Answer>", "</thinking>"])
def test_a_text_that_holds_a_tag_is_written_as_json(text):
    assert parse(write([Moment(1.0, 2.0, text)])) == ([Moment(1.0, 2.0, text)], 0)


@pytest.mark.parametrize("form", FORMS[2:])
@pytest.mark.parametrize("text", ["a\nb", "at 00:12", " a", "x </think> y"])
def test_a_text_that_a_line_cannot_hold(form, text):
    with pytest.raises(InputError, match=f'cannot stand in a line of the form {form}; use "json"'):
        write([Moment(1.0, 2.0, text)], form)


def test_a_form_that_there_is_not():
    with pytest.raises(InputError, match="form is 'srt'; it must be one of json, "):
        write([], "srt")


# ------------------------------------------------------------------------------------------ any text

PIECES = ["00:12", ":", " - ", "12.5", " seconds", "秒", "第", "从", "到", "{", "}", "[", "]", '"', "'", ",", "\n",
          "\\", "and ", "between ", "start", "end", '"start_time": ', "null", "1e9", "9" * 30, "十", "one ", " " * 30,
          "\ud83d", "<answer>", "</think>", "|", "**", "for ", "１", "٣"]  # fmt: skip


def check_mutations(seeds):
    slowest = 0.0
    for seed in seeds:
        text = mutated(random.Random(seed), [answer for answer, *_ in TABLE + MALFORMED], PIECES)
        seconds, (moments, malformed) = timed(lambda text=text: parse(text), 0.05)
        slowest = max(slowest, seconds)
        assert malformed >= 0
        for moment in moments:
            assert 0 <= moment.start < 1e15 and (moment.end is None or moment.start <= moment.end < 1e15), text
        if moments:
            assert first_time(text) == moments[0].start
        else:
            first_time(text)
    assert slowest < 0.05


def test_mutated_answers():
    check_mutations(range(1000))


@pytest.mark.slow
def test_many_mutated_answers():
    check_mutations(range(1000, 11000))


LINES = [json.dumps({"start_time": "00:12", "end_time": "00:45", "description": "A man enters"}) + ",\n",
         "00:12 - 00:45: A man enters the room.\n", "The truck appears at 1.5 seconds. "]  # fmt: skip


@pytest.mark.parametrize(
    "piece", [*PIECES, *LINES, "12s ", "[00:12, ", '{"a":', '{"a": 1}, ', "[[1, 2], ", "t=1 ", "1 h "]
)
@pytest.mark.parametrize("before", ["", "["])
def test_long_answers_are_read_in_linear_time(piece, before):
    def took(size: int) -> float:
        text = before + piece * (size // len(piece))
        return timed(lambda: parse(text), 0.05)[0]

    assert any(took(100_000) < max(0.1, 25 * took(10_000)) for _ in range(2))
