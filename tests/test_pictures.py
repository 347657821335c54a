"""What is seen of every mode and every kind of transparency, and the bounds of decoders."""

import io
import itertools
import struct
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from qwenvl_jax.errors import InputError, MediaError
from qwenvl_jax.inputs.budget import Budget
from qwenvl_jax.inputs.media import image_visual, load_image
from qwenvl_jax.inputs.options import MediaOptions
from qwenvl_jax.inputs.preprocessing import Preprocessing

P = Preprocessing()
RAMP = np.tile(np.arange(256), (8, 1))  # gray from left to right
DEEP = (RAMP * 257).astype(np.uint16)  # the same in 16 bits
HOLE = np.where(RAMP >= 200, 0, 255)  # the alpha of its bright end
SEEN = {0: 0, 128: 128, 255: 255}  # column → gray


def stack(*channels) -> np.ndarray:
    return np.stack(channels, -1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 256 × 8 pixels whose rows are all the same."""
    header = struct.pack(">IIBBBBB", 256, 8, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress((b"\0" + rows) * 8)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels: bytes, bits: int, samples: int = 1, *, white=1, kind=1, width=256, height=8, extra=()) -> bytes:
    """An uncompressed TIFF. white: PhotometricInterpretation. kind: SampleFormat. extra: more (tag, SHORT value)."""
    shorts = {259: 1, 262: white, 277: samples} | dict(extra)
    longs = {256: width, 257: height, 273: 8, 278: height, 279: len(pixels)}
    entries = [(tag, struct.pack("<HHIHH", tag, 3, 1, value, 0)) for tag, value in shorts.items()]
    entries += [(tag, struct.pack("<HHII", tag, 4, 1, value)) for tag, value in longs.items()]
    tail, start = b"", 8 + len(pixels) + 2 + 12 * (len(entries) + 2) + 4
    for tag, value in ((258, bits), (339, kind)):
        if samples < 3:
            entries.append((tag, struct.pack("<HHIHH", tag, 3, samples, value, value * (samples == 2))))
        else:
            entries.append((tag, struct.pack("<HHII", tag, 3, samples, start + len(tail))))
            tail += struct.pack("<H", value) * samples
    directory = struct.pack("<H", len(entries)) + b"".join(entry for _, entry in sorted(entries)) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + tail


def key(*values: int) -> tuple[bytes, bytes]:
    return b"tRNS", struct.pack(f">{len(values)}H", *values)


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    return ImageCms.applyTransform(Image.fromarray(stack(RAMP, RAMP, RAMP)), transform)


def four_bits(row: np.ndarray) -> bytes:
    return (row[::2] << 4 | row[1::2]).astype(np.uint8).tobytes()


def twelve_bits() -> bytes:
    row = RAMP[0] * 4095 // 255
    pairs = zip(row[::2].tolist(), row[1::2].tolist(), strict=True)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs) * 8


def bmp(alpha: np.ndarray) -> bytes:
    """A BMP of version 4, whose bit fields have alpha."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 256, -8, 1, 32, 3, 0, 0, 0, 0, 0) + masks + b"BGRs" + bytes(48)
    pixels = stack(RAMP, RAMP, RAMP, alpha).tobytes()
    return b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + pixels


GRAY, ALPHA = Image.fromarray(stack(RAMP)[..., 0]), Image.fromarray(stack(RAMP, RAMP, RAMP, HOLE))
COLOURS = (b"PLTE", bytes(np.repeat(np.arange(256), 3).astype(np.uint8)))
WHITE_END = {0: 0, 128: 128, 210: 255}  # seen of a hole over white
WHITE_KEY = {0: 0, 127: 127, 128: 255, 255: 255}

MODES = {  # mode → (picture, what is seen)
    "1": (GRAY.convert("1", dither=Image.Dither.NONE), {0: 0, 255: 255}),
    "L": (GRAY, SEEN),
    "LA": (ALPHA.convert("LA"), WHITE_END),
    "La": (ALPHA.convert("LA").convert("La"), WHITE_END),
    "P": (GRAY.convert("P"), {0: 0, 255: 255}),
    "PA": (GRAY.convert("P").convert("PA"), {0: 0, 255: 255}),
    "RGB": (GRAY.convert("RGB"), SEEN),
    "RGBA": (ALPHA, WHITE_END),
    "RGBa": (ALPHA.convert("RGBa"), WHITE_END),
    "RGBX": (GRAY.convert("RGB").convert("RGBX"), SEEN),
    "CMYK": (GRAY.convert("RGB").convert("CMYK"), SEEN),
    "YCbCr": (GRAY.convert("RGB").convert("YCbCr"), SEEN),
    "HSV": (GRAY.convert("RGB").convert("HSV"), SEEN),
    "LAB": (lab(), SEEN),
    "I, 8 bits": (Image.fromarray(RAMP.astype(np.int32)), SEEN),
    "I, 16 bits": (Image.fromarray(DEEP.astype(np.int32)), SEEN),
    "I, 20 bits and signed": (Image.fromarray((RAMP * 4000 - 500_000).astype(np.int32)), SEEN),
    "I;16": (Image.frombytes("I;16", (256, 8), DEEP.astype("<u2").tobytes()), SEEN),
    "I;16L": (Image.frombytes("I;16L", (256, 8), DEEP.astype("<u2").tobytes()), SEEN),
    "I;16B": (Image.frombytes("I;16B", (256, 8), DEEP.astype(">u2").tobytes()), SEEN),
    "F, to 1": (Image.fromarray((RAMP / 255).astype(np.float32)), SEEN),
    "F, to 255": (Image.fromarray(RAMP.astype(np.float32)), SEEN),
    "F, other": (Image.fromarray((RAMP * 30.0 - 5000).astype(np.float32)), SEEN),
    "I, 12 bits": (Image.fromarray((RAMP * 4095 // 255).astype(np.int32)), SEEN),
    "I, slightly more than 8 bits": (Image.fromarray((RAMP + (RAMP == 255)).astype(np.int32)), SEEN),
    "F, slightly more than 1": (Image.fromarray((RAMP / 254.9).astype(np.float32)), SEEN),
    "F, slightly more than 255": (Image.fromarray((RAMP * 1.001).astype(np.float32)), SEEN),
    "F, an outlier": (
        Image.fromarray(np.where(np.arange(2048).reshape(8, 256) == 9, 1e9, RAMP).astype(np.float32)),
        {0: 0, 128: 128},
    ),
    "F, infinite": (Image.fromarray(np.where(RAMP == 7, np.inf, RAMP / 255).astype(np.float32)), SEEN | {7: 255}),
    "F, not finite": (Image.fromarray(np.where(RAMP == 7, np.nan, RAMP * 2.0).astype(np.float32)), SEEN | {7: 0}),
}

FILES = {  # file → (bytes, what is seen)
    "png, 16 bits": (png(16, 0, DEEP[0].astype(">u2").tobytes()), SEEN),
    "png, 16 bits with a key": (png(16, 0, DEEP[0].astype(">u2").tobytes(), key(128 * 257)), WHITE_KEY),
    "png, rgb of 16 bits": (png(16, 2, np.repeat(DEEP[0], 3).astype(">u2").tobytes()), SEEN),
    "png, rgb of 16 bits with a key": (
        png(16, 2, np.repeat(DEEP[0], 3).astype(">u2").tobytes(), key(*[128 * 257] * 3)),
        WHITE_KEY,
    ),
    "png, rgb of 16 bits with black as key": (
        png(16, 2, np.repeat(np.arange(256) * 8, 3).astype(">u2").tobytes(), key(0, 0, 0)),
        {0: 255, 1: 0, 31: 0, 255: 7},
    ),
    "bmp, alpha that is not used": (bmp(HOLE * 0), SEEN),
    "bmp, alpha": (bmp(HOLE), WHITE_END),
    "png, gray of 16 bits and alpha": (
        png(16, 4, np.stack([DEEP[0], HOLE[0] * 257], -1).astype(">u2").tobytes()),
        WHITE_END,
    ),
    "png, rgba of 16 bits": (
        png(16, 6, np.stack([DEEP[0]] * 3 + [HOLE[0] * 257], -1).astype(">u2").tobytes()),
        WHITE_END,
    ),
    "png, gray with a key": (png(8, 0, bytes(range(256)), key(128)), WHITE_KEY),
    "png, rgb with a key": (png(8, 2, COLOURS[1], key(128, 128, 128)), WHITE_KEY),
    "png, 4 bits with a key": (png(4, 0, four_bits(RAMP[0] >> 4), key(8)), {0: 0, 112: 119, 128: 255, 255: 255}),
    "png, 1 bit with black as key": (png(1, 0, np.packbits(RAMP[0] > 127).tobytes(), key(0)), {0: 255, 255: 255}),
    "png, palette with one hole": (png(8, 3, bytes(range(256)), COLOURS, (b"tRNS", b"\xff" * 128 + b"\0")), WHITE_KEY),
    "png, palette with alpha": (
        png(8, 3, bytes(range(256)), COLOURS, (b"tRNS", b"\xff" * 128 + b"\x80")),
        {127: 127, 128: 191, 255: 255},
    ),
    "gif, transparent": (encode(GRAY.convert("P"), "GIF", transparency=0), {0: 255, 255: 255}),
    "webp, alpha": (encode(ALPHA, "WEBP", lossless=True, exact=True), WHITE_END),
    "avif, alpha": (encode(ALPHA, "AVIF", quality=100), WHITE_END),
    "jpeg 2000, gray and alpha": (encode(ALPHA.convert("LA"), "JPEG2000"), WHITE_END),
    "jpeg 2000, 16 bits": (encode(Image.fromarray(DEEP), "JPEG2000"), SEEN),
    "jpeg, cmyk": (encode(GRAY.convert("RGB").convert("CMYK"), "JPEG", quality=100), SEEN),
    "pgm, 16 bits": (encode(Image.fromarray(DEEP), "PPM"), SEEN),
    "pgm, 16 bits, dark": (encode(Image.fromarray(DEEP // 64), "PPM"), {0: 0, 128: 2, 255: 4}),
    "pgm, to 1000": (b"P5 256 8 1000\n" + (RAMP * 1000 // 255).astype(">u2").tobytes(), SEEN),
    "tiff, 12 bits": (tiff(twelve_bits(), 12), SEEN),
    "tiff, 16 bits": (tiff(DEEP.astype("<u2").tobytes(), 16), SEEN),
    "tiff, 16 bits, white is 0": (tiff(DEEP.astype("<u2").tobytes(), 16, white=0), {0: 255, 255: 0}),
    "tiff, 16 bits signed": (tiff((DEEP.astype(int) - 2**15).astype("<i2").tobytes(), 16, kind=2), SEEN),
    "tiff, 32 bits": (tiff((DEEP * 65537.0).astype("<u4").tobytes(), 32), SEEN),
    "tiff, floats": (tiff((RAMP / 255).astype("<f4").tobytes(), 32, kind=3), SEEN),
    "tiff, rgb of 16 bits": (tiff(np.repeat(DEEP, 3).astype("<u2").tobytes(), 16, 3, white=2), SEEN),
    "tiff, alpha": (
        tiff(stack(RAMP, RAMP, RAMP, HOLE).tobytes(), 8, 4, white=2, extra={338: 2}.items()),
        WHITE_END,
    ),
    "tiff, premultiplied alpha": (
        tiff(stack(*[RAMP // 2] * 3, RAMP * 0 + 128).tobytes(), 8, 4, white=2, extra={338: 1}.items()),
        {0: 127, 255: 254},
    ),
}


@pytest.mark.parametrize("name", [*MODES, *FILES])
def test_what_a_person_sees(name):
    given, seen = (MODES | FILES)[name]
    pixels = np.asarray(load_image(given)).astype(int)
    assert pixels.shape == (8, 256, 3)
    lossy = 2 if name in ("jpeg, cmyk", "avif, alpha", "LAB", "tiff, premultiplied alpha") else 1
    for column, gray in seen.items():
        assert abs(pixels[:, column] - gray).max() <= lossy, (column, pixels[0, column])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_container_of_exif_turns_the_picture(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left edge becomes the top
    once = load_image(encode(GRAY.convert("RGB"), kind, exif=exif))
    turned = np.asarray(once)
    assert turned.shape == (256, 8, 3)
    assert (np.asarray(load_image(once)) == turned).all()  # it says no longer that it has to be turned
    assert ImageOps.exif_transpose(once).size == once.size
    assert turned[0].max() < 20 and turned[-1].min() > 235


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture; give a JPEG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42", "a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "an SVG drawing"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\xff\n\xfa\x1f", "a JPEG XL picture"),
        (b"8BPS\0\1", "a Photoshop file"),
        (encode(GRAY, "ICO"), "an icon"),
        (encode(GRAY.convert("RGB"), "TGA"), "a Targa picture"),
        (encode(GRAY.convert("RGB"), "TGA", rle=True), "a Targa picture"),
        (encode(GRAY, "TGA"), "a Targa picture"),
        (encode(GRAY.convert("P"), "TGA"), "a Targa picture"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a camera's raw file"),
        (b"\0\0\0\x1cftypM4A \0\0\0\0M4A mp42", "a sound file"),
        (tiff(bytes(2048), 8, extra={254: 1}.items()), "a camera's raw file.*give a JPEG"),
        (tiff(bytes(2048), 8, extra={50706: 1}.items()), "a camera's raw file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "is a Git LFS pointer, not the file itself; run `git lfs pull`",
        ),
        (tiff(bytes(256 * 8 * 8), 64, kind=3), "not a picture that can be opened.*TIFF"),
        (b"GIF89a" + bytes(3), "not a picture that can be opened.*GIF"),
    ],
)
def test_other_files_are_named(start, what):
    with pytest.raises(InputError, match=what):
        load_image(start)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"progressive": True}), ("JPEG2000", {}), ("PPM", {})])
def test_pictures_that_are_open_or_decoded_already(kind, options):
    image = Image.open(io.BytesIO(encode(GRAY.convert("RGB"), kind, **options)))
    pixels = np.asarray(load_image(image))
    image.load()
    assert np.array_equal(np.asarray(load_image(image)), pixels)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_slightly_larger_value_changes_a_picture_slightly(kind):
    """Values up to 1 … 100,000: the shade of a picture's middle does not jump."""
    shades = []
    for top in np.geomspace(1, 1e5, 400):
        values = np.linspace(0, top, 64).astype(kind)[None].repeat(8, 0)
        shades.append(int(np.asarray(load_image(Image.fromarray(values)))[0, 32, 0]))
    assert max(abs(a - b) for a, b in itertools.pairwise(shades)) <= 12


@pytest.mark.parametrize("made", [lambda image: image, Image.Image.copy])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_key_of_a_decoded_png(bits, made):
    row = {2: np.full(64, 0b00011011), 4: four_bits(RAMP[0] >> 4), 8: np.arange(256)}[bits]
    data = png(bits, 0, bytes(row.tolist() if bits != 4 else row), key(1))
    image = made(Image.open(io.BytesIO(data)))
    image.load()
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(load_image(data)))
    assert (np.asarray(load_image(data))[0, :, 0] == 255).sum() > (bits == 8)


# --- bounds


def progressive(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(Image.new("RGB", (side, side), (200, 100, 50)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]


def small_precincts() -> bytes:
    """A JPEG 2000 with precincts of 2 × 2 pixels, which would take 7 GB: the sizes of a usual one are overwritten."""
    data = bytearray(encode(Image.new("RGB", (2048, 2048)), "JPEG2000", precinct_size=(128, 128), num_resolutions=6))
    sizes = data.index(b"\xff\x52") + 14
    data[sizes : sizes + 6] = b"\x11" * 6
    return bytes(data)


def jpeg_2000_of_many_starts() -> bytes:
    """A codestream in which the start of another one comes 60,000 times."""
    data = encode(Image.new("RGB", (64, 64)), "JPEG2000", no_jp2=True)
    return data[: 4 + struct.unpack_from(">H", data, 4)[0]] + (b"\xff\x4f\xff\x51\0\x08" + bytes(4)) * 60_000


def jpeg_2000_of_hidden_precincts() -> bytes:
    """Small precincts after a marker that has no length, and after a harmless codestream in a box of another kind."""
    harmless = encode(Image.new("RGB", (2048, 2048)), "JPEG2000", no_jp2=True)
    data = small_precincts()
    at, size = data.index(b"jp2c") - 4, data.index(b"\xff\x52")
    box = struct.pack(">I", len(harmless) + 8) + b"free" + harmless
    return data[:at] + box + data[at:size] + b"\xff\x30" + data[size:]


def mpo(jpeg: bytes) -> bytes:
    """A JPEG as a file of several pictures, as cameras and telephones write it."""
    image = Image.new("RGB", (16, 16))
    data = encode(image, "MPO", save_all=True, append_images=[image])
    at = data.index(b"MPF\0") - 4
    return jpeg[:2] + data[at : at + 2 + struct.unpack_from(">H", data, at + 2)[0]] + jpeg[2:]


def of_many_segments() -> bytes:
    """A JPEG with 30 MB of EXIF in 65 KB segments, which Pillow joins one by one."""
    jpeg = encode(GRAY, "JPEG")
    return jpeg[:2] + (b"\xff\xe1\xff\xffExif\0\0MM\0*\0\0\0\x08\0\0" + bytes(65517)) * 460 + jpeg[2:]


def exif(entries: int) -> bytes:
    """An EXIF block each of whose entries is the whole block."""
    size = 8 + 2 + 12 * entries
    body = b"".join(struct.pack(">HHII", i + 1000, 1, size, 0) for i in range(entries))
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", entries) + body


FLOODS = {
    "jpeg, segments": of_many_segments(),
    "jpeg, fill": encode(GRAY, "JPEG").replace(b"\xff\xdb", b"\xff" * 1_000_000 + b"\xdb", 1),
    "ppm, comment": b"P6\n#" + b"a" * 1_000_000 + b"\n1 1 255 abc",
    "png, chunks": png(8, 0, bytes(256), *[(b"abCd", b"")] * 100_000),
    "gif, comments": (g := encode(GRAY, "GIF"))[: g.index(b",")] + b"!\xfe\1a\0" * 100_000 + g[g.index(b",") :],
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_in_headers_are_refused_at_once(name):
    start = time.process_time()
    with pytest.raises(InputError, match="has a header of too many parts or bytes; save it again"):
        load_image(FLOODS[name])
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_would_be_copied_many_times_is_not_read(kind):
    data = encode(GRAY.convert("RGB"), kind, exif=exif(4000))
    tracemalloc.start()
    try:
        assert load_image(data).size == (256, 8)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # all copies would take 190 MB
    finally:
        tracemalloc.stop()


def test_headers_are_read_within_the_time(monkeypatch):
    budget = Budget(MediaOptions(media_seconds=30))
    calls = iter([30.0] * 5)

    def left():
        if (seconds := next(calls, None)) is None:
            raise MediaError("took longer")
        return seconds

    monkeypatch.setattr(budget, "left", left)
    with pytest.raises(InputError, match="took longer"):
        image_visual(png(8, 0, bytes(256), *[(b"abCd", b"")] * 10), P, budget=budget)


def webp(side: int) -> bytes:
    """A lossless WebP of one colour in 34 bytes; its size is overwritten."""
    data = bytearray(encode(Image.new("RGBA", (16, 16)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1
    data[at : at + 4] = struct.pack("<I", side - 1 | side - 1 << 14 | 1 << 28)
    return bytes(data)


BOMBS = {
    "webp of few bytes": (webp(10000), r"would take [12],\d\d\d MiB of memory, the limit is 1,024 MiB.*media_memory"),
    "jpeg of many scans": (progressive(3000, 1500), "cannot be decoded .30.. scans"),
    "mpo of many scans": (mpo(progressive(3000, 1500)), "cannot be decoded .30.. scans"),
    "jpeg 2000 of many starts": (jpeg_2000_of_many_starts(), "damaged markers"),
    "jpeg 2000 of hidden precincts": (jpeg_2000_of_hidden_precincts(), "damaged markers"),
    "gif of a huge canvas": (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", "65535 × 65535 pixels"),
    "tiff of huge tiles": (
        tiff(bytes(2048), 8, extra={322: 60000, 323: 60000, 324: 8, 325: 2048}.items()),
        "its tiles are larger",
    ),
    "pgm decoded in Python": (b"P5 3000 3000 100\n" + bytes(9_000_000), "this form of PPM"),
    "jpeg 2000 of small precincts": (
        small_precincts(),
        "tiny precincts",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name):
    data, message = BOMBS[name]
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        image_visual(data, P)
    assert time.process_time() - start < 1


def test_memory_is_counted_for_the_whole_conversation():
    budget = Budget(MediaOptions(media_memory=20))
    one = GRAY.resize((1400, 1400)).convert("RGB")  # 12 MB of patches, 16 to decode
    with pytest.raises(InputError, match="would take 26 MiB of memory, the limit is 20 MiB"):
        image_visual(one, P, budget=budget)
    small = MediaOptions(max_pixels=700 * 700)  # 3 MB of patches
    image_visual(one, P, small, budget)
    with pytest.raises(InputError, match=r"use fewer or smaller ones, lower max_pixels, or raise media_memory"):
        image_visual(one, P, small, budget)


def test_decoders_side_by_side_wait_for_memory():
    budget, order = Budget(MediaOptions(media_memory=1)), []
    first = budget.memory(700_000, kept=1000)
    first.__enter__()

    def second():
        with budget.memory(700_000):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.05)
    order.append("first ends")
    first.__exit__(None, None, None)
    thread.join(5)
    assert order == ["first ends", "second"]


def test_decoders_of_all_conversations_share_the_memory():
    """Eight conversations decode side by side, and none loses its time to the others."""
    lock, held, peak = threading.Lock(), 0, 0

    def decode():
        nonlocal held, peak
        budget = Budget(MediaOptions(media_memory=1, media_seconds=0.1))
        with budget.memory(600_000, kept=300_000):
            with lock:
                held += 600_000
                peak = max(peak, held)
            time.sleep(0.04)
            with lock:
                held -= 600_000
        assert budget.left() > 0.01

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(decode) for _ in range(8)]:
            done.result(10)
    assert peak == 600_000


def test_a_clip_does_not_wait_for_pictures_that_wait():
    """The picture waits for another conversation's decoder, the clip for nothing of the picture's."""
    mine, other = Budget(MediaOptions(media_memory=10, media_seconds=5)), Budget(MediaOptions(media_memory=10))
    with mine.clip_decoder(4 << 20), other.memory(4 << 20):
        picture = threading.Thread(target=_take, args=(mine, 5 << 20))
        picture.start()
        time.sleep(0.02)
        mine.keep(5 << 20, in_clip=True)
    picture.join(5)
    assert not picture.is_alive()


def _take(budget: Budget, passing: int):
    with budget.memory(passing):
        pass


def test_two_clips_do_not_wait_for_each_other():
    """Each holds a decoder and then keeps patches, which fit one after the other only."""
    budget, ended = Budget(MediaOptions(media_memory=10, media_seconds=5)), []

    def decode(i):
        with budget.clip_decoder(4 << 20):
            time.sleep(0.02)
            budget.keep(3 << 20, in_clip=True)
            ended.append(i)

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(ended) == [0, 1]


def test_bytes_and_seconds_are_counted_for_the_whole_conversation(tmp_path):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8)), "PNG")
    path = tmp_path / "noise.png"
    path.write_bytes(data)
    for given in (data, path):
        budget = Budget(MediaOptions(media_bytes=1))
        image_visual(given, P, budget=budget)
        with pytest.raises(InputError, match=r"are larger than 1 MiB; .* raise media_bytes"):
            image_visual(given, P, budget=budget)
    budget = Budget(MediaOptions(media_seconds=0.01))
    time.sleep(0.02)
    with pytest.raises(InputError, match=r"took longer than 0\.01 seconds; .* raise media_seconds"):
        image_visual(data, P, budget=budget)
