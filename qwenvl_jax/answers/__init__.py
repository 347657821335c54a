"""What the text of an answer means: boxes and their coordinates. Host code that imports neither jax nor numpy."""
