"""Costs of a compiled program, from its HLO text: operations, memory traffic, traffic between devices.

XLA's `cost_analysis` counts a loop's body once, counts a TPU's vector memory as traffic, and returns nothing for GPUs.
So this file reads the text instruction by instruction and multiplies a loop's body by its trip count.
"""

import math
import re
from collections import Counter, defaultdict
from functools import cache, cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
# Instructions without memory traffic.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "iota", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update", "add-dependency",
}  # fmt: skip
_ARITHMETIC = {"add", "subtract", "multiply", "divide"}
_KERNEL = re.compile(r"\b(?:splash_m[hq]a_|mha_)(fwd|dkv|dq|forward|backward)")
_QUANTISED = "/quantised_dot/"  # of kernels/quantised.py, for GPUs: x, then a kernel, scales and zeros of all layers
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Array(NamedTuple):
    """An array in a program.

    order: dimensions, the fastest-changing first. tile: memory is padded to multiples of it in the fastest dimensions;
    its last entry is for the fastest. fast: in a TPU's vector memory, not in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    fast: bool = False

    @property
    def bytes(self) -> int:
        """Size in memory, with padding."""
        sizes = [self.shape[d] for d in self.order[::-1]] if self.order else list(self.shape)
        for i, step in enumerate(reversed(self.tile[-len(sizes) :] if sizes else ()), 1):
            sizes[-i] = -(-sizes[-i] // step) * step
        return math.prod(sizes) * _bits(self.dtype) // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    results: tuple[Array, ...]  # the leaves of a tuple
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Collective(NamedTuple):
    """A collective: each of `group` devices sends `bytes`, `times` per run of the program."""

    kind: str
    bytes: int
    group: int
    times: int
    source: str  # op_name: the path of the operation in the model


class Program:
    """A compiled program's text (`compiled.as_text()`), per device."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        here: dict[str, Instruction] = {}
        last = None
        for line in text.splitlines():
            if match := _LINE.match(line):
                last = here[match[2]] = _instruction(match)
            elif match := _HEAD.match(line):
                here, last = self.computations.setdefault(match[1], {}), None
                self.entry = match[1] if line.startswith("ENTRY") else self.entry
            elif last:  # a kernel's metadata may span lines
                last = here[last.name] = last._replace(attributes=f"{last.attributes}\n{line}")

    @cached_property
    def runs(self) -> list[tuple[str, int]]:
        """(computation, how often it runs): the entry, and the bodies of loops, calls and branches."""
        found, queue = [], [(self.entry, 1)]
        while queue:
            name, times = queue.pop()
            found.append((name, times))
            for i in self.computations[name].values():
                if i.opcode == "while":
                    queue.append((_called(i, "body"), times * self.trips(i)))
                elif i.opcode == "call":
                    queue.append((_called(i, "to_apply"), times))
                elif i.opcode == "conditional":  # all branches are counted
                    queue += [(branch, times) for branch in _branches(i)]
        return found

    def trips(self, loop: Instruction) -> int:
        """A loop's trip count. Raises ValueError if the text does not state it."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(match[1])
        condition = self.computations[_called(loop, "condition")].values()
        bounds = [i for i in condition if i.opcode == "constant" and i.results[0].dtype in ("s32", "u32", "s64")]
        if len(bounds) != 1:
            raise ValueError(f"the loop {loop.name} states no trip count")
        return int(bounds[0].attributes.partition(")")[0].lstrip("("))

    @cached_property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-add of a matmul; one per element of +, −, ×, ÷ and reductions."""
        return sum(times * self._flops(name) for name, times in self.runs)

    def _flops(self, name: str) -> int:
        body, total = self.computations[name], 0
        for i in body.values():
            if i.opcode == "dot" or (i.opcode == "custom-call" and "gemm" in i.attributes):
                total += _dot(i, body[i.operands[0]].results[0])
            elif i.opcode == "convolution":
                total += _convolution(i, *(body[o].results[0] for o in i.operands[:2]))
            elif i.opcode == "custom-call" and (kernel := _KERNEL.search(f"{i.name} {_source(i)}")):
                total += _attention(i, kernel[1], [body[o].results[0] for o in i.operands])
            elif i.opcode == "custom-call" and "window_attention" in i.name:
                total += _windows(i, body[i.operands[-1]].results[0])
            elif i.opcode == "custom-call" and _QUANTISED in _source(i):
                x, kernel = (body[o].results[0].shape for o in i.operands[:2])
                total += 2 * x[0] * math.prod(kernel[1:])
            elif i.opcode == "custom-call":
                total += _stated(i, "flops") or 0
            elif i.opcode in ("fusion", "async-start"):
                total += self._flops(_called(i, "calls"))
            elif i.opcode in _ARITHMETIC and i.results[0].dtype.startswith(("f", "bf")):
                total += math.prod(i.results[0].shape)
            elif i.opcode == "reduce":
                total += math.prod(body[i.operands[0]].results[0].shape)
        return total

    @cached_property
    def bytes(self) -> int:
        """Traffic to and from the device's memory (HBM): operands and results of all instructions."""
        return sum(times * self.traffic(name, i) for name, times in self.runs for i in self.computations[name].values())

    def traffic(self, computation: str, i: Instruction) -> int:
        """Bytes that one instruction reads and writes; a slice reads only what it picks."""
        body = self.computations[computation]
        operands = [body[o].results for o in i.operands]
        written = _size(i.results)
        if i.opcode in _FREE or i.opcode in ("while", "call", "conditional") or i.opcode.endswith("-done"):
            return 0
        if i.opcode == "fusion":
            return self._fusion(_called(i, "calls"), i, operands)
        if i.opcode in ("copy-start", "slice-start"):  # results: (destination, source, …); a slice swaps them
            arrived = i.results[i.opcode == "slice-start"]
            return _size([arrived]) + (0 if operands[0][0].fast else arrived.bytes)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return written + (0 if operands[0][0].fast else written)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _size(operands[1 if i.opcode == "dynamic-update-slice" else 2])
        if i.opcode.removesuffix("-start") in COLLECTIVES:
            return sum(map(_size, operands)) + _size(i.results[-len(operands) :])
        if i.opcode == "custom-call" and _QUANTISED in _source(i):  # reads one layer of its stacks
            x, *stacks = operands
            return _size(x) + sum(_size(a) // a[0].shape[0] for a in stacks) + written
        if i.opcode == "custom-call" and (stated := _stated(i, "bytes_accessed")) is not None:
            return stated
        return sum(map(_size, operands)) + written

    def _fusion(self, name: str, i: Instruction, operands) -> int:
        """Bytes of a fusion: the parts of its operands that it reads, and its results."""
        reads, aliased = self._uses(name)
        total = sum(
            0 if array.fast else min(array.bytes, reads[n]) if n in reads else array.bytes
            for n, arrays in enumerate(operands)
            for array in arrays
        )
        return total + sum(0 if a.fast else aliased.get(n, a.bytes) for n, a in enumerate(i.results))

    @cache  # noqa: B019 - lives as long as the program
    def _uses(self, name: str) -> tuple[dict[int, int], dict[int, int]]:
        """({operand: bytes read} if only slices are read, {result: bytes written} if it is updated in place)."""
        body = self.computations[name]
        users = defaultdict(list)
        for i in body.values():
            for n, operand in enumerate(i.operands):
                users[operand].append((i, n))

        def read(value: str) -> int | None:  # None: the whole array
            total = 0
            for user, n in users[value]:
                if user.opcode in ("bitcast", "copy", "reshape", "transpose") and not user.root:
                    part = read(user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and n == 0:
                    part = user.results[0].bytes
                elif user.opcode == "dynamic-update-slice" and n == 0:
                    part = 0
                elif user.opcode == "fusion":
                    part = self._uses(_called(user, "calls"))[0].get(n)
                else:
                    return None
                if part is None:
                    return None
                total += part
            return total

        reads = {}
        for i in body.values():
            if i.opcode == "parameter" and (part := read(i.name)) is not None:
                reads[int(i.attributes.partition(")")[0].lstrip("("))] = part

        written = {}
        root = next(i for i in body.values() if i.root)
        outputs = [body[o] for o in root.operands] if root.opcode == "tuple" else [root]
        for n, output in enumerate(outputs):
            while output.opcode in ("bitcast", "copy", "reshape") and body[output.operands[0]].opcode != "parameter":
                output = body[output.operands[0]]
            if output.opcode == "dynamic-update-slice":
                written[n] = body[output.operands[1]].results[0].bytes
            elif output.opcode == "fusion" and 0 in (inner := self._uses(_called(output, "calls"))[1]):
                written[n] = inner[0]
        return reads, written

    @cached_property
    def collectives(self) -> list[Collective]:
        """All collectives, the one with most bytes first."""
        found: Counter = Counter()
        for name, times in self.runs:
            body = self.computations[name]
            for i in body.values():
                inner = i
                if i.opcode == "async-start":
                    inner = next(j for j in self.computations[_called(i, "calls")].values() if j.root)
                kind = inner.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    read = sum(a.bytes for o in i.operands for a in body[o].results)
                    written = sum(a.bytes for a in i.results[-len(i.operands) :])
                    group = _group(inner)
                    found[Collective(kind, _sent(kind, group, read, written), group, 0, _source(inner))] += times
        listed = [c._replace(times=times) for c, times in found.items()]
        return sorted(listed, key=lambda c: -c.bytes * c.times)


def _instruction(match: re.Match) -> Instruction:
    root, name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    results = tuple(_array(m) for m in _ARRAY.finditer(rest[:end]))
    inside = rest[start + 1 : stop]
    literal = opcode in ("constant", "parameter")
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode, results, operands, rest[start:] if literal else rest[stop + 1 :], bool(root))


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"unbalanced: {text[:80]}")


def _array(match: re.Match) -> Array:
    dtype, sizes, layout = match[1], match[2], match[3] or ""
    order, _, places = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", places)
    return Array(
        dtype,
        tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n),
        tuple(int(n) for n in order.split(",") if n),
        tuple(int(n) for n in tile[1].split(",")) if tile else (),
        bool(re.search(r"S\([1-9]\)", places)),
    )


def _bits(dtype: str) -> int:
    return _BITS[dtype] if dtype in _BITS else int(re.match(r"[a-z]+(\d+)", dtype)[1])


def _size(arrays) -> int:
    return sum(a.bytes for a in arrays if not a.fast)


def _called(i: Instruction, role: str) -> str:
    return re.search(rf"\b{role}=%?([\w.\-]+)", i.attributes)[1]


def _branches(i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    names = listed[1] if listed else " ".join(re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", i.attributes))
    return re.findall(r"%([\w.\-]+)", names)


def _source(i: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', i.attributes)
    return match[1] if match else ""


def _dot(i: Instruction, left: Array) -> int:
    match = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', i.attributes)
    dims = [int(d) for d in match[1].replace('"', "").split(",") if d]
    return 2 * math.prod(i.results[0].shape) * math.prod(left.shape[d] for d in dims)


def _convolution(i: Instruction, left: Array, right: Array) -> int:
    """Operations of a convolution. Zeros from padding or dilation do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    spatial = [c for c in labels[1] if c.isdigit()]

    def field(name: str, default: int) -> list[int]:
        return [int(n) for n in fields[name].split("x")] if name in fields else [default] * len(spatial)

    pads = [int(p.split("_")[0]) for p in fields["pad"].split("x")] if "pad" in fields else [0] * len(spatial)
    steps, left_gaps, right_gaps = field("stride", 1), field("lhs_dilate", 1), field("rhs_dilate", 1)
    total = 2
    for n, label in enumerate(spatial):
        size, taps = left.shape[labels[1].index(label)], right.shape[labels[2].index(label)]
        places = i.results[0].shape[labels[3].index(label)]
        gap = left_gaps[n]
        total *= sum(
            1
            for place in range(places)
            for tap in range(taps)
            if 0 <= (at := place * steps[n] + tap * right_gaps[n] - pads[n]) < size * gap and at % gap == 0
        )
    batch, features = (i.results[0].shape[labels[3].index(c)] for c in "bf")
    return total * batch * features * right.shape[labels[2].index("i")]


def _attention(i: Instruction, kernel: str, operands: list[Array]) -> int:
    """Operations of jax's attention kernels, whose insides the text does not show.

    Forward: two matmuls, q·k and scores·v. Backward: on TPUs four matmuls in one call and three in another; on GPUs
    seven in one. A causal kernel counts half.
    """
    q, k = [a.shape for a in operands if a.shape[1:] and a.dtype.startswith(("f", "bf"))][:2]
    keys = k[-3 if kernel in ("forward", "backward") else -2]  # on GPUs, heads come after tokens
    matmuls = {"fwd": 2, "dkv": 4, "dq": 3, "forward": 2, "backward": 7}[kernel]
    return 2 * matmuls * math.prod(q) * keys // (2 if "/causal/" in _source(i) else 1)


def _stated(i: Instruction, cost: str) -> int | None:
    """The cost that a TPU kernel states about itself, or None. `decode_kernel` states the bytes of a full cache."""
    match = re.search(rf'"cost_estimate":\{{[^}}]*"{cost}":"(\d+)"', i.attributes)
    return int(match[1]) if match else None


def _windows(i: Instruction, windows: Array) -> int:
    """Operations of model/kernels/window.py: two matmuls per block of windows [blocks, 1, slots], and the rotation."""
    return math.prod(i.results[0].shape) * (4 * windows.shape[-1] + 2 * 3)


def _group(i: Instruction) -> int:
    """How many devices take part in a collective."""
    if i.opcode.startswith("collective-permute"):
        return 2
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # Only a factor of an axis may take part: 'name':(before)factor.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(factor or sizes[name]) for name, factor in axes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", i.attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes):
        return len(match[1].split(","))
    raise ValueError(f"{i.name} states no replica groups")


def _sent(kind: str, group: int, read: int, written: int) -> int:
    """The least bytes that each device sends: those of a ring."""
    share = (group - 1) / group
    sent = {"all-reduce": 2 * read * share, "all-gather": written * share, "collective-permute": read}
    return round(sent.get(kind, read * share))
