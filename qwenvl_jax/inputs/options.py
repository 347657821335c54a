"""Options of pictures and clips, for keyword arguments, message items, requests, flags and TOML keys."""

from dataclasses import dataclass

from qwenvl_jax.options import Number, check, option
from qwenvl_jax.types import COORDINATES

_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """Sizes of pictures and frames, and which frames of a clip are sampled. None means the checkpoint's default.

    Options of a conversation apply to all its pictures and clips; an item of a message overrides them. The limits
    (`LIMITS`) are for all media of a conversation together; neither an item nor a request can set them.
    """

    min_pixels: Number | None = option(None, "least pixels of an image or frame", above=0, title="images and videos")
    max_pixels: Number | None = option(None, "most pixels of an image or frame", above=0)
    resized_height: int | None = option(None, "exact height in pixels; needs resized_width", above=0, most=_INT32)
    resized_width: int | None = option(None, "exact width in pixels; needs resized_height", above=0, most=_INT32)
    fps: Number | None = option(None, "frames per second to sample from a video; default: 2", above=0)
    nframes: int | None = option(None, "frames to sample from a video, instead of fps", above=0, most=_INT32)
    min_frames: int | None = option(None, "least frames that fps may sample from a video", above=0, most=_INT32)
    max_frames: int | None = option(None, "most frames that fps may sample from a video", above=0, most=_INT32)
    total_pixels: Number | None = option(None, "most pixels of a video; two frames count once", above=0)
    video_start: Number | None = option(None, "second of the video to start at", least=0)
    video_end: Number | None = option(None, "second of the video to end at", least=0)
    media_bytes: int | None = option(
        None,
        "most MiB of files and downloads of a conversation; default: 512",
        above=0,
        most=1 << 20,
        free=True,
    )
    media_memory: int | None = option(
        None, "most MiB of memory for its decoders and patches; default: 1024", above=0, most=1 << 20, free=True
    )
    media_seconds: Number | None = option(
        None, "most seconds to read and decode them; default: 60", above=0, most=10**6, free=True
    )

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a conversation becomes a prompt."""

    add_vision_id: bool = option(False, "number the images and videos in the prompt", title="prompt")
    allow_control_tokens: bool | None = option(
        None,
        "read tokens such as <|box_start|> in texts as control tokens, and keep them in answers; "
        "default: as the checkpoint was trained",
    )

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How records are read, to train on and to answer."""

    columns: tuple[str, ...] = option(
        (), "OLD=NEW renames a key of every record, OLD= passes over it; repeatable", title="records"
    )
    on_bad_record: str = option("stop", "what to do with an unusable record", choices=("stop", "skip"))
    boxes: str | None = option(
        None,
        "coordinates of boxes in texts, unless a record names its own; `generate` answers in them too, without "
        "streaming; default: the model's",
        choices=COORDINATES,
    )

    def __post_init__(self):
        check(self)


# The options that an item of a message may set, by its type. A list of frames is sampled already.
IMAGE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
FRAMES = (*IMAGE, "fps")
LIMITS = ("media_bytes", "media_memory", "media_seconds")
VIDEO = tuple(name for name in MediaOptions.__dataclass_fields__ if name not in LIMITS)
DEFAULT = MediaOptions()
