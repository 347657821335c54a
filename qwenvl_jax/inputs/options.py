"""The options of pictures and clips, for keyword arguments, items of messages, requests, flags and TOML keys."""

from dataclasses import dataclass

from qwenvl_jax.options import Number, check, option

_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """Sizes of pictures and frames, and which frames of a clip are taken. None leaves it to the checkpoint.

    Options given for a whole conversation hold for every picture and clip; an item of a message overrides them.
    """

    min_pixels: Number | None = option(None, "least pixels of an image or frame", above=0, title="images and videos")
    max_pixels: Number | None = option(None, "most pixels of an image or frame", above=0)
    resized_height: int | None = option(
        None, "height to resize to instead of the bounds; with resized_width", above=0, most=_INT32
    )
    resized_width: int | None = option(
        None, "width to resize to instead of the bounds; with resized_height", above=0, most=_INT32
    )
    fps: Number | None = option(None, "frames per second to sample from a video; default: 2", above=0)
    nframes: int | None = option(None, "frames to sample from a video, instead of fps", above=0, most=_INT32)
    min_frames: int | None = option(None, "least frames to sample from a video by fps", above=0, most=_INT32)
    max_frames: int | None = option(None, "most frames to sample from a video by fps", above=0, most=_INT32)
    total_pixels: Number | None = option(None, "most pixels of a video: all its frames, counted in pairs", above=0)
    video_start: Number | None = option(None, "seconds into the video to start at", least=0)
    video_end: Number | None = option(None, "seconds into the video to end at", least=0)

    def __post_init__(self):
        check(self)


# What an item of a message may set, by its type. A list of frames has been sampled before it comes here.
IMAGE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
FRAMES = (*IMAGE, "fps")
VIDEO = tuple(MediaOptions.__dataclass_fields__)
DEFAULT = MediaOptions()
