"""What the demo's decoder is told of visual tokens, from stand-ins for the fonts and emoji."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo.cells import CELL, FACTS, Thing, of_text, of_things
from demo.render import WEIGHTS, Scenes
from demo.tokenizer import write_processor
from demo.train import Lessons, demo_config, demo_loss
from test_demo_data import assets  # noqa: F401 - a fixture

from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.params.specs import init
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.records import PackShape

SHAPE = PackShape(4, 192, 6, 256)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_dir(write_processor(tmp_path_factory.mktemp("processor")), demo_config())


def fact(facts, name):
    return facts[..., FACTS.index(name)]


def test_cells_tell_of_what_covers_them_most():
    things = [
        Thing("cat", [[0, 0, 28, 28]], nth=1),
        Thing("cat", [[42, 0, 84, 28]], nth=2),
        Thing("bee", [[2, 30, 6, 34]]),
    ]
    facts, kinds = of_things(things, 84, 56)
    assert kinds["cat"][:5].tolist() == [0, 0, 1, 1, 2] and kinds["bee"][4] == 1
    assert facts.shape == (6, len(FACTS))
    assert fact(facts, "nth").tolist()[:3] == [1, 2, 2]
    assert facts[1, :4].tolist() == [1.5, 0, 3, 1]
    assert fact(facts, "left")[3] == np.float32(2 / CELL)  # small, but whole in its cell
    assert np.isnan(facts[4:]).all()


def test_cells_of_a_clip_tell_when_it_began():
    path = np.array([[0, 0, 28, 28]] * 4 + [[28, 0, 56, 28]] * 4)
    facts, kinds = of_things([Thing("cat", path, start=3)], 56, 28, frames=8)
    assert fact(kinds["cat"], "start") == 1.5
    facts = facts.reshape(4, 2, -1)
    assert np.isnan(facts[0]).all()
    assert (
        fact(facts, "start")[1:].tolist()
        == [[1.5, pytest.approx(np.nan, nan_ok=True)]] + [[pytest.approx(np.nan, nan_ok=True), 1.5]] * 2
    )
    assert fact(facts, "left")[1, 0] == 0 and fact(facts, "left")[2, 1] == 1


def test_cells_of_text_tell_where_it_goes_on():
    centres = np.array([[5.0, 14], [20, 14], [30, 14], [60, 14]])
    assert fact(of_text("ab d", centres, 84, 28).cells, "index").tolist() == [0, pytest.approx(np.nan, nan_ok=True), 3]
    two = fact(of_text("abcd", centres, 84, 56).cells, "index").reshape(2, 3)
    assert two.tolist() == [[0, 2, 3]] * 2  # a single line, two cells high
    block = np.array([[14.0, 14], [42, 14], [14, 42], [42, 42]])
    assert fact(of_text("abcd", block, 56, 56).cells, "index").tolist() == [0, 1, 2, 3]


def test_facts_agree_with_the_answers(assets):  # noqa: F811
    scenes = Scenes(assets)
    for i in range(20):
        record = scenes.record("locate", i)
        cells, kinds = record["metadata"]
        found = json.loads(record["answer"])
        boxes = [np.float32(np.array(b["bbox_2d"]) / CELL) for b in found]
        for nth, box in enumerate(boxes, 1):
            (which,) = np.nonzero((cells[:, :4] == box).all(1))
            assert len(which) and set(fact(cells, "nth")[which]) == {nth}
        about = kinds[found[0]["label"]]
        assert about[:4].tolist() == boxes[0].tolist() and fact(about, "nth") == len(boxes)
        cells, kinds = scenes.record("clip", i)["metadata"]
        seconds = float(scenes.record("clip", i)["answer"].split()[0])
        assert seconds in fact(cells, "start") and seconds in [fact(about, "start") for about in kinds.values()]
        record = scenes.record("list", i)
        known = fact(record["metadata"].cells, "index")
        assert set(known[~np.isnan(known)].astype(int)) <= set(range(len(record["answer"].split(", "))))


def test_lessons_tell_cells_and_names_of_their_own_pictures(assets, processor):  # noqa: F811
    scenes = Scenes(assets, turns=4, weights=WEIGHTS)
    lessons = Lessons(scenes, processor, SHAPE)
    seen = named = 0
    for _ in range(3):
        batch, first = next(lessons), seen
        seen = lessons.position
        records = [scenes[i] for i in range(first, seen)]
        told = batch.facts
        visual = batch.inputs.visual_index >= 0
        whole = np.concatenate([r["metadata"].cells for r in records])
        assert len(records) > 4 and len(whole) == visual.sum()  # none of these is too long for a row
        assert sorted(map(str, whole.tolist())) == sorted(map(str, told[visual].tolist()))
        for t, row in zip(batch.inputs.tokens[~visual], told[~visual], strict=True):
            if not np.isnan(row).all():
                kind = lessons.kinds[int(t)]
                assert any(np.array_equal(r["metadata"].kinds.get(kind), row, equal_nan=True) for r in records)
                named += 1
    assert named > 20


def test_lessons_go_on_where_they_were(assets, processor):  # noqa: F811
    lessons = Lessons(Scenes(assets, turns=4), processor, SHAPE)
    next(lessons)
    state = lessons.get_state()
    second = next(lessons)
    again = Lessons(Scenes(assets, turns=4), processor, SHAPE)
    again.set_state(json.loads(json.dumps(state)))
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(next(again)), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.slow
def test_the_loss_is_cross_entropy_and_what_is_told(assets, processor):  # noqa: F811
    config = demo_config()
    params = init(config, jax.random.key(0))
    batch = next(Lessons(Scenes(assets, turns=4), processor, SHAPE))

    def told(params, batch):
        total, weight, metrics = demo_loss(config, params, batch)
        return total, (weight, metrics)

    loss = jax.jit(jax.value_and_grad(told, has_aux=True))
    (total, (weight, metrics)), grads = loss(params, batch)
    entropy, expected, _ = jax.jit(lambda p, b: sft_loss(config, p, b))(params, batch)
    np.testing.assert_allclose(metrics["cross_entropy"], entropy, rtol=1e-5)
    assert weight == expected and total > entropy
    assert all(np.isfinite(v) for v in metrics.values())
    # Nobody is told where in a text a name is; a random model may have no word right.
    assert {name for name, v in metrics.items() if v <= 0} <= {"named_index", "accuracy"}
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    nudged = jax.tree.map(lambda w, g: w - 1e-4 * g / weight, params, grads)
    assert loss(nudged, batch)[0][0] < total
    # Nothing known: their places are told all the same, and nothing else.
    (blank, _), _ = loss(params, batch._replace(facts=np.full_like(batch.facts, np.nan)))
    assert entropy < blank < total
