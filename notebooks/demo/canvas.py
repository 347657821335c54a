"""Backgrounds, ink colours and noise of all drawn pictures."""

import numpy as np
from PIL import Image


def background(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """A plain, shaded or blotched RGB picture and its mean colour [3]. Half are near white."""
    kind, tint = rng.random(2)
    colour = rng.integers(215, 256, 3) if tint < 0.5 else rng.integers(0, 256, 3)
    if kind < 0.4:
        return Image.new("RGB", (width, height), tuple(colour.tolist())), colour
    spread = 30
    shape = (2, 2, 3) if kind < 0.75 else (max(2, height // 14), max(2, width // 14), 3)
    knots = np.clip(colour + rng.integers(-spread, spread + 1, shape), 0, 255).astype(np.uint8)
    return Image.fromarray(knots).resize((width, height), Image.Resampling.BILINEAR), colour


def contrast(rng: np.random.Generator, ground: np.ndarray, least: float = 110) -> tuple[int, int, int]:
    """A random colour at least that much darker or lighter than the ground, in luma."""
    weights = np.array([0.299, 0.587, 0.114])
    luma = float(weights @ ground)
    target = rng.uniform(0, luma - least) if luma > 127 else rng.uniform(luma + least, 255)
    colour = rng.integers(0, 256, 3)
    own = float(weights @ colour)
    # Scale towards black or white until the luma is the target.
    mixed = colour * (target / own) if own > target else 255 - (255 - colour) * ((255 - target) / (255 - own))
    return tuple(int(c) for c in np.clip(mixed, 0, 255))


def grain(rng: np.random.Generator, image: Image.Image, strength: int = 16) -> Image.Image:
    """The picture with uniform noise of ±strength, clipped."""
    pixels = np.asarray(image).astype(np.int16)
    noise = np.frombuffer(rng.bytes(pixels.size), np.uint8).reshape(pixels.shape)
    scale = int(rng.integers(4, strength + 1))
    return Image.fromarray(np.clip(pixels + (noise.astype(np.int16) - 128) * scale // 128, 0, 255).astype(np.uint8))
