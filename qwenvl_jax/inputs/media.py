"""Decodes untrusted pictures and cuts them into patches.

Patches stay uint8 until the device normalises them: a quarter of the bytes to move, and no arithmetic on the host.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwenvl_jax.errors import InputError, MediaError
from qwenvl_jax.inputs.fetch import locate, name_of
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions
from qwenvl_jax.inputs.preprocessing import MAX_PIXELS, Preprocessing, check_aspect, target_size
from qwenvl_jax.types import Grid, Visual

MAX_IMAGE_BYTES = 128 << 20

# Pillow's readers of common formats. Other readers are risky: EPS runs Ghostscript, ICO is decoded on opening, and few
# are fuzzed. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_UPRIGHT = {  # EXIF orientation → the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_visual(source, preprocessing: Preprocessing, options: MediaOptions = DEFAULT) -> Visual:
    """One picture as patches [h·w, C] uint8; all frames of its grid step are the same.

    source: as in `load_image`. Raises MediaError or OptionsError that names it.
    """
    image = load_image(source)
    try:
        height, width = target_size(image.height, image.width, preprocessing, options)
    except InputError as e:
        raise e.at(name_of(source)) from e
    patches = empty_patches(1, height, width, preprocessing)
    fill(patches[0], resize(image, height, width), range(preprocessing.temporal_patch_size))
    return as_visual(patches, "image")._replace(size=image.size)


def load_image(source) -> Image.Image:
    """The picture as an RGB PIL image, with its EXIF orientation applied and RGBA composed onto white.

    source: path, file:// or http(s) URL, base64 data: URL, bytes, PIL image, or uint8 array [H, W], [H, W, 3] or
        [H, W, 4]. Of an animation, the first frame is taken.
    As in the reference, `convert("RGB")` drops the transparency of gray and palette pictures. The size is checked
    before the pixels are decoded. Raises MediaError that names the source.
    """
    name = name_of(source)
    if isinstance(source, Image.Image):
        return _decoded(source, name)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            shape = f"{source.dtype} {list(source.shape)}"
            raise MediaError(f"{name}: an array must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {shape}")
        _check_size(name, source.shape[1], source.shape[0])
        return _decoded(Image.fromarray(np.ascontiguousarray(source)), name)
    data = locate(source, MAX_IMAGE_BYTES)
    if isinstance(data, bytes):
        return _decoded(_identify(io.BytesIO(data), name), name)
    try:
        if data.stat().st_size > MAX_IMAGE_BYTES:
            raise MediaError(f"{name}: larger than {MAX_IMAGE_BYTES >> 20} MiB, the limit for a picture")
        with data.open("rb") as file:
            return _decoded(_identify(file, name), name)
    except OSError as e:
        raise MediaError(f"{name}: cannot be read ({e.strerror or e})") from e


def _identify(file, name: str) -> Image.Image:
    """Reads the header only. Image.open would do the same, but warns about sizes by its own limit."""
    Image.init()
    prefix = file.read(16)
    if not prefix:
        raise MediaError(f"{name}: is empty")
    prefix = prefix.ljust(16, b"\0")  # Pillow unpacks numbers from it without checking its length
    for format_name in _FORMATS:
        opener, accepts = Image.OPEN[format_name]
        if accepts and accepts(prefix) is not True:
            continue  # False, or a str: this Pillow was built without the format
        file.seek(0)
        try:
            return opener(file, None)
        except Exception:  # on a damaged header Pillow raises anything, struct.error included
            continue
    raise MediaError(f"{name}: not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF, …), or damaged")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_size(name, image.width, image.height)
    try:
        image.load()
        try:
            orientation = image.getexif().get(0x0112)
        except Exception:  # the EXIF block is damaged, the pixels may still be good
            orientation = None
        if isinstance(orientation, int) and orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        if image.mode == "RGB":
            return image
        if image.mode == "RGBA":
            canvas = Image.new("RGB", image.size, (255, 255, 255))
            canvas.paste(image, mask=image.getchannel("A"))
            return canvas
        if isinstance(image.info.get("transparency"), bytes):
            image = image.copy()
            del image.info["transparency"]  # otherwise `convert` warns
        return image.convert("RGB")
    except Exception as e:  # decoders raise anything on damaged data
        raise MediaError(f"{name}: cannot be decoded ({e})") from e


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width} × {height} pixels; the limit is {MAX_PIXELS:,} pixels in all")
    check_aspect(width, height, f"{name}: ")


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


def as_visual(patches: np.ndarray, kind: str, seconds_per_grid: float = 0.0) -> Visual:
    """The Visual of filled `empty_patches`, without a copy."""
    t, rows, columns, m, _, *values = patches.shape
    return Visual(patches.reshape(-1, math.prod(values)), Grid(t, rows * m, columns * m), kind, seconds_per_grid)
