"""Positions, windows and lanes on the host, against golden values and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, clip, mixed_samples, picture, random_requests, sample, tiny_config, with_vision

from qwenvl_jax.errors import InputError
from qwenvl_jax.inputs.ladder import Ladder, geometric, round_up
from qwenvl_jax.inputs.layout import Lanes, make_sample, slots_needed
from qwenvl_jax.inputs.pack import cover, make_batch
from qwenvl_jax.inputs.preprocessing import Preprocessing, smart_resize
from qwenvl_jax.types import Grid, Visual

RNG = np.random.default_rng(0)


def empty_clip(config, t, h, w, seconds):
    grid = Grid(t, h, w)
    return Visual(np.zeros((grid.patches, 0), np.uint8), grid, "video", seconds)


def test_positions_of_a_long_video():
    config = tiny_config("qwen2_5_vl")  # 2 positions a second
    s = sample(RNG, config, 14, empty_clip(config, 84, 24, 32, 2.0), 5)
    p = s.positions
    video = p[:, s.tokens == config.video_token_id]
    assert video.min(1).tolist() == [15, 15, 15] and video.max(1).tolist() == [347, 26, 30]
    after = p[:, np.flatnonzero(s.tokens == config.video_token_id)[-1] + 1 :]
    assert (after == 348 + np.arange(after.shape[1])).all()


def test_positions_of_a_slow_video():
    config = with_vision(tiny_config("qwen2_5_vl"), tokens_per_second=25)
    p = make_sample([config.video_token_id, 1], [empty_clip(config, 3, 2, 2, 2.0)], config).positions
    assert p[0].tolist() == [0, 50, 100, 101] and p[1].tolist() == [0, 0, 0, 101]


def test_fractions_are_multiplied_then_truncated():
    config = tiny_config("qwen2_5_vl")
    p = make_sample([config.video_token_id], [empty_clip(config, 5, 2, 2, 0.3)], config).positions
    assert p[0].tolist() == [0, 0, 1, 1, 2]


def test_qwen2_vl_counts_grid_steps():
    config = tiny_config("qwen2_vl")
    s = make_sample([config.video_token_id], [empty_clip(config, 3, 2, 2, 9.0)], config)
    assert s.positions[0].tolist() == [0, 1, 2]


def test_text_advances_all_axes_together():
    p = make_sample(np.arange(7), (), tiny_config("qwen2_vl")).positions
    assert (p == np.arange(7)).all() and p.shape == (3, 7)


def test_placeholders_are_repeated():
    config = tiny_config("qwen2_5_vl")
    image, video = config.image_token_id, config.video_token_id
    visuals = [picture(RNG, config, 4, 6), clip(RNG, config, 3, 2, 2), picture(RNG, config, 2, 2)]
    tokens, weights = np.array([1, image, 2, video, image, 3]), np.arange(1.0, 7.0)
    s = make_sample(tokens, visuals, config, weights=weights)
    assert s.tokens.tolist() == [1, *[image] * 6, 2, *[video] * 3, image, 3] and s.tokens.dtype == np.int32
    assert s.spans == ((1, 7), (8, 11), (11, 12)) and s.visuals == tuple(visuals)
    assert s.weights.tolist() == [1, *[0] * 6, 3, *[0] * 4, 6]
    assert tokens.tolist() == [1, image, 2, video, image, 3] and weights.tolist() == [1, 2, 3, 4, 5, 6]
    for wrong in (*itertools.combinations(visuals, 2), visuals[1:] + visuals[:1], visuals * 2, ()):
        with pytest.raises(InputError, match="the prompt has 2 image and 1 video placeholders"):
            make_sample(tokens, wrong, config)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=6),
    st.sampled_from((0, 256, 1024)),
)
def test_lanes_hold_every_cell_once_and_no_window_straddles_a_block(family, sizes, spare):
    config = tiny_config(family)
    v = config.vision
    grids = [Grid(t, 2 * h, 2 * w) for t, h, w in sizes]
    capacity = spare + -(-max(slots_needed(g, v) for g in grids) // 64) * 64
    lanes = Lanes(capacity, v)
    placed = iter(lanes.place([frame for grid in grids for frame in grid.frames]))
    taken = set()
    for grid in grids:
        for p in itertools.islice(placed, grid.t):
            assert 0 <= p.lane < len(lanes.lanes)
            cells = set(p.cells.tolist())
            assert len(cells) == grid.h * grid.w // 4 and not cells & taken
            assert (p.cells // (capacity // 4) == p.lane).all()
            taken |= cells
            if family == "qwen2_5_vl":
                rows, cols = np.divmod(np.arange(len(p.cells)), grid.w // 2)
                truth = rows // 4 * 1000 + cols // 4  # windows are 4 × 4 merged cells
                for window in np.unique(p.windows):
                    members = p.windows == window
                    assert len(set(truth[members])) == 1 and len(set(p.cells[members] // 16)) == 1
                assert len(np.unique(p.windows)) == len(np.unique(truth))


def test_windows_of_one_lane_have_distinct_ids():
    config = tiny_config("qwen2_5_vl")
    lanes = Lanes(1024, config.vision)
    placed = lanes.place([Grid(1, 10, 6), Grid(1, 10, 6), Grid(1, 4, 22)])
    assert len(lanes.lanes) == 1
    seen = [set(p.windows.tolist()) for p in placed]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert [p.frame for p in placed] == [1, 2, 3]


def test_a_long_video_spreads_over_lanes_and_calls():
    config = tiny_config("qwen2_5_vl")
    s = sample(RNG, config, 2, clip(RNG, config, 11, 8, 16), 2)
    batch = make_batch([s], config, Ladder(patches=(256,), lanes=4))
    assert [v.patches.shape[:2] for v in batch.vision] == [(4, 256)] * 2  # two frames per lane
    places = batch.visual_index[batch.visual_index >= 0]
    assert len(set(places)) == 11 * 32 and places.max() < 6 * 64


def test_small_frames_fill_gaps_and_share_short_lanes():
    config = tiny_config("qwen2_vl")
    small, large = clip(RNG, config, 6, 8, 8), picture(RNG, config, 64, 64)
    batch = make_batch([sample(RNG, config, 2, small, large)], config)
    assert [v.patches.shape[:2] for v in batch.vision] == [(1, 4096), (1, 512)]
    shorter = large._replace(grid=Grid(1, 60, 64), patches=large.patches[:3840])
    batch = make_batch([sample(RNG, config, 2, small, shorter)], config)
    assert [v.patches.shape[:2] for v in batch.vision] == [(1, 4096), (1, 256)]
    calls = [call for call, _ in cover([Grid(1, 16, 16)] * 2000, config.vision, Ladder())]
    assert calls == [(16, 256)] * 125  # 16 lanes per call, one frame per lane


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_pads_little_with_few_programs(family):
    """At the official checkpoints' sizes and limits, Ladder needs at most 24 programs and pads less than 10%."""
    v, max_pixels, waste, used = tiny_config(family).vision, Preprocessing().max_pixels, [], set()
    for grids in filter(None, random_requests(np.random.default_rng(0), max_pixels)):
        calls = [call for call, _ in cover(grids, v, Ladder())]
        waste.append(1 - sum(grid.patches for grid in grids) / sum(R * P for R, P in calls))
        used |= set(calls)
    programs = Ladder().reach(max_pixels, v)
    assert used <= set(programs) and 18 < len(used) <= len(programs) <= 24
    assert np.mean(waste) < 0.1, waste


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_pixels", [28 * 28, 50_000, 700_000])
def test_no_picture_is_beyond_what_its_limit_reaches(family, max_pixels):
    v, rng = tiny_config(family).vision, np.random.default_rng(0)
    ladder = Ladder(patches=tuple(range(64, 8192, 64)))
    reach = [P for _, P in ladder.reach(max_pixels, v)]
    for side, aspect in zip(rng.uniform(10, 3000, 300), np.exp(rng.uniform(0, np.log(200), 300)), strict=True):
        size = round(side) + 1, int((round(side) + 1) * aspect)
        h, w = smart_resize(*size, max_pixels=max_pixels, min_pixels=max_pixels if side % 2 < 1 else 1)
        assert ladder.capacity(slots_needed(Grid(1, h // 14, w // 14), v), v) in reach
        assert ladder.capacity(slots_needed(Grid(1, w // 14, h // 14), v), v) in reach


@pytest.mark.parametrize("window", [28, 56, 84, 112, 140, 168, 224])
def test_lanes_are_whole_blocks_for_every_window(window):
    config = with_vision(tiny_config("qwen2_5_vl"), window_size=window)
    for v in make_batch(mixed_samples(config), config).vision:
        assert v.patches.shape[1] % config.vision.block_slots == 0


def test_packing_wastes_little_on_a_photo():
    v = tiny_config("qwen2_5_vl").vision
    for h, w in ((78, 138), (36, 52), (154, 272)):  # 1092×1932, 504×728 and 2156×3808 pixels
        assert slots_needed(Grid(1, h, w), v) <= 1.04 * h * w


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_give_back_the_patches_through_the_index(family):
    config = tiny_config(family)
    samples = mixed_samples(config)
    batch = make_batch(samples, config)
    flat = np.concatenate([v.patches.reshape(-1, 4, v.patches.shape[-1]) for v in batch.vision])
    for row, s in enumerate(samples):
        index = batch.visual_index[row, : len(s.tokens)]
        assert ((index >= 0) == (np.isin(s.tokens, (151, 152)))).all()
        want = [v.patches.reshape(-1, 4, v.patches.shape[-1]) for v in s.visuals]
        if want:
            assert (flat[index[index >= 0]] == np.concatenate(want)).all()
    assert (batch.visual_index[batch.segments == 0] == -1).all()


def test_patch_positions_are_rows_and_columns():
    config = tiny_config("qwen2_5_vl")
    h, w = 10, 6
    rows, cols = np.divmod(np.arange(h * w), w)
    raster = (rows * 16 + cols).reshape(h // 2, 2, w // 2, 2).swapaxes(1, 2).reshape(-1)  # the reference's order
    patches = np.repeat(raster.astype(np.uint8)[:, None], config.vision.patch_values, 1)
    visual = Visual(patches, Grid(1, h, w), "image")
    (v,) = make_batch([sample(RNG, config, 1, visual)], config).vision
    live = v.frames > 0
    coded = v.patches[live][:, 0].astype(int)
    assert (v.positions[live] == np.stack(np.divmod(coded, 16), -1)).all() and live.sum() == h * w


def test_ladders():
    assert geometric(64, 400) == (64, 96, 128, 192, 256, 384, 512)
    assert round_up(65, geometric(64, 400), "tokens") == 96
    with pytest.raises(InputError, match="600 tokens"):
        round_up(600, geometric(64, 400), "tokens")


def test_wrong_patch_shape_is_named():
    config = tiny_config("qwen2_vl")
    good = picture(RNG, config, 4, 4)
    s = sample(RNG, config, 2, good)
    with pytest.raises(InputError, match="visual 1"):
        make_batch([s._replace(visuals=(good._replace(patches=good.patches[:, :-1]),))], config)
    with pytest.raises(InputError, match="conversation"):
        make_batch([], config)
    with pytest.raises(InputError, match="no tokens"):
        make_batch([make_sample([], (), config)], config)


@pytest.mark.parametrize(
    "changes",
    [
        lambda s: dict(visuals=(), spans=()),
        lambda s: dict(visuals=()),
        lambda s: dict(spans=((s.spans[0][0], s.spans[0][1] - 1),)),
        lambda s: dict(spans=((s.spans[0][0] - 1, s.spans[0][1] - 1),)),
        lambda s: dict(visuals=(s.visuals[0]._replace(kind="video"),)),
        lambda s: dict(tokens=s.tokens[:-1]),
    ],
)
def test_a_sample_whose_parts_do_not_belong_together(changes):
    config = tiny_config("qwen2_5_vl")
    s = sample(RNG, config, 3, picture(RNG, config, 4, 8), 5)
    make_batch([s], config)
    with pytest.raises(InputError, match="do not belong together"):
        make_batch([s._replace(**changes(s))], config)
