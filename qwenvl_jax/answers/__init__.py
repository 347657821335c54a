"""What the text of an answer means: boxes, points, pages, times, tool calls. Host code without jax."""
