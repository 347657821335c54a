"""Opens untrusted pictures safely and cuts them into patches, so that nothing past this file sees a decoder.

Patches stay uint8 until the device normalises them: a quarter of the bytes to move, and no arithmetic on the host.
Sizes and pixel values are in `preprocessing.py`, clips in `video.py`.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwenvl_jax.errors import InputError, MediaError
from qwenvl_jax.inputs.fetch import locate, name_of
from qwenvl_jax.inputs.options import DEFAULT, MediaOptions
from qwenvl_jax.inputs.preprocessing import MAX_ASPECT, MAX_PIXELS, Preprocessing, target_size
from qwenvl_jax.types import Grid, Visual

MAX_IMAGE_BYTES = 128 << 20

# Pillow's own readers of common formats. Others are left out on purpose: some start programs (EPS runs
# Ghostscript), ICO is decoded when it is opened, and few are fuzzed. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_UPRIGHT = {  # EXIF orientation → what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_visual(source, preprocessing: Preprocessing, options: MediaOptions = DEFAULT) -> Visual:
    """One still picture as patches [h·w, C] uint8, its one frame standing for all frames of a grid step.

    source: anything `load_image` takes. Raises InputError naming it.
    """
    image, p = load_image(source), preprocessing
    try:
        height, width = target_size(image.height, image.width, p, options)
    except InputError as e:
        raise e.at(name_of(source)) from e
    patches = empty_patches(1, height, width, p)
    fill(patches[0], resize(image, height, width), range(p.temporal_patch_size))
    return as_visual(patches, "image")


def load_image(source) -> Image.Image:
    """The picture as an upright RGB PIL image: EXIF orientation applied, RGBA put on white.

    source: path, file:// or http(s) URL, base64 data: URL, bytes, PIL image, or uint8 array [H, W],
    [H, W, 3] or [H, W, 4]. A PIL image that needs no change is returned as it is. An animation gives its
    first frame. Modes other than RGBA go through `convert("RGB")`, which drops a gray or palette picture's
    transparency, as in the reference. Sizes are checked on the header, before anything is decoded.
    """
    name = name_of(source)
    if isinstance(source, Image.Image):
        return _decoded(source, name)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise MediaError(
                f"{name}: a picture given as an array must be uint8 [H, W], [H, W, 3] or [H, W, 4], "
                f"not {source.dtype} {list(source.shape)}"
            )
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
    """Reads the header only. Image.open would do, but for its warning about sizes of its own choosing."""
    Image.init()
    prefix = file.read(16)
    if not prefix:
        raise MediaError(f"{name}: is empty")
    prefix = prefix.ljust(16, b"\0")  # Pillow unpacks numbers from it without a look at its length
    for format_name in _FORMATS:
        opener, accepts = Image.OPEN[format_name]
        if accepts and accepts(prefix) is not True:
            continue  # False, or a str saying that this Pillow was built without the format
        file.seek(0)
        try:
            return opener(file, None)
        except Exception:  # a hostile header makes Pillow raise anything, struct.error included
            continue
    raise MediaError(f"{name}: not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF, …), or damaged")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_size(name, image.width, image.height)
    try:
        image.load()
        try:
            orientation = image.getexif().get(0x0112)
        except Exception:  # a damaged EXIF block says nothing; the pixels are still good
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
            del image.info["transparency"]  # else convert warns that it drops it
        return image.convert("RGB")
    except Exception as e:  # whatever a decoder says about hostile bytes
        raise MediaError(f"{name}: cannot be decoded ({e})") from e


def _check_size(name: str, width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise MediaError(f"{name}: the picture is empty ({width} × {height} pixels)")
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width} × {height} pixels; the limit is {MAX_PIXELS:,} pixels in all")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(f"{name}: {width} × {height} pixels; one side may be at most {MAX_ASPECT} times the other")


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Pillow's bicubic with antialiasing, which the reference uses."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def empty_patches(t: int, height: int, width: int, p: Preprocessing) -> np.ndarray:
    """Uninitialised patches [t, h-block, w-block, h-in-block, w-in-block, channel, frame, y, x] uint8."""
    m, s = p.merge_size, p.patch_size
    return np.empty((t, height // p.factor, width // p.factor, m, m, 3, p.temporal_patch_size, s, s), np.uint8)


def fill(step: np.ndarray, image: Image.Image, frames: Sequence[int]) -> None:
    """Writes one resized RGB image into the given frames of one grid step of `empty_patches`.

    Row of blocks by row of blocks: what is read and written then stays in the cache. The transpose is
    paid once; further frames are copied from the first.
    """
    rows, _, m, _, _, _, s, _ = step.shape
    pixels = np.asarray(image).reshape(rows, m, s, -1, m, s, 3)
    for row, strip in zip(step, pixels, strict=True):
        first = row[..., frames[0], :, :]
        first[:] = strip.transpose(2, 0, 3, 5, 1, 4)
        for frame in frames[1:]:
            row[..., frame, :, :] = first


def as_visual(patches: np.ndarray, kind: str, seconds_per_grid: float = 0.0) -> Visual:
    """Names what `empty_patches` and `fill` made; no copy."""
    t, rows, columns, m, _, *values = patches.shape
    return Visual(patches.reshape(-1, math.prod(values)), Grid(t, rows * m, columns * m), kind, seconds_per_grid)
