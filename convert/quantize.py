"""Writes a checkpoint anew with its Linears in 8 or 4 bits, a layer at a time.

8 bits are rounded to nearest, with a scale per output. 4 bits have a scale per group of inputs; records calibrate them
(convert/rounding.py). The vision tower stays as it is unless asked for, and the embeddings and the head always do.
The files are those that transformers and vLLM open: compressed-tensors' pack-quantized format, or AWQ's "gemm".
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from qwenvl_convert import quantised
from qwenvl_convert.calibrate import Rows, embed_rows, output_errors, pass_layer, read_samples, whole
from qwenvl_convert.hf import card
from qwenvl_convert.names import tensor_names, tensor_shape
from qwenvl_convert.options import GROUP, QuantizeOptions
from qwenvl_convert.orbax import SHARD, file_order, orderly_interrupt, read_ahead, write_side_files
from qwenvl_convert.rounding import LINEARS, Rounded, round_layer, scale_layer, to_nearest, weight_errors
from qwenvl_convert.safetensors import Writer
from tqdm import tqdm

from qwenvl_jax.config import Config, Quantised, read_json
from qwenvl_jax.errors import CheckpointError, InputError
from qwenvl_jax.families.quantisation import AWQ, Scheme, form_of, to_dict, written
from qwenvl_jax.inputs.processor import Processor
from qwenvl_jax.inputs.source import open_records
from qwenvl_jax.options import build, replace
from qwenvl_jax.params.checkpoint import check_new, open_weights, staged, write_json
from qwenvl_jax.params.directory import linear_modules, read_config
from qwenvl_jax.params.locate import locate
from qwenvl_jax.params.place import Leaf, Source, progress_bar
from qwenvl_jax.params.specs import specs, unflatten

REPORT = "quantization_report.json"
_LAYERS = "decoder/layers/"


@dataclass
class Report:
    """What quantising did.

    layers: for each layer, the relative errors by what is measured: "nearest" and "calibrated" of outputs, by the names
        of SHARED and "block" (relative to what the block adds); without records "weights", by the names of SHARED.
    vision: the relative error of the tower's weights, None if it stays as it is.
    before, after: bytes of the weights. records, tokens: what was calibrated on.
    """

    bits: int
    group: int
    format: str
    before: int
    after: int
    records: int
    tokens: int
    layers: list[dict[str, dict[str, float]]]
    vision: float | None = None

    def table(self) -> str:
        """For people: a line per layer, in percent, and the sizes."""
        columns = ["attention", "o_proj", "mlp", "down_proj", *(["block"] if self.records else [])]
        kinds = ["nearest", "calibrated"] if self.records else ["weights"]
        lines = [f"{'layer':>5}" + "".join(f"{name:>18}" for name in columns)]
        for l, errors in enumerate(self.layers):
            cells = (" → ".join(f"{errors[kind][name]:.2%}" for kind in kinds) for name in columns)
            lines.append(f"{l:>5}" + "".join(f"{cell:>18}" for cell in cells))
        what = "outputs, rounded to nearest → calibrated" if self.records else "weights, rounded to nearest"
        lines += [f"relative errors of {what}"]
        if self.vision is not None:
            lines += [f"vision tower: {self.vision:.2%} of its weights"]
        return "\n".join([*lines, f"{self.before / 1e6:,.1f} MB → {self.after / 1e6:,.1f} MB"])


def quantize(src, dst, options: QuantizeOptions | None = None, *, progress: bool = True, **changes) -> Report:
    """Writes the checkpoint `src`, named as for `load`, in few bits as a new Hugging Face directory `dst`.

    changes: options by name; they win over `options`.
    Needs memory for a layer in float32, a few times over; with records, also for their hidden states, and once for the
    vision tower and the embeddings. A run that is interrupted leaves no `dst` and starts anew.
    Raises InputError if `dst` exists, if the disk is full, if `load` would refuse `src`, if it is quantised already, if
    the group does not divide a Linear's inputs, or if a record cannot be used.
    """
    options = build(QuantizeOptions, changes) if options is None else replace(options, changes)
    located = locate(src, weights=False)
    config = read_config(located.path)
    if config.quantised:
        raise CheckpointError(f"{located.path}: is quantised already; quantise the original model")
    processor = Processor.from_dir(located.path, config, located.adapters)
    schemes = choose_schemes(config, options)
    check_new(dst, located.path)
    records = open_records(options.data, options.columns) if options.data else None
    with open_weights(located, config) as source:
        shapes = _shapes(source, config, schemes)
        after = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
        report = Report(options.bits, group_of(options), options.format, source.nbytes, after, 0, 0, [])
        with staged(dst, after, located.path) as work:
            rows = None
            if records is not None:
                bar = partial(tqdm, desc="reading", unit=" records", disable=None if progress else True)
                samples = read_samples(records, options, processor, bar)
                rows = embed_rows(source, config.replace(dtype="float32"), samples)
                report.records = int(rows.segments.max(-1).sum())
                report.tokens = int(np.count_nonzero(rows.segments))
            _write_weights(source, config, schemes, rows, work, shapes, report, progress)
            write_side_files(located, work)
            settings = read_json(work / "config.json")
            write_json(work / "config.json", settings | {"quantization_config": settings_of(config, schemes)})
            write_json(work / REPORT, asdict(report))
            (work / "README.md").write_text(card(located.name) + _card(report), "utf-8")
    return report


def group_of(options: QuantizeOptions) -> int:
    """Inputs that share a scale; 0: all."""
    return 0 if options.bits == 8 else options.group or GROUP


def choose_schemes(config: Config, options: QuantizeOptions) -> dict[str, Scheme]:
    """How the files will hold each Linear that is quantised, by its path. Raises InputError if they cannot."""
    group, awq = group_of(options), options.format == "awq"
    decoder = Scheme(AWQ, 4, group, zeros=True) if awq else written(Quantised(f"int{options.bits}", group))
    linears = {p.removesuffix("/kernel"): s for p, s in specs(config).items() if s.role == "linear"}
    ours = {linear: spec for linear, spec in linears.items() if spec.group == "llm"}
    for linear, spec in ours.items():
        n_in, n_out = spec.shape[-2:]
        if awq and n_out % 8:
            raise InputError(f"{linear} has {n_out} outputs, but awq needs a multiple of 8; use compressed-tensors")
        if group and n_in % group:
            common = math.gcd(*(s.shape[-2] for s in ours.values()))
            best = max(n for n in range(1, group + 1) if common % n == 0)
            raise InputError(
                f"group {group} does not divide the {n_in} inputs of {linear}; the largest group is {best}"
            )
    tower = {linear: written(Quantised("int8")) for linear in linears.keys() - ours.keys() if options.vision}
    return dict.fromkeys(ours, decoder) | tower


def settings_of(config: Config, schemes: dict[str, Scheme]) -> dict:
    """The `quantization_config` of config.json."""
    one = next(iter(schemes.values()))
    if one.format == AWQ:
        how = {"quant_method": "awq", "version": "gemm", "bits": one.bits, "group_size": one.group, "zero_point": True}
        return how | {"modules_to_not_convert": ["visual"]}
    return to_dict({linear: form_of(scheme) for linear, scheme in schemes.items()}, linear_modules(config))


def _card(report: Report) -> str:
    how = f"calibrated on {report.records} records" if report.records else "rounded to nearest"
    scales = f"a scale for {report.group} inputs" if report.group else "a scale per output"
    return f"\nIts linear layers are held in {report.bits} bits with {scales} ({report.format}), {how}.\n"


def scale_dtype(scheme: Scheme, kernel: Leaf) -> np.dtype:
    """The dtype of the stored scales: AWQ's is float16, compressed-tensors' that of the weights."""
    return np.dtype(np.float16) if scheme.format == AWQ else kernel.dtype


def _shapes(source: Source, config: Config, schemes: dict[str, Scheme]) -> dict[str, tuple]:
    """The dtype and shape of every tensor to write, in file order."""
    shapes: dict[str, tuple] = {}
    for path, name in file_order(tensor_names(config)):
        leaf, linear = source.leaves[path], path.removesuffix("/kernel")
        if scheme := schemes.get(linear):
            kinds = quantised.encoded(scheme, *leaf.shape[-2:], {"scales": scale_dtype(scheme, leaf)})
            shapes |= {f"{name.removesuffix('.weight')}.{suffix}": kind for suffix, kind in kinds.items()}
        else:
            shapes[name] = leaf.dtype, tensor_shape(config, leaf.spec)
    return shapes


@dataclass
class _Copy:
    """A checkpoint on its way into new files."""

    source: Source
    schemes: dict[str, Scheme]
    names: dict[str, tuple[str, ...]]
    writer: Writer
    bar: tqdm

    def read(self, path: str, layer: int) -> np.ndarray:
        """A layer of a parameter in float32. Raises CheckpointError if it is not finite."""
        leaf, lead = self.source.leaves[path], int(self.source.leaves[path].spec.stacked)
        index = (*[slice(layer, layer + 1)][:lead], *whole(leaf)[lead:])
        x = self.source.read(leaf, index, "float32", self.bar)
        if not np.isfinite(x).all():
            raise CheckpointError(f"{self.names[path][layer]} holds NaN or infinity, which cannot be rounded")
        return x[0] if lead else x

    def write(self, path: str, layer: int, x) -> None:
        """Writes a layer of a parameter: a vector, or a Rounded."""
        leaf, name = self.source.leaves[path], self.names[path][layer]
        tensors = {name: x}
        if isinstance(x, Rounded):
            scheme = self.schemes[path.removesuffix("/kernel")]
            arrays = {
                "kernel": x.kernel,
                "scales": np.asarray(x.scales).astype(scale_dtype(scheme, leaf)),
                "zeros": x.zeros,
            }
            encoded = quantised.encode(scheme, {key: np.asarray(a) for key, a in arrays.items() if a is not None})
            tensors = {f"{name.removesuffix('.weight')}.{suffix}": a for suffix, a in encoded.items()}
        for name, array in tensors.items():
            array = np.asarray(array) if isinstance(x, Rounded) else np.asarray(array).astype(leaf.dtype)
            self.writer.write_rows(name, 0, array if array.ndim == 2 else array.reshape(-1, 1), False)

    def copy(self, path: str, after_piece) -> None:
        """Copies a parameter as it is; `after_piece` is called after each piece."""
        leaf = self.source.leaves[path]
        for piece, part in read_ahead(self.source, leaf, self.bar):
            layer = piece[0].start if leaf.spec.stacked else 0
            part, piece = (part[0], piece[1:]) if leaf.spec.stacked else (part, piece)
            row = piece[-1 if leaf.spec.transposed else 0].start
            part = part if part.ndim > 1 else part[:, None]
            self.writer.write_rows(self.names[path][layer], row, part, leaf.spec.transposed)
            after_piece()


def _write_weights(
    source: Source,
    config: Config,
    schemes: dict[str, Scheme],
    rows: Rows | None,
    work: Path,
    shapes: dict[str, tuple],
    report: Report,
    progress: bool,
) -> None:
    """Writes all tensors and fills in the report."""
    names = tensor_names(config)
    with (
        progress_bar("quantising", source.nbytes, progress) as bar,
        orderly_interrupt() as raise_if_interrupted,
        Writer(work, shapes, SHARD) as writer,
    ):
        job, tower = _Copy(source, schemes, names, writer, bar), []
        for path in names:
            if path.startswith(_LAYERS):
                continue
            if path.removesuffix("/kernel") not in schemes:
                job.copy(path, raise_if_interrupted)
                continue
            for l in range(len(names[path])):
                kernel = jnp.asarray(job.read(path, l))
                rounded = to_nearest(kernel, Quantised("int8"), source.leaves[path].dtype.name)
                job.write(path, l, rounded)
                tower.append([float(jnp.sum(x * x)) for x in (rounded.dense() - kernel, kernel)])
                raise_if_interrupted()
        report.vision = math.sqrt(np.divide(*np.sum(tower, 0))) if tower else None
        for l in range(config.text.num_hidden_layers):
            _write_layer(job, config.replace(dtype="float32"), l, rows, report)
            raise_if_interrupted()
        writer.finish()


def _write_layer(job: _Copy, config: Config, l: int, rows: Rows | None, report: Report) -> None:
    """Reads a layer of the decoder, rounds it, writes it, and moves the rows past it. config: computes in float32."""
    paths = [path for path in job.names if path.startswith(_LAYERS)]
    layer = unflatten({path.removeprefix(_LAYERS): jnp.asarray(job.read(path, l)) for path in paths})
    first = f"{_LAYERS}{LINEARS[0]}"
    scheme, kernel = job.schemes[first], job.source.leaves[f"{first}/kernel"]
    form, dtype = form_of(scheme), scale_dtype(scheme, kernel).name
    rounded = round_layer(layer, None, form, dtype)
    if rows is None:
        errors = {"weights": weight_errors(layer, rounded)}
    else:
        row = rows.x[0].copy(), rows.positions[0], rows.segments[0]  # errors are measured on it
        inputs = pass_layer(config, layer, rows, scheme.group)
        errors = {"nearest": output_errors(config, layer, rounded, *row)}
        layer, inputs = scale_layer(layer, inputs, form, dtype, config.text)
        rounded = round_layer(layer, inputs, form, dtype)
        errors["calibrated"] = output_errors(config, layer, rounded, *row)
    report.layers.append(jax.tree.map(float, errors))
    layer = layer | {linear: layer[linear] | {"kernel": rounded[linear]} for linear in LINEARS}
    for path in paths:
        module, leaf = path.removeprefix(_LAYERS).rsplit("/", 1)
        job.write(path, l, layer[module][leaf])
