"""The demo: its checkpoint, and samples to ask it about. notebooks/demo has the scripts that made both."""

from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"
