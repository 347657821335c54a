"""The dimension legend and the containers that cross module borders.

One alphabet for einsum letters, shapes in docstrings, sharding tables and the converter:

    B  rows of a batch            L  layers
    T  query tokens in a row      R  lanes (rows of packed image patches)
    S  cache slots in a row       P  patch slots in a lane
    D  decoder width              M  merged visual tokens in a lane (P / 4)
    N  query heads                E  vision width
    K  key/value heads            C  values in a patch (3 · 2 · 14 · 14 = 1176)
    G  N / K                      W  patch slots in a window block (64)
    X  visual tokens of all lanes (Σ R · M)
    H  head width                 V  vocabulary
    F  MLP width                  3  the M-RoPE axes (time, height, width)

Parameters have these besides: NH = N · H and KH = K · H, heads as one dimension; U = 4 · E, a merged cell of patches.

Arrays are `Any` here because the host fills the same containers with numpy that the device reads as jax.
"""

from typing import Any, NamedTuple


class Grid(NamedTuple):
    """Patches of one picture or clip along time, height and width; one t step is two frames."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    @property
    def frames(self) -> list["Grid"]:
        """The grid of every t step; attention never crosses them."""
        return [self._replace(t=1)] * self.t


class Visual(NamedTuple):
    """One picture or clip after preprocessing, in the reference's patch order.

    patches: [t·h·w, C] uint8, rows ordered (t, h-block, w-block, h-in-block, w-in-block),
        columns ordered (channel, frame-in-pair, y, x).
    grid: patches along t, h, w.
    kind: "image" or "video".
    seconds_per_grid: seconds of video between two t steps; 0 for an image.
    """

    patches: Any
    grid: Grid
    kind: str
    seconds_per_grid: float = 0.0


class Sample(NamedTuple):
    """One conversation, ragged; `inputs.layout.make_sample` makes it."""

    tokens: Any  # [t] int32: the placeholder of a visual repeated, once per visual token
    positions: Any  # [3, t] int32: M-RoPE
    spans: tuple[tuple[int, int], ...] = ()  # of each visual's tokens: the first, and one past the last
    visuals: tuple[Visual, ...] = ()  # in reading order
    weights: Any = None  # in training, [t] float32: how much the token itself is learnt, 0 for visual tokens


class VisionBatch(NamedTuple):
    """Patches packed into lanes, in window order (the host permutes, the device never does).

    For a tower with windows, every run of W slots is one block and no window straddles a block.
    """

    patches: Any  # [R, P, C] uint8; 0 in empty slots
    positions: Any  # [R, P, 2] int32: row and column of the patch in its frame
    frames: Any  # [R, P] int32: id of the frame (full attention), 0 = empty slot
    windows: Any  # [R, P] int32: id of the window (windowed attention), 0 = empty slot


class Batch(NamedTuple):
    """A rectangle of tokens, and the vision lanes it refers to, by size: one call of the tower each."""

    tokens: Any  # [B, T] int32
    positions: Any  # [3, B, T] int32
    segments: Any  # [B, T] int32: 0 = padding, else the id of the sequence within the row
    visual_index: Any  # [B, T] int32: row of the joined [Σ R·M, D] vision output, -1 = a text token
    vision: tuple[VisionBatch, ...] = ()


class TrainBatch(NamedTuple):
    """Packed rows to learn from: what follows each token, and how much it counts."""

    inputs: Batch  # one VisionBatch of fixed shape, empty lanes where there are no pictures
    targets: Any  # [B, T] int32: the next token of the same segment; 0 where the weight is
    weights: Any  # [B, T] float32: 1 where the target is learnt, else 0


class PreferenceBatch(NamedTuple):
    """A TrainBatch for DPO: in every row, segment 2j+1 is preferred to segment 2j+2."""

    inputs: Batch
    targets: Any
    weights: Any
    reference: Any  # [B, n] float32: log-probability of segments 1 … n under the reference model


class Cache(NamedTuple):
    """Keys and values of every layer, one array a layer so that a decode step updates them in place.

    A row's live slots are the first `lengths[b]`. The next token's M-RoPE position is `lengths + deltas`
    on all three axes.
    """

    k: list  # L × [B, K, S, H]
    v: list  # L × [B, K, S, H]
    lengths: Any  # [B] int32
    deltas: Any  # [B] int32


class Model(NamedTuple):
    """What `qwenvl_jax.load` returns: everything needed to run one checkpoint."""

    config: Any  # qwenvl_jax.config.Config
    params: dict
    processor: Any  # qwenvl_jax.inputs.processor.Processor
    generation: dict = {}  # noqa: RUF012 - read only: the checkpoint's generation_config.json
