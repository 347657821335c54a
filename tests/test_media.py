"""Pictures: sizes, decoding, the patch order, and bit-equality with transformers' image processor."""

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.errors import InputError
from qwenvl_jax.families import PRESETS
from qwenvl_jax.inputs import pictures
from qwenvl_jax.inputs.media import frames, image_visual, load_image
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing, pixel_table, smart_resize, target_size
from qwenvl_jax.inputs.video import video_visual
from qwenvl_jax.types import Grid

MEDIA = Path(__file__).parent / "data" / "media"
PHOTO, PAGE = MEDIA / "coffee.jpg", MEDIA / "page.png"
P = Preprocessing()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise: resampling, channel order and orientation all change it."""
    rng = np.random.default_rng(seed)
    ramp = np.indices(shape[:2]).sum(0) * 255 // (shape[0] + shape[1])
    extra = rng.integers(-60, 60, shape)
    return (ramp.reshape(shape[:2] + (1,) * (len(shape) - 2)) + extra).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds a few bytes of pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 1000) + b"IDAT" + zlib.compress(bytes(100))[:9]


def files() -> dict[str, bytes]:
    """A small file of every format and mode that users send."""
    rgb = Image.fromarray(noise(70, 95, 3))
    alpha = Image.fromarray(noise(70, 95, 4))
    frames = [Image.fromarray(noise(64, 48, 3, seed=i)) for i in range(3)]
    palette = rgb.quantize(32)
    exif = Image.Exif()
    upright = {}
    for i in range(1, 10):  # 9 is not an orientation
        exif[0x0112] = i
        upright[f"jpeg, exif orientation {i}"] = encode(rgb, "JPEG", exif=exif, quality=90)
    exif[0x0112] = 6
    deep = noise(70, 95).astype(np.uint16) * 257 + 3
    return upright | {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg, progressive, 4:4:4": encode(rgb, "JPEG", progressive=True, subsampling=0),
        "jpeg, gray": encode(rgb.convert("L"), "JPEG"),
        "jpeg, cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "png": encode(rgb, "PNG"),
        "png, gray": encode(rgb.convert("L"), "PNG"),
        "png, gray and alpha": encode(alpha.convert("LA"), "PNG"),
        "png, rgba": encode(alpha, "PNG"),
        "png, rgba, exif": encode(alpha, "PNG", exif=exif),
        "png, rgb with a transparent colour": encode(rgb, "PNG", transparency=(10, 20, 30)),
        "png, palette": encode(palette, "PNG"),
        "png, palette with a transparent colour": encode(palette, "PNG", transparency=3),
        "png, palette with alpha": encode(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "png, 1 bit": encode(rgb.convert("1"), "PNG"),
        "png, 16 bit": encode(Image.fromarray(deep), "PNG"),
        "png, 1 × 1": encode(Image.new("RGB", (1, 1), (200, 100, 50)), "PNG"),
        "png, 3 × 40": encode(Image.fromarray(noise(40, 3, 3)), "PNG"),
        "png, 1 : 150": encode(Image.fromarray(noise(28, 28 * 150, 3)), "PNG"),
        "png, 200 : 1": encode(Image.fromarray(noise(2000, 10, 3)), "PNG"),
        "png, animated": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif, animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50),
        "gif, transparent": encode(palette, "GIF", transparency=2),
        "webp": encode(rgb, "WEBP", quality=80),
        "webp, rgba": encode(alpha, "WEBP", lossless=True),
        "webp, animated": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "bmp": encode(rgb, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff, lzw, rgba": encode(alpha, "TIFF", compression="tiff_lzw"),
        "tiff, 16 bit": encode(Image.fromarray(deep), "TIFF"),
        "tiff, float": encode(Image.fromarray(noise(70, 95).astype(np.float32)), "TIFF"),
        "ppm": encode(rgb, "PPM"),
        "jpeg 2000": encode(rgb, "JPEG2000"),
        "photograph": PHOTO.read_bytes(),
        "document": PAGE.read_bytes(),
    }


PICTURES = files()


# --- sizes


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((561, 278), (3136, 12845056), (560, 280)),
        ((42, 42), (3136, 12845056), (56, 56)),
        ((70, 70), (3136, 12845056), (56, 56)),
        ((14, 14), (3136, 12845056), (56, 56)),
        ((27, 500), (3136, 12845056), (28, 504)),
        ((4000, 6000), (3136, 12845056), (2912, 4368)),
        ((600, 800), (50176, 50176), (168, 252)),
        ((10, 2000), (3136, 12845056), (28, 1988)),  # an aspect of exactly 200 is allowed
        ((20, 4000), (3136, 3136), (28, 784)),  # a side is at least one factor
        ((1, 1), (3136, 12845056), (56, 56)),
    ],
)
def test_smart_resize(size, bounds, expected):
    assert smart_resize(*size, 28, *bounds) == expected


@pytest.mark.parametrize("size", [(10, 2001), (2001, 10), (0, 10), (10, 0), (-5, 5)])
def test_smart_resize_refuses(size):
    with pytest.raises(InputError, match=r"200 times|empty"):
        smart_resize(*size)


def test_smart_resize_refuses_an_enormous_result():
    with pytest.raises(InputError, match="lower min_pixels"):
        smart_resize(100, 100, 28, 10**12, 10**13)


def test_item_options_win():
    assert target_size(1000, 1000, P, MediaOptions(max_pixels=50176)) == (224, 224)
    assert target_size(28, 28, P, MediaOptions(min_pixels=50176)) == (224, 224)
    assert target_size(1000, 1000, P, MediaOptions(max_pixels=784)) == (
        28,
        28,
    )  # lowers min_pixels too
    assert target_size(100, 100, Preprocessing(max_pixels=5000), MediaOptions(min_pixels=50176)) == (224, 224)
    assert target_size(1000, 1000, P, MediaOptions(resized_height=100, resized_width=301)) == (112, 308)
    assert target_size(1000, 1000, P, MediaOptions(resized_height=10, resized_width=10, max_pixels=1)) == (56, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resized_height": 28}, "must be given together"),
        ({"resized_height": 28, "resized_width": 0}, "resized_width is 0"),
        ({"resized_height": 28.5, "resized_width": 28}, "resized_height is 28.5"),
        ({"resized_height": 28, "resized_width": 28 * 201}, "200 times"),
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"max_pixels": -1}, "max_pixels is -1"),
        ({"max_pixels": float("nan")}, "max_pixels is nan"),
        ({"max_pixels": float("inf")}, "max_pixels is inf"),
        ({"min_pixels": "5"}, "min_pixels is '5'; it must be a positive number"),
        ({"max_pixels": [5]}, r"max_pixels is \[5\]"),
        ({"min_pixels": True}, "min_pixels is True"),
        ({"max_pixels": 10**400}, "max_pixels is 1000.*…"),
        ({"max_pixels": 10**5000}, "max_pixels is a number of thousands of digits"),
        ({"resized_height": 10**400, "resized_width": 28}, "resized_height is 1000.*…; it must be a positive whole"),
        ({"min_pixels": 10000, "max_pixels": 5000}, "min_pixels 10000 is larger than max_pixels 5000"),
    ],
)
def test_bad_options_name_the_picture_and_the_option(options, message):
    with pytest.raises(InputError, match=message) as error:
        image_visual(PHOTO, P, MediaOptions(**options))
    # MediaOptions refuses a bad value before it sees a picture.
    assert ("coffee.jpg" in str(error.value)) == any(words in message for words in ("together", "larger", "times"))


# --- preprocessor_config.json


def test_config_layouts():
    older = {"min_pixels": 784, "max_pixels": 10000, "patch_size": 16, "image_std": [0.5, 0.5, 0.5]}
    expected = Preprocessing(min_pixels=784, max_pixels=10000, patch_size=16, image_std=(0.5, 0.5, 0.5))
    assert Preprocessing.from_dict(older) == expected
    del older["min_pixels"], older["max_pixels"]
    newer = older | {"min_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 10000}}
    assert Preprocessing.from_dict(newer) == expected
    assert Preprocessing.from_dict({"image_processor_type": "Qwen2VLImageProcessor"}) == P
    assert Preprocessing.from_dict(json.loads('{"rescale_factor": 0.00392156862745098, "do_resize": true}')) == P


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a JSON object"),
        ({"do_normalize": False}, "do_normalize = False"),
        ({"resample": 2}, "resample = 2"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"patch_size": "14"}, "patch_size is '14'"),
        ({"merge_size": -2}, "merge_size is -2"),
        ({"video_max_pixels": 0}, "video_max_pixels is 0"),
        ({"min_pixels": 10, "max_pixels": 5}, "larger than max_pixels"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std has a zero"),
        ({"size": 3}, "size"),
    ],
)
def test_config_errors_name_the_field(data, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.from_dict(data)


# --- decoding


def test_orientations_agree():
    views = [np.asarray(load_image(PICTURES[f"jpeg, exif orientation {i}"])) for i in range(1, 10)]
    plain = views[0]
    turned = [
        plain,
        plain[:, ::-1],
        plain[::-1, ::-1],
        plain[::-1],
        plain.transpose(1, 0, 2),
        np.rot90(plain, -1),
        np.rot90(plain, 2).transpose(1, 0, 2),
        np.rot90(plain),
        plain,
    ]
    for view, expected in zip(views, turned, strict=True):
        assert np.array_equal(view, expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's; users see it too
def test_damaged_exif_is_no_reason_to_refuse_a_picture():
    damaged = encode(Image.fromarray(noise(70, 95, 3)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    assert np.array_equal(np.asarray(load_image(damaged)), np.asarray(load_image(PICTURES["jpeg"])))


def test_alpha_goes_on_white():
    array = np.zeros((30, 30, 4), np.uint8)
    array[..., 0], array[:15, :, 3] = 255, 255
    image = np.asarray(load_image(array))
    assert (image[:15] == (255, 0, 0)).all()
    assert (image[15:] == 255).all()


def test_animations_give_their_first_frame():
    first = noise(64, 48, 3)
    for name in ("png, animated", "webp, animated"):
        assert np.array_equal(np.asarray(load_image(PICTURES[name])), first)


@pytest.mark.parametrize("name", PICTURES)
def test_loads_quietly_as_rgb(name):
    image = load_image(PICTURES[name])
    assert image.mode == "RGB"
    again = Image.open(io.BytesIO(PICTURES[name]))  # a PIL image, not loaded yet
    info = dict(again.info)
    assert np.array_equal(np.asarray(load_image(again)), np.asarray(image))
    assert again.info.keys() >= info.keys()  # the caller's image does not change


def test_arrays():
    for shape in ((40, 30), (40, 30, 3), (40, 30, 4)):
        array = noise(*shape)
        expected = Image.fromarray(array)
        assert np.array_equal(np.asarray(load_image(array)), np.asarray(load_image(expected)))
    strided = noise(80, 60, 3)[::2, ::-2]
    assert np.array_equal(np.asarray(load_image(strided)), strided)


def truncated(name: str) -> bytes:
    return PICTURES[name][: len(PICTURES[name]) // 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (truncated("photograph"), "cannot be decoded .*truncated"),
        (truncated("document"), "cannot be decoded .*truncated"),
        (truncated("webp"), "not a picture|cannot be decoded"),
        (truncated("tiff"), "not a picture|cannot be decoded"),
        (truncated("bmp"), "cannot be decoded .*truncated"),
        (PICTURES["photograph"][:20], "not a picture|cannot be decoded"),
        (b"hello, this is text", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "is an EPS or PostScript file; give a JPEG"),
        (b"GIF89a", "not a picture"),
        (encode(Image.new("RGB", (48, 48)), "ICO"), r"is an icon \(ICO\)"),  # Pillow would decode it first
        (png_header(0, 10), "empty|not a picture"),
        (png_header(50000, 50000), r"50000 × 50000 pixels; the limit is 134,217,728"),
        (png_header(2**31 - 1, 2**31 - 1), "the limit is"),
        (png_header(10000, 10000), "cannot be decoded"),  # Pillow warns of a decompression bomb
        (png_header(20100, 100), "at most 200 times the other"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((5, 1005, 3), np.uint8), "at most 200 times the other"),
        (np.zeros((5, 5, 3), np.float32), r"must be uint8 .* not float32 \[5, 5, 3\]"),
        (np.zeros((3, 50, 50), np.uint8), "must be uint8"),
        (np.zeros(5, np.uint8), "must be uint8"),
        (Image.new("RGB", (0, 5)), "^Image object: the picture is empty"),
        (Image.new("L", (201, 1)), "at most 200 times the other"),
    ],
)
def test_bad_pictures(given, message):
    with pytest.raises(InputError, match=message):
        image_visual(given, P)


def test_bad_file_is_named_and_closed(tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(truncated("photograph"))
    with pytest.raises(InputError, match=r"half\.jpg: cannot be decoded"):
        load_image(path)
    with pytest.raises(InputError, match=r"half\.jpg: cannot be decoded"):
        load_image(str(path))


def test_size_is_checked_before_decoding(monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    image = Image.open(io.BytesIO(PICTURES["photograph"]))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    monkeypatch.setattr(type(image), "load", decode)
    for given in (image, PICTURES["photograph"], PHOTO):
        with pytest.raises(InputError, match=r"600 × 400 pixels; the limit is 1,000"):
            load_image(given)


# --- patches


@pytest.mark.parametrize(("patch", "merge", "frames"), [(14, 2, 2), (4, 3, 3), (5, 1, 1)])
def test_patch_order(patch, merge, frames):
    p = Preprocessing(1, 10**7, patch, frames, merge)
    factor = patch * merge
    pixels = noise(factor * 3, factor * 5, 3)
    visual = image_visual(pixels, p)
    assert visual.grid == Grid(1, 3 * merge, 5 * merge)
    assert (visual.kind, visual.seconds_per_grid, visual.patches.dtype) == ("image", 0, np.uint8)
    rows = []
    for block_y in range(3):
        for block_x in range(5):
            for i in range(merge):
                for j in range(merge):
                    y, x = (block_y * merge + i) * patch, (block_x * merge + j) * patch
                    square = pixels[y : y + patch, x : x + patch].transpose(2, 0, 1)
                    rows.append(np.stack([square] * frames, axis=1).ravel())
    assert np.array_equal(visual.patches, rows)
    assert visual.patches.flags.c_contiguous


def test_shapes_of_seven_images():
    visuals = [image_visual(noise(980, 980, 3, seed=i), P) for i in range(7)]
    assert np.concatenate([v.patches for v in visuals]).shape == (34300, 1176)
    assert {v.grid for v in visuals} == {Grid(1, 70, 70)}


def test_threads_change_nothing():
    names = list(PICTURES)
    alone = [image_visual(PICTURES[n], P).patches for n in names]
    with ThreadPoolExecutor(8) as pool:
        for mine, theirs in zip(alone, pool.map(lambda n: image_visual(PICTURES[n], P).patches, names), strict=True):
            assert np.array_equal(mine, theirs)


# --- transformers 4.51.3

# The reference drops their transparency, or clips their 16 bits and floats; test_pictures.py says what is seen.
DIFFER = ("png, gray and alpha", "png, palette with a transparent colour", "png, palette with alpha", "png, 16 bit",
          "gif, transparent", "tiff, 16 bit")  # fmt: skip


def normalised(patches: np.ndarray, p: Preprocessing) -> np.ndarray:
    """[n, C] uint8 → float32 values that equal the device's."""
    values = patches.reshape(len(patches), 3, -1)
    table = pixel_table(p)
    return np.stack([table[c][values[:, c]] for c in range(3)], axis=1).reshape(patches.shape)


def reference(image: Image.Image, p: Preprocessing = P, resized: tuple[int, int] | None = None):
    """A picture read by qwen-vl-utils, turned as by transformers' load_image, then processed by transformers.

    transformers refuses a side under 28 pixels and rounds the short side of a long picture to 0; such pictures are
    resized first, as by qwen-vl-utils.
    """
    transformers = pytest.importorskip("transformers")
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on palettes with alpha
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGBA":
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.split()[3])
            image = white
        else:
            image = image.convert("RGB")
    bounds = (p.min_pixels, p.max_pixels)
    if resized or min(image.size) < 28 or max(image.size) > 100 * min(image.size):
        height, width = resized or smart_resize(image.height, image.width, p.factor, *bounds)
        image, bounds = image.resize((width, height), Image.Resampling.BICUBIC), (1, 1 << 40)
    processor = transformers.Qwen2VLImageProcessor(
        min_pixels=bounds[0],
        max_pixels=bounds[1],
        patch_size=p.patch_size,
        temporal_patch_size=p.temporal_patch_size,
        merge_size=p.merge_size,
        image_mean=list(p.image_mean),
        image_std=list(p.image_std),
    )
    out = processor(image, return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parity
@pytest.mark.parametrize("bounds", [(3136, 12845056), (3136, 3136 * 4), (40000, 60000)])
@pytest.mark.parametrize("name", sorted(PICTURES.keys() - set(DIFFER)))
def test_bits_equal_the_reference(name, bounds):
    p = Preprocessing(*bounds)
    values, grid = reference(Image.open(io.BytesIO(PICTURES[name])), p)
    mine = image_visual(PICTURES[name], p)
    assert mine.grid == grid
    assert values.dtype == np.float32
    assert np.array_equal(normalised(mine.patches, p), values)


@pytest.mark.parity
def test_bits_equal_under_other_options():
    p = Preprocessing(1000, 100000, 10, 4, 3, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    values, grid = reference(Image.open(PHOTO), p)
    mine = image_visual(PHOTO, p)
    assert mine.grid == grid
    assert np.array_equal(normalised(mine.patches, p), values)
    mine = image_visual(PHOTO, P, MediaOptions(resized_height=300, resized_width=100))
    values, grid = reference(Image.open(PHOTO), P, (308, 112))
    assert mine.grid == grid
    assert np.array_equal(normalised(mine.patches, P), values)


@pytest.mark.parity
def test_table_holds_every_value_of_the_reference():
    ramp = np.arange(256, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.resize(np.roll(ramp, 85 * c), (56, 56)) for c in range(3)], axis=-1))
    values, _ = reference(image)
    patches = image_visual(image, P).patches
    assert all(len(np.unique(patches.reshape(-1, 3, 392)[:, c])) == 256 for c in range(3))
    assert np.array_equal(normalised(patches, P), values)


def test_frames_are_the_pixels_that_became_patches():
    config = PRESETS["qwen2.5-vl-3b"]
    shown = [Image.fromarray(noise(56, 84, 3, seed=i)) for i in range(4)]
    clip = video_visual(shown, Preprocessing(), MediaOptions(min_pixels=28, max_pixels=56 * 84))
    assert [np.asarray(f).tolist() for f in frames(clip, config)] == [np.asarray(f).tolist() for f in shown]
    assert len(frames(image_visual(shown[0], Preprocessing()), config)) == 2
