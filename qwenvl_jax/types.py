"""The letters of dimensions, and the containers that several rooms share.

One alphabet for einsums, shapes in docstrings, sharding and conversion:

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

Only parameters have NH = N · H and KH = K · H, heads as one dimension, and U = 4 · E, four merged patches.

Arrays are typed `Any`: numpy arrays on the host, jax arrays on the device.
"""

from typing import Any, NamedTuple

# Coordinates of boxes. original: pixels of the stored picture, turned upright. resized: pixels of the picture that the
# model sees. thousandths: 0 to 1000 along each side.
COORDINATES = ("original", "resized", "thousandths")


class Grid(NamedTuple):
    """Patches of a picture or clip along time, height and width; one t step is two frames."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    @property
    def frames(self) -> list["Grid"]:
        """One grid per t step; attention never crosses t steps."""
        return [self._replace(t=1)] * self.t


class Visual(NamedTuple):
    """One picture or clip after preprocessing, in the reference's patch order.

    patches: [t·h·w, C] uint8, rows ordered (t, h-block, w-block, h-in-block, w-in-block),
        columns ordered (channel, frame-in-pair, y, x).
    grid: patches along t, h, w.
    kind: "image" or "video".
    seconds_per_grid: seconds of video between two t steps; 0 for an image.
    size: (width, height) in pixels before resizing, turned upright; None if unknown or if the frames of a clip differ.
    """

    patches: Any
    grid: Grid
    kind: str
    seconds_per_grid: float = 0.0
    size: tuple[int, int] | None = None


class Sample(NamedTuple):
    """One conversation, ragged; `inputs.layout.make_sample` makes it."""

    tokens: Any  # [t] int32: a visual's placeholder is repeated once per visual token
    positions: Any  # [3, t] int32: M-RoPE
    spans: tuple[tuple[int, int], ...] = ()  # each visual's (first token, last token + 1)
    visuals: tuple[Visual, ...] = ()  # in reading order
    weights: Any = None  # in training, [t] float32: the loss weight of each token, 0 for visual tokens


class VisionBatch(NamedTuple):
    """Patches packed into lanes, permuted into window order by the host.

    In a tower with windows, every W slots are one block, and a window lies within one block.
    """

    patches: Any  # [R, P, C] uint8; 0 in empty slots
    positions: Any  # [R, P, 2] int32: row and column of the patch in its frame
    frames: Any  # [R, P] int32: id of the frame (full attention), 0 = empty slot
    windows: Any  # [R, P] int32: id of the window (windowed attention), 0 = empty slot


class Batch(NamedTuple):
    """A rectangle of tokens and its vision lanes, grouped by size; the tower is called once per group."""

    tokens: Any  # [B, T] int32
    positions: Any  # [3, B, T] int32
    segments: Any  # [B, T] int32: 0 = padding, else the id of the sequence within the row
    visual_index: Any  # [B, T] int32: row of the concatenated [Σ R·M, D] vision output, -1 = a text token
    vision: tuple[VisionBatch, ...] = ()


class TrainBatch(NamedTuple):
    """Packed rows for training."""

    inputs: Batch  # with one VisionBatch of fixed shape, possibly with empty lanes
    targets: Any  # [B, T] int32: the next token of the same segment; 0 if the weight is 0
    weights: Any  # [B, T] float32: the target's weight in the loss


class PreferenceBatch(NamedTuple):
    """A TrainBatch for DPO: in every row, segment 2j+1 is preferred to segment 2j+2."""

    inputs: Batch
    targets: Any
    weights: Any
    reference: Any  # [B, n] float32: log-probability of segments 1 … n under the reference model


class Int8(NamedTuple):
    """Keys or values in int8. Each vector, of one head and slot, is its values times its scale."""

    values: Any  # [B, K, S, H] int8, from −127 to 127
    scales: Any  # [B, K, S] float32


class Cache(NamedTuple):
    """The KV cache: one array (or `Int8`) per layer, so that a decode step can update it in place.

    A row's live slots are the first `lengths[b]`. Its next token's M-RoPE position is `lengths + deltas` on all axes.
    """

    k: list  # L × [B, K, S, H], or L × Int8
    v: list  # L × [B, K, S, H], or L × Int8
    lengths: Any  # [B] int32
    deltas: Any  # [B] int32

    @property
    def slots(self) -> int:
        """S, with free slots."""
        layer = self.k[0]
        return (layer.values if isinstance(layer, Int8) else layer).shape[2]


class Model(NamedTuple):
    """A loaded checkpoint: the result of `qwenvl_jax.load`."""

    config: Any  # qwenvl_jax.config.Config
    params: dict
    processor: Any  # qwenvl_jax.inputs.processor.Processor
    generation: dict = {}  # noqa: RUF012 - read only: the checkpoint's generation_config.json
