"""The scripts behind the demo checkpoint: they draw its data, write its tokenizer, train it and score it.

A record is drawn from a seed and an index when it is needed, so no data set is stored. Run a script by name, for
example `python notebooks/demo train --help`.
"""
