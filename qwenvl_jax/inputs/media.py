"""Pictures as patches.

Patches stay uint8 until the device normalises them: a quarter of the bytes to move, and no arithmetic on the host.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from PIL import Image

from qwenvl_jax.config import Config
from qwenvl_jax.errors import InputError, MediaError
from qwenvl_jax.inputs import pictures
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.fetch import name_of, path_or_bytes
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing, target_size
from qwenvl_jax.types import Grid, Visual

MAX_IMAGE_BYTES = 128 << 20


def image_visual(
    source, preprocessing: Preprocessing, options: MediaOptions = DEFAULT, budget: Budget | None = None
) -> Visual:
    """One picture as patches [h·w, C] uint8; all frames of its grid step are the same.

    source: as in `load_image`. budget: what the conversation's media may still take.
    Raises MediaError or OptionsError that names the source.
    """
    p, budget = preprocessing, budget or Budget(options)

    def patch_bytes(width: int, height: int) -> int:
        height, width = target_size(height, width, p, options)
        return 3 * height * width * p.temporal_patch_size

    with opened(source, budget, patch_bytes) as image:
        height, width = target_size(image.height, image.width, p, options)
        size, image = image.size, resize(image, height, width)
    patches = empty_patches(1, height, width, p)
    fill(patches[0], image, range(p.temporal_patch_size))
    return as_visual(patches, "image")._replace(size=size)


def load_image(source) -> Image.Image:
    """The picture as an upright RGB PIL image, as a person sees it: transparency is white, 16 bits are scaled to 8.

    source: path, file:// or http(s) URL, base64 data: URL, bytes, PIL image, or uint8 array [H, W], [H, W, 3] or
        [H, W, 4]. Of an animation or a file of several pages, the first is taken. Colour profiles are ignored.
    The size is checked before the pixels are decoded. Raises MediaError that names the source.
    """
    with opened(source, Budget()) as image:
        return image


@contextmanager
def opened(source, budget: Budget, keep: Callable[[int, int], int] = lambda width, height: 0) -> Iterator[Image.Image]:
    """`load_image` within a budget, whose memory the picture takes until the block ends.

    keep(width, height): bytes to keep for what the caller makes of the picture.
    """
    data = source if isinstance(source, Image.Image | np.ndarray) else path_or_bytes(source, MAX_IMAGE_BYTES, budget)
    with ExitStack() as stack:
        try:
            image = _identified(data, budget, stack)
            pictures.check_size(image.width, image.height)
            kept = keep(image.width, image.height)
            budget.left()
            stack.enter_context(budget.memory(pictures.cost(image), kept))
            image = pictures.decode(image)
        except OSError as e:
            raise MediaError(f"{name_of(source)}: cannot be read ({e.strerror or e})") from e
        except InputError as e:
            raise e.at(name_of(source)) from e
        yield image
        del image  # before its memory counts as free


def _identified(data, budget: Budget, stack: ExitStack) -> Image.Image:
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, np.ndarray):
        return _from_array(data)
    if isinstance(data, bytes):
        return pictures.identify(io.BytesIO(data), budget.left)
    if (size := data.stat().st_size) > MAX_IMAGE_BYTES:
        raise MediaError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB, the limit for a picture")
    budget.read(size)
    return pictures.identify(stack.enter_context(data.open("rb")), budget.left)


def _from_array(source: np.ndarray) -> Image.Image:
    if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
        shape = f"{source.dtype} {list(source.shape)}"
        raise MediaError(f"an array must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {shape}")
    pictures.check_size(source.shape[1], source.shape[0])
    return Image.fromarray(np.ascontiguousarray(source))


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes with Pillow's antialiased bicubic filter, as the reference does."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def empty_patches(t: int, height: int, width: int, p: Preprocessing) -> np.ndarray:
    """Uninitialised patches [t, h-block, w-block, h-in-block, w-in-block, channel, frame, y, x] uint8."""
    m, s = p.merge_size, p.patch_size
    return np.empty((t, height // p.factor, width // p.factor, m, m, 3, p.temporal_patch_size, s, s), np.uint8)


def fill(step: np.ndarray, image: Image.Image, frames: Sequence[int]) -> None:
    """Writes one resized RGB image into the given frames of one grid step of `empty_patches`.

    Goes by rows of blocks, which fit the CPU's cache. The pixels are transposed once, then copied to the other frames.
    """
    rows, _, m, _, _, _, s, _ = step.shape
    pixels = np.asarray(image).reshape(rows, m, s, -1, m, s, 3)
    for row, strip in zip(step, pixels, strict=True):
        first = row[..., frames[0], :, :]
        first[:] = strip.transpose(2, 0, 3, 5, 1, 4)
        for frame in frames[1:]:
            row[..., frame, :, :] = first


def frames(visual: Visual, config: Config) -> list[Image.Image]:
    """The resized frames of a clip, as the model sees them; of a picture, its copies in one grid step."""
    v, (t, h, w) = config.vision, visual.grid
    m, s = v.spatial_merge_size, v.patch_size
    blocks = np.asarray(visual.patches).reshape(t, h // m, w // m, m, m, 3, v.temporal_patch_size, s, s)
    pixels = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(-1, h * s, w * s, 3)
    return [Image.fromarray(frame) for frame in pixels]


def as_visual(patches: np.ndarray, kind: str, seconds_per_grid: float = 0.0) -> Visual:
    """The Visual of filled `empty_patches`, without a copy."""
    t, rows, columns, m, _, *values = patches.shape
    return Visual(patches.reshape(-1, math.prod(values)), Grid(t, rows * m, columns * m), kind, seconds_per_grid)
