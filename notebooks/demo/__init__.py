"""The scripts behind the demo checkpoint: they draw its data, write its tokenizer, train it and score it.

Each record is drawn on demand from a seed and an index, so no data set is stored. Run a script by its name, such as
`python notebooks/demo train --help`.
"""
