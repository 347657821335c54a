"""The options of `quantize`, for flags and Python. Imports neither jax nor numpy."""

from dataclasses import dataclass

from qwenvl_jax.errors import OptionsError
from qwenvl_jax.inputs.options import MediaOptions, PromptOptions, RecordOptions
from qwenvl_jax.options import check, option

FORMATS = ("compressed-tensors", "awq")
GROUP = 128


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(MediaOptions, PromptOptions, RecordOptions):
    """How a checkpoint is quantised. Raises OptionsError for a wrong value and for options that contradict."""

    bits: int = option(4, "bits of a weight: 4, or 8, which needs no records", title="quantisation")
    group: int | None = option(
        None, f"inputs that share a scale, for 4 bits (default: {GROUP}); 8 bits have a scale per output", above=0
    )
    format: str = option("compressed-tensors", "format of the files; awq holds 4 bits only", choices=FORMATS)
    vision: bool = option(False, "quantise the vision tower too, in 8 bits")
    data: tuple[str, ...] = option(
        (), "records to calibrate 4 bits on, as for qwenvl train; repeatable; default: none, rounds to nearest"
    )
    records: int = option(128, "records of the data to use, drawn at random", least=1)

    def __post_init__(self):
        check(self)
        if self.bits not in (4, 8):
            raise OptionsError(f"bits is {self.bits}; it must be 4 or 8")
        if self.bits == 8:
            if self.data:
                raise OptionsError("data is to calibrate 4 bits; 8 bits are rounded to nearest, so leave it out")
            if self.group is not None:
                raise OptionsError(f"group is {self.group}; it is for 4 bits, since 8 bits have a scale per output")
        if self.format == "awq" and (self.bits == 8 or self.vision):
            what = "the tower needs 8 bits" if self.vision else "bits is 8"
            raise OptionsError(f"format awq holds 4 bits, and {what}; use compressed-tensors")
