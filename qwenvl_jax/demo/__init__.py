"""Data for the demo checkpoint: questions about rendered pictures, charts and clips, and its small tokenizer.

Everything is drawn when it is asked for, from a seed and an index, so that nothing need be stored; but for a few
samples to try the checkpoint on, which lie in `SAMPLES`.
"""

from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"
