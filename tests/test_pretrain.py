"""What the demo's vision tower is asked of every visual token, from stand-ins for the fonts and emoji."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo import charts, lines
from demo.pretrain import CELL, LANES, PATCHES, SLOTS, Cells, cells_loss, init_heads, levelled, main
from demo.tokenizer import byte_letters, vocabulary, write_processor
from demo.train import demo_config
from test_demo_data import assets  # noqa: F401 - a fixture

from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.model.vision import encode_vision
from qwenvl_jax.params.specs import init


@pytest.fixture(scope="module")
def cells(assets, tmp_path_factory):  # noqa: F811
    config = demo_config()
    return Cells(assets, Processor.from_dir(write_processor(tmp_path_factory.mktemp("processor")), config))


def test_centres_are_where_the_ink_is(assets):  # noqa: F811
    lines_seen = blocks = 0
    for i in range(100):
        image, text, centres = lines.glyphs(np.random.default_rng(i), assets, easy=True)
        gray = np.asarray(image.convert("L")).astype(float)
        ink = np.abs(gray - gray[0, 0]) > 60
        assert len(centres) == len(text)
        assert (np.lexsort(centres.T) == np.arange(len(text))).all()  # row by row, from left to right
        if len(set(centres[:, 1])) > 1:
            assert image.size == tuple(CELL * np.array([len(set(centres[:, 0])), len(set(centres[:, 1]))]))
            blocks += 1
        elif image.convert("L").getextrema() == (0, 255):  # black and white
            columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
            assert columns[0] - 2 <= centres[0, 0] and centres[-1, 0] <= columns[-1] + 2
            assert abs(centres[0, 1] - (rows[0] + rows[-1]) / 2) <= 6
            lines_seen += 1
    assert lines_seen > 10 and blocks > 10


def spelled(cells, ids):
    letters, byte = list(vocabulary()), {letter: b for b, letter in enumerate(byte_letters())}
    return bytes(byte[letters[t]] for t in ids[ids != cells.nothing])


def test_cells_spell_the_line(cells, monkeypatch):
    said, glyphs = [], lines.glyphs
    monkeypatch.setattr(lines, "glyphs", lambda *args, **kw: said.append(glyphs(*args, **kw)) or said[-1])
    whole = 0
    for i in range(50):
        image, ids, weights, edges = cells._line(np.random.default_rng(i))
        text = b"".join(c.encode()[:1] for c in said[-1][1] if c != " ")
        if len(set(said[-1][2][:, 1])) == 1:  # in every row of cells
            rows = ids.reshape(image.height // CELL, -1, SLOTS)
            assert (rows == rows[0]).all()
            ids, weights = rows[0], weights[: len(rows[0])]
        if (np.sum(ids != cells.nothing, 1) < SLOTS).all():  # else some may have found no room
            assert spelled(cells, ids) == text
            whole += 1
        assert (weights[ids != cells.nothing] == 1).all() and np.isnan(edges).all()
    assert whole > 30


def test_cells_spell_a_piece_of_a_chart(cells, monkeypatch):
    said, glyphs = [], charts.glyphs
    monkeypatch.setattr(charts, "glyphs", lambda *args: said.append(glyphs(*args)) or said[-1])
    for i in range(20):
        image, ids, weights, _ = cells._chart(np.random.default_rng(i))
        assert image.size == (5 * CELL, 5 * CELL) and len(ids) == 25
        assert 0 < len(spelled(cells, ids)) <= len(said[-1][1].replace(" ", ""))
        assert set(spelled(cells, ids)) <= {c.encode()[0] for c in said[-1][1]}
        assert (weights[ids != cells.nothing] == 1).all()


def test_cells_of_an_emoji_agree_on_its_box(cells):
    for i in range(30):
        image, ids, weights, edges = cells._emoji(np.random.default_rng(i))
        columns = image.width // CELL
        boxes = {}
        for cell in np.flatnonzero(ids[:, 0] != cells.nothing):
            centre = np.tile([cell % columns + 0.5, cell // columns + 0.5], 2)
            box = tuple(np.rint((centre + edges[cell]) * CELL).astype(int).tolist())
            assert boxes.setdefault(ids[cell, 0], box) == box
            assert 0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height
            assert (weights[cell, :2] == 1).all()
        assert boxes
        assert np.isnan(edges[ids[:, 0] == cells.nothing]).all()


def test_a_batch_depends_on_its_number_alone(cells):
    first, again, other = cells(3), cells(3), cells(4)
    assert first.targets.shape == (1, LANES * PATCHES // 4, SLOTS)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(_leaves, (first, again)), strict=True))
    assert not np.array_equal(first.targets, other.targets)


def _leaves(batch):
    return [*batch.inputs.vision[0], batch.targets, batch.weights, batch.edges]


@pytest.mark.slow
def test_loss_falls_and_forgets_what_has_no_weight(cells):
    config = demo_config()
    params = init(config, jax.random.key(0)) | init_heads(config.text.hidden_size, jax.random.key(1))
    batch = jax.tree.map(lambda a: a[0], cells(0))

    @jax.jit
    def loss(params, batch):
        total, weight, _ = cells_loss(config, params, batch)
        return total / weight

    value, grads = jax.value_and_grad(loss)(params, batch)
    assert np.isfinite(value) and np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, grads))).all()
    nudged = jax.tree.map(lambda w, g: w - 0.02 * g, params, grads)
    assert loss(nudged, batch) < value
    garbled = np.where(batch.weights > 0, batch.targets, 7)
    assert float(loss(params, batch._replace(targets=garbled))) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.slow
def test_levelled_changes_the_length_of_visual_tokens_only(cells):
    config = demo_config()
    params = init(config, jax.random.key(0))
    batch = jax.tree.map(lambda a: a[0], cells(0))
    level = levelled(config, params, batch.inputs.vision[0])
    before, after = (np.asarray(encode_vision(config, p, batch.inputs.vision[0])) for p in (params, level))
    scale = np.median(after / before)
    np.testing.assert_allclose(after, scale * before, atol=1e-5 * np.abs(after).max())
    words = jnp.mean(_rms(params["decoder"]["embed_tokens"]["embedding"]))
    assert float(jnp.median(_rms(after))) == pytest.approx(float(words), rel=1e-4)


def _rms(x):
    return jnp.sqrt(jnp.mean(x**2, -1))


def test_a_finished_run_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "final").mkdir()
    monkeypatch.setattr("sys.argv", ["pretrain", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "choose another RUN" in capsys.readouterr().err
