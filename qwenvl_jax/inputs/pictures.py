"""Decodes untrusted pictures: which formats are opened, within which bounds, and what is seen of every mode.

What a person would see counts: transparency shows white, 16 bits are scaled to 8, and the picture stands upright.
"""

import math
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from qwenvl_jax.errors import MediaError
from qwenvl_jax.inputs.preprocessing import MAX_PIXELS, check_aspect

# The formats that are opened, and the bytes of memory per pixel that Pillow 13 takes to decode them (measured).
# Other readers of Pillow are not worth the risk: EPS runs Ghostscript, ICO and PSD are decoded on opening, and few are
# fuzzed. JPEG brings MPO.
_BYTES = {
    "JPEG": 4,
    "PNG": 4,
    "WEBP": 16,
    "GIF": 2,
    "BMP": 4,
    "DIB": 4,
    "TIFF": 5,
    "PPM": 5,
    "JPEG2000": 26,
    "AVIF": 13,
}
_PROGRESSIVE = 12  # a progressive JPEG: all its coefficients are in memory
_OTHER = 4  # a picture that is decoded already, or was opened by someone else
_RGB, _OTHER_MODE = 4, 9  # and to turn it upright and convert it
_SCANS = 1 << 32  # most pixels times scans of a progressive JPEG, which is decoded once per scan: some seconds
_SLOW = 1 << 22  # pixels of the forms of PPM that Pillow decodes in Python, at a microsecond each
_HEADER_READS, _HEADER = 1 << 17, 16 << 20  # most reads and bytes of a header: colour profiles, EXIF, comments
_TIFF_HEADER = 128 << 20  # Photoshop keeps its layers there
_READS = 1 << 20  # most reads after the header; PNGs need a few for each chunk
_EXIF = 64 << 20  # most bytes that Pillow makes of an EXIF block
_EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for the orientation
_MARKERS = 1 << 18  # of a JPEG 2000 file; a large one of many tiles has some ten thousand
_KNOWN = {*range(0xFF50, 0xFF65), 0xFF74, 0xFF75, 0xFF77, 0xFF78, 0xFF90}  # its markers that have a length
_GIVE = "give a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 picture"
_RAW = "a camera's raw file (DNG, NEF, CR2, …)"
_LFS = "is a Git LFS pointer, not the file itself; run `git lfs pull` where it is"
_FILES = {  # the start of files that people have and that are not opened
    rb"....ftyp(hei|hev|mif1|msf1)": "a HEIC picture",
    rb"\xff\n|\0\0\0\x0cJXL ": "a JPEG XL picture",
    rb"%PDF": "a PDF document",
    rb"(\xef\xbb\xbf)?\s*(<\?xml|<svg|<!--.*<svg)": "an SVG drawing",
    rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head)": "a web page",
    rb"%!PS|\xc5\xd0\xd3\xc6": "an EPS or PostScript file",
    rb"8BPS": "a Photoshop file",
    rb"\0\0[\2\3\n\x0b]\0{5}|\0\x01[\x01\t]\0\0": "a Targa picture (TGA)",
    rb"\0\0[\1\2]\0": "an icon (ICO)",
    rb"gimp xcf": "a GIMP file",
    rb"\x76\x2f\x31\x01": "an OpenEXR picture",
    rb"#\?RADIANCE": "a Radiance picture",
    rb"DDS ": "a DDS texture",
    rb"SIMPLE  =": "a FITS picture",
    rb"....ftypcrx |FUJIFILMCCD-RAW|IIRO|IIRS|MMOR|IIU\0|II[*]\0....CR|FOVb|\0MRM": _RAW,
    rb"....ftypM4[ABP] |ID3|fLaC|RIFF....WAVE": "a sound file",
    rb"#EXTM3U": "a playlist (HLS)",
    rb"qoif": "a QOI picture",
    rb"PK\x03\x04|\x1f\x8b": "a compressed archive",
    rb"\x93NUMPY": "a NumPy array",
    rb"....ftyp(?!avif|avis)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01": "a video, to be given as one",
}  # fmt: skip
_UPRIGHT = {  # EXIF orientation → the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Watched:
    """A binary file whose readers end: each read looks at the clock, and headers are bounded.

    Pillow reads headers in Python, some of them byte by byte, and joins their parts.
    """

    def __init__(self, file, check: Callable[[], object]):
        self._file, self._check = file, check
        self._reads = self._bytes = math.inf

    def limit(self, reads: float, count: float) -> None:
        """How many reads and bytes are left. A read of the whole file counts no bytes."""
        self._reads, self._bytes = reads, count

    def read(self, size: int = -1) -> bytes:
        self._check()
        self._reads -= 1
        data = self._file.read(size)
        if size is not None and size >= 0:
            self._bytes -= len(data)
        if self._reads < 0 or self._bytes < 0:
            raise MediaError("has a header of too many parts or bytes; save it again without its metadata")
        return data

    def __getattr__(self, name: str):
        return getattr(self._file, name)


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG, and the first picture of an MPO."""

    def _read_dpi_from_exif(self) -> None:
        """The resolution does not matter, and Pillow would keep a copy of the block for each of its entries."""


def identify(file, check: Callable[[], object] = lambda: None) -> Image.Image:
    """The picture of a binary file, of which only the header was read. Raises MediaError that names what it is instead.

    check: is called at every read, now and in `decode`; it may raise MediaError.
    Image.open would do the same, but tries more formats, and warns about sizes by its own limit.
    """
    Image.init()
    start = file.read(64)
    check_start(start)
    prefix = start[:16].ljust(16, b"\0")  # Pillow unpacks numbers from it without checking its length
    failed = ""
    for kind in _BYTES:
        opener, accepts = Image.OPEN[kind]
        if accepts and accepts(prefix) is not True:
            continue  # False, or a str: this Pillow was built without the format
        file.seek(0)
        watched = _Watched(file, check)
        watched.limit(_HEADER_READS, _TIFF_HEADER if kind == "TIFF" else _HEADER)
        try:
            image = (_Jpeg if kind == "JPEG" else opener)(watched, None)
            watched.limit(_READS, math.inf)
            if kind == "TIFF" and (50706 in image.tag_v2 or image.tag_v2.get(254) == 1 or start[8:10] == b"CR"):
                raise MediaError(f"is {_RAW}; {_GIVE}")  # Pillow would open the thumbnail
            return image
        except MediaError:
            raise
        except Exception as e:  # on a damaged header Pillow raises anything, struct.error included
            failed = f"{kind}: {e}"
    if what := other_kind(start):
        raise MediaError(f"is {what}; {_GIVE}")
    if failed:
        raise MediaError(
            f"not a picture that can be opened: it is damaged, or its pixels are of a rare form ({failed})"
        )
    raise MediaError("not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF, …), or damaged")


def check_start(start: bytes) -> None:
    """Raises MediaError for a file that is empty, or not there yet. start: its first 64 bytes."""
    if not start:
        raise MediaError("is empty")
    if start.startswith(b"version https://git-lfs"):
        raise MediaError(_LFS)


def other_kind(start: bytes) -> str | None:
    """What a file is that is not opened as a picture, if its first 64 bytes tell: "a PDF document"."""
    return next((what for pattern, what in _FILES.items() if re.match(pattern, start, re.DOTALL)), None)


def opened_kind(start: bytes) -> str | None:
    """The format of a picture that is opened, if its first 64 bytes tell: "PNG"."""
    Image.init()
    prefix = start.ljust(16, b"\0")
    return next((name for name in _BYTES if (accepts := Image.OPEN[name][1]) and accepts(prefix) is True), None)


def check_size(width: int, height: int) -> None:
    """Raises MediaError for a picture that is empty, too large or too narrow."""
    if width * height > MAX_PIXELS:
        raise MediaError(f"{width} × {height} pixels; the limit is {MAX_PIXELS:,} pixels in all")
    check_aspect(width, height)


def cost(image: Image.Image) -> int:
    """Bytes of memory that `decode` takes at most. Raises MediaError for a file that asks for far more work."""
    file = getattr(image, "fp", None)
    undecoded = file is not None and not file.closed
    area, kind = image.width * image.height, image.format if undecoded else None
    after = _RGB if image.mode == "RGB" and "transparency" not in image.info else _OTHER_MODE
    if kind in ("JPEG", "MPO") and image.info.get("progressive"):
        scans = _bytes_of(image).count(b"\xff\xda")
        if scans > 20 and scans * area > _SCANS:
            raise MediaError(f"cannot be decoded ({scans} scans; save it again)")
        return (_PROGRESSIVE + after) * area
    if kind == "TIFF":  # a tile is decoded whole, also where it is larger than the picture
        sides = [image.tag_v2.get(tag, 0) for tag in (322, 323)]
        if not all(isinstance(s, int) for s in sides) or math.prod(sides) > max(4 * area, 1 << 22):
            raise MediaError("cannot be decoded (its tiles are larger than the picture)")
    if kind == "JPEG2000" and not _plain(_bytes_of(image), image.width, image.height):
        raise MediaError(
            "cannot be decoded (JPEG 2000 with tiny precincts or code-blocks, or damaged markers; save it again)"
        )
    if kind == "PPM" and image.tile and image.tile[0].codec_name != "raw" and area > _SLOW:
        raise MediaError(f"cannot be decoded (more than {_SLOW:,} pixels of this form of PPM; save it again)")
    return (_BYTES.get(kind or "", _OTHER) + after) * area


def _plain(data: bytes, width: int, height: int) -> bool:
    """Whether a JPEG 2000 file has no more markers, precincts and code-blocks than files of real programs have.

    OpenJPEG takes a kilobyte for each block, so those of a few pixels would take up to 1.6 KB per pixel. The markers
    are those of ISO 15444-1, annex A: COD and COC give the sizes, in the main header or in that of any tile. Only the
    first codestream is decoded, so only it is walked.
    """
    at, tile, size = _codestream(data) + 2, 0, 0
    for _ in range(_MARKERS):
        if at + 14 > len(data):
            return True  # the end, or a file that was cut off
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == 0xFF93:  # SOD: compressed data, to the end of this part of a tile
            if not size:
                return True  # the last part, to the end of the file
            if tile + size <= at:
                return False
            at = tile + size
            continue
        if marker not in _KNOWN or length < 2:
            return marker == 0xFFD9  # OpenJPEG searches on after unknown markers, which have no length
        if marker == 0xFF90:  # SOT: the length of this part of a tile
            tile, size = at, struct.unpack_from(">I", data, at + 6)[0]
        if marker == 0xFF53 and width * height > 1 << 20:  # COC
            return False
        if marker == 0xFF52 and width * height > 1 << 16:  # COD
            levels, block = data[at + 9], data[at + 10] + data[at + 11] + 4
            precincts = 0
            for level, log in enumerate(data[at + 14 : at + 15 + levels] if data[at + 4] & 1 else b""):
                down = levels - level
                precincts += ((width >> down + (log & 15)) + 1) * ((height >> down + (log >> 4)) + 1)
            if block < 8 or precincts > width * height // 512 + 4096:
                return False
        at += 2 + length
    return False


def _codestream(data: bytes) -> int:
    """Where the first codestream of a JPEG 2000 file starts: at once, or in the first jp2c box."""
    at = 0
    for _ in range(_MARKERS):
        if data[at : at + 4] == b"\xff\x4f\xff\x51" or at + 16 > len(data):
            break
        size, kind, large = struct.unpack_from(">I4sQ", data, at)
        header, size = (16, large) if size == 1 else (8, size)
        at += header if kind == b"jp2c" else max(size, 8)
        if kind == b"jp2c":
            break
    return at


def _bytes_of(image) -> bytes:
    at = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(at)
    return data


def decode(image: Image.Image) -> Image.Image:
    """The whole picture, upright, as RGB. Raises MediaError."""
    try:
        raw = image.tile[0].args if getattr(image, "tile", None) else None
        low = _low_bytes(image) if raw == "RGB;16B" and "transparency" in image.info else None
        image.load()
        if low:
            image = _without_key(image, low)
        try:
            orientation = image.getexif().get(0x0112) if _exif_bytes(image.info) <= _EXIF else None
        except Exception:  # the EXIF block is damaged, the pixels may still be good
            orientation = None
        if isinstance(orientation, int) and orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
            for key in _EXIF_KEYS:  # else whoever gets the picture would turn it once more
                image.info.pop(key, None)
        return _as_rgb(image, raw)
    except MediaError:
        raise
    except Exception as e:  # decoders raise anything on damaged data
        raise MediaError(f"cannot be decoded ({e})") from e


def _low_bytes(image) -> Image.Image:
    """The lower halves of the 16 bits of a PNG in RGB, of which Pillow keeps the upper ones."""
    at = image.fp.tell()
    image.fp.seek(0)
    low = PngImagePlugin.PngImageFile(image.fp)
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # the second byte of each pair
    low.load()
    image.fp.seek(at)
    return low


def _without_key(image: Image.Image, low: Image.Image) -> Image.Image:
    """The picture with white where its 16 bits are its transparent colour."""
    key, image = np.array(image.info["transparency"]), image.copy()
    for top in range(0, image.height, 256):
        box = (0, top, image.width, min(top + 256, image.height))
        same = (np.asarray(image.crop(box)) == key >> 8) & (np.asarray(low.crop(box)) == key & 255)
        image.paste((255, 255, 255), box, Image.fromarray(same.all(-1).astype(np.uint8) * 255))
    del image.info["transparency"]
    return image


def _exif_bytes(info: dict) -> int:
    """Bytes that Pillow copies out of an EXIF block. Entries may overlap, so it can be the block's size many times."""
    data = info.get("exif")
    if data is None:
        data = bytes.fromhex("".join(info.get("Raw profile type exif", "").split("\n")[3:]))  # of a PNG
    data = data.removeprefix(b"Exif\0\0")
    order = "<" if data.startswith(b"II") else ">"
    if len(data) < 10:
        return 0
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    ends = range(start + 14, min(start + 2 + 12 * count, len(data)) + 1, 12)
    return sum(min(8 * struct.unpack_from(order + "I", data, end - 8)[0], len(data)) for end in ends)


def _as_rgb(image: Image.Image, raw) -> Image.Image:
    """What a person sees of a picture of any mode. raw: how a PNG stores its pixels ("L;4"), if known."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and key is None:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _shades(image, key)
    if key is not None:  # a colour, an index or the alpha of each index; `convert` reads it
        kind, image = image.format, image.copy()
        if raw in ("L;2", "L;4"):  # the key is not scaled as the pixels are
            key = key * {"L;2": 85, "L;4": 17}[raw]
        elif raw is None and kind in ("PNG", None) and image.mode == "L" and isinstance(key, int) and key < 16:
            key *= _step(image.histogram(), key)
        elif isinstance(key, tuple) and max(key) > 255:
            key = tuple(value >> 8 for value in key)
        image.info["transparency"] = key
    unused = image.format in ("BMP", "DIB") and image.mode == "RGBA" and image.getextrema()[3] == (0, 0)
    if unused or not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode != "RGBA":  # `convert` would copy it
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _step(histogram: list[int], key: int) -> int:
    """The factor of the shades of a decoded PNG of 2 or 4 bits; 1 if other shades are between them, as of 8 bits."""
    shades = [shade for shade, count in enumerate(histogram) if count]
    return next((s for s in (85, 17) if key * s <= 255 and all(shade % s == 0 for shade in shades)), 1)


def _shades(image: Image.Image, key) -> Image.Image:
    """Gray of 8 bits from whole numbers or floats. NaN is black, as is -inf; the key's values are white."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))
    if bits == (32,) and tags.get(339, (1,)) == (1,):  # Pillow reads unsigned numbers as signed ones
        values = values.view(np.uint32)
    if image.format == "PPM" and image.mode == "I":
        low, high = 0.0, 65535.0
    elif image.mode.startswith("I;"):
        low, high = 0.0, float((1 << bits[0]) - 1)
    else:
        low, high = _range(values)
    out = np.empty(values.shape, np.uint8)
    for at in range(0, len(values), 256):  # in strips, for less memory
        strip = values[at : at + 256].astype(np.float64)
        strip = np.nan_to_num((strip - low) * (255 / (high - low)), nan=0.0, posinf=255.0, neginf=0.0)
        out[at : at + 256] = (strip + 0.5).clip(0, 255)
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow undoes for 8 bits only
            out[at : at + 256] ^= 255
        if isinstance(key, int):
            out[at : at + 256][values[at : at + 256] == key] = 255
    return Image.fromarray(out).convert("RGB")


def _range(values: np.ndarray) -> tuple[float, float]:
    """Which values are black and white, if nothing declares it. Values beyond are shown as these.

    Usual are 0 … 1 and 0 … 255 for floats, 0 … 255 for whole numbers; values may pass them by half. Otherwise the
    largest value is white, and black is 0 or, of values that are clearly negative, the smallest. Between the cases the
    range is interpolated, so a slightly larger value never makes a picture black. Rare outliers do not count.
    """
    integral = values.dtype.kind in "iu"
    sample = values.ravel()[:: values.size >> 20 | 1]
    sample = sample if integral else sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    low, high = np.quantile(sample, (0.001, 0.999), method="nearest").astype(np.float64).tolist()
    largest, white = ((382.5, 510), (255, 510)) if integral else ((1.5, 127.5, 382.5, 510), (1, 255, 255, 510))
    top = high if high > 510 else float(np.exp(np.interp(np.log(max(high, 1e-9)), np.log(largest), np.log(white))))
    signed = min(max(-4 * low / top - 1, 0.0), 1.0)
    low, high = low * signed, top + (high - top) * signed
    return low, max(high, np.nextafter(low, np.inf))
