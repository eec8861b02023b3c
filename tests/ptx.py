"""Runs PTX, the assembly that nvcc emits, block by block on the CPU: what the text means by NVIDIA's PTX ISA.

Nothing here knows tests/simt, so a primitive of csrc/cuda whose device body differs from its host body is found by
running both. All threads of a block that are at one instruction run it at once, as vectors of numpy; of threads at
different places those furthest behind go first. What the reader does not know it refuses when a thread comes to it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

WARP = 32
GUARD = 256  # bytes between neighbouring buffers, which nobody may touch
ROW = 16  # bytes of a row that ldmatrix loads
TF32 = np.uint32(0xFFFFE000)  # the bits of a float that a tf32 has
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
DTYPES = {f"{kind}{8 * size}": dtype for kind in "bu" for size, dtype in UNSIGNED.items()}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in UNSIGNED}
DTYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)} | {"pred": np.dtype("?")}


class PtxError(Exception):
    """The PTX does what it must not, or what the reader does not know."""


# The fragments of matrices, as the sections "Matrix Fragments for mma.m16n8k8" and "for mma.m16n8k16" of the PTX ISA
# say: row and column of element i of a lane, where g is groupID = laneid >> 2 and t threadID_in_group = laneid % 4.
Place = Callable[[int, int, int], int]


@dataclass(frozen=True)
class Fragment:
    """Where the elements of a matrix are in the registers of a warp, the low half of a register first."""

    shape: tuple[int, int]
    row: Place
    column: Place

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns of every lane's elements: two arrays (lane, element)."""
        rows, columns = self.shape
        lanes, elements = range(WARP), range(rows * columns // WARP)
        return tuple(
            np.array([[place(i, lane >> 2, lane % 4) for i in elements] for lane in lanes])
            for place in (self.row, self.column)
        )


ACCUMULATOR = Fragment((16, 8), lambda i, g, t: g if i < 2 else g + 8, lambda i, g, t: t * 2 + (i & 1))
# Of a shape and the bits of an element: a, b.
OPERANDS = {
    ("m16n8k16", 16): (
        Fragment(
            (16, 16),
            lambda i, g, t: g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
            lambda i, g, t: t * 2 + (i & 1) if i < 4 else t * 2 + (i & 1) + 8,
        ),
        Fragment((16, 8), lambda i, g, t: t * 2 + (i & 1) if i < 2 else t * 2 + (i & 1) + 8, lambda i, g, t: g),
    ),
    ("m16n8k8", 16): (
        Fragment((16, 8), lambda i, g, t: g if i < 2 else g + 8, lambda i, g, t: t * 2 + (i & 1)),
        Fragment((8, 8), lambda i, g, t: t * 2 + i, lambda i, g, t: g),
    ),
    ("m16n8k8", 32): (
        Fragment((16, 8), lambda i, g, t: g if i in (0, 2) else g + 8, lambda i, g, t: t if i < 2 else t + 4),
        Fragment((8, 8), lambda i, g, t: t if i == 0 else t + 4, lambda i, g, t: g),
    ),
}


# The text.
@dataclass
class Instruction:
    """``guard`` is the predicate in front and the value it must have; operands are as ``parse_operand`` makes them."""

    name: str
    operands: list
    guard: tuple[str, bool] | None
    text: str


@dataclass
class Kernel:
    """An entry: the bytes of its parameters, its registers, what it does."""

    parameters: dict[str, int]
    registers: dict[str, np.dtype] = field(default_factory=dict)
    variables: dict[str, tuple[str, int]] = field(default_factory=dict)  # state space, offset
    local_bytes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register or a variable."""

    base: str
    offset: int


def parse_operand(text: str) -> str | int | float | Address | list:
    """A register, variable or label by its name; a number; an address; a list of registers."""
    text = text.strip()
    if text.startswith("{"):
        return [parse_operand(part) for part in text[1:-1].split(",")]
    if text.startswith("["):
        base, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", text).groups()
        return Address(base, int(offset or 0))
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return float(np.uint32(int(match[1], 16)).view("f4"))
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return float(np.uint64(int(match[1], 16)).view("f8"))
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else text


def parse_instruction(text: str) -> Instruction:
    match = re.fullmatch(r"(@!?%\w+)?\s*([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if match is None:
        raise PtxError(f"unknown statement: {text}")
    guard, name, rest = match.groups()
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
    condition = (guard.lstrip("@!"), "!" not in guard) if guard else None
    return Instruction(name, [parse_operand(part) for part in parts], condition, " ".join(text.split()))


def parse_variable(text: str) -> tuple[str, str, int]:
    """State space, name and bytes of a declaration."""
    match = re.fullmatch(r"(?:\.extern\s+)?\.(\w+)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text)
    if match is None:
        raise PtxError(f"unknown declaration: {text}")
    space, kind, name, count = match.groups()
    return space, name, DTYPES[kind].itemsize * (1 if count is None else int(count or 0))


@functools.cache
def parse_kernel(parameters: str, body: str, shared: tuple[str, ...]) -> Kernel:
    declared = [parse_variable(text.strip()) for text in parameters.split(",") if text.strip()]
    kernel = Kernel({name: size for _, name, size in declared})
    kernel.variables = dict.fromkeys(shared, ("shared", 0))
    kernel.variables |= {name: ("param", 0) for name in kernel.parameters}
    at = 0
    while body := body[at:].lstrip():
        if body[0] in "{}":  # a scope
            at = 1
            continue
        if label := re.match(r"([\w$]+):", body):
            kernel.labels[label[1]] = len(kernel.instructions)
            at = label.end()
            continue
        at = body.index(";") + 1
        statement = body[: at - 1].strip()
        if register := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL):
            dtype = DTYPES[register[1]]
            dtype = dtype if dtype.kind == "b" else UNSIGNED[dtype.itemsize]
            for name in re.split(r",\s*", register[2].strip()):
                base, count = re.fullmatch(r"(%?\w+)(?:<(\d+)>)?", name).groups()
                for name in [f"{base}{i}" for i in range(int(count))] if count else [base]:
                    if kernel.registers.setdefault(name, dtype) != dtype:
                        raise PtxError(f"{name} is declared in two scopes as different types")
        elif statement.startswith(".local"):
            _, name, size = parse_variable(statement)
            kernel.variables[name] = ("local", kernel.local_bytes)
            kernel.local_bytes += -(-size // ROW) * ROW
        elif not re.match(r"\.(pragma|param)\b", statement):
            kernel.instructions.append(parse_instruction(statement))
    return kernel


def parse(text: str) -> dict[str, Callable[[], Kernel]]:
    """The entries of a file of PTX, each to be parsed when it is called."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    kernels, shared, at = {}, [], 0
    while text := text[at:].lstrip():
        if line := re.match(r"\.(version|target|address_size)[^\n]*", text):
            at = line.end()
            continue
        function = re.match(r"(?:\.(?:visible|weak)\s+)?\.(entry|func)\b[^{;]*", text)
        if function is None or text[function.end()] == ";":
            at = text.index(";") + 1
            if function is None:  # the dynamic shared memory of all kernels
                space, name, size = parse_variable(text[: at - 1].strip())
                if space != "shared" or size > 0:
                    raise PtxError(f"unknown declaration: {text[: at - 1]}")
                shared.append(name)
            continue
        at = start = function.end() + 1
        depth = 1
        while depth > 0:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if function[1] == "entry":
            name, parameters = re.match(r".*?\.entry\s+([\w$]+)\s*\(([^)]*)\)", function[0], re.DOTALL).groups()
            body = text[start : at - 1]
            kernels[name] = functools.partial(parse_kernel, parameters, body, tuple(shared))
    return kernels


# The instructions: name of one with all its modifiers -> what it does with (block, mask of threads, operands).
PATTERNS: list[tuple[re.Pattern, Callable, bool]] = []


def instruction(pattern: str, collective: bool = False) -> Callable:
    """The function runs instructions whose whole name matches. A collective one waits for all lanes of its warp."""

    def register(run: Callable) -> Callable:
        PATTERNS.append((re.compile(pattern), run, collective))
        return run

    return register


@functools.cache
def meaning(name: str) -> tuple[Callable, bool]:
    for pattern, run, collective in PATTERNS:
        if match := pattern.fullmatch(name):
            return functools.partial(run, **match.groupdict()), collective
    raise PtxError(f"unknown instruction: {name}")


class Machine:
    """Global memory, and launches of the kernels of a text."""

    def __init__(self, text: str):
        self.kernels = parse(text)
        self.clear()

    def clear(self) -> None:
        self.memory = np.zeros(0, np.uint8)
        self.buffers = np.zeros((0, 3), np.int64)  # address, bytes and where in memory, in the order of addresses

    def place(self, data: np.ndarray, address: int | None = None) -> int:
        """Put ``data`` at an address, by default a free multiple of 256."""
        data = np.ascontiguousarray(data).view(np.uint8).ravel()
        if address is None:
            end = max((int(begin + size) for begin, size, _ in self.buffers), default=0)
            address = -(-end // GUARD) * GUARD + GUARD
        buffers = [*self.buffers, (address, data.size, len(self.memory))]
        self.buffers = np.array(sorted(buffers, key=lambda buffer: buffer[0]), np.int64)
        self.memory = np.append(self.memory, data)
        return address

    def fetch(self, address: int, like: np.ndarray) -> np.ndarray:
        """What is at ``address``, of the shape and dtype of ``like``."""
        at = self.bytes_at(np.array([address]), like.nbytes, 1)
        return self.memory[at].view(like.dtype).reshape(like.shape)

    def launch(self, name: str, parameters: bytes, *, threads: int, blocks: int = 1, shared_bytes: int = 0) -> None:
        kernel = self.kernels[name]()
        if len(kernel.parameters) > 1 or len(parameters) != sum(kernel.parameters.values()):
            raise PtxError(f"{name} has parameters {kernel.parameters}; one of {len(parameters)} bytes was given")
        if threads % WARP:
            raise PtxError(f"{threads} threads are no whole number of warps")
        for index in range(blocks):
            size, buffers = len(self.memory), self.buffers
            block = Block(self, kernel, parameters, threads, (index, blocks), shared_bytes)
            with np.errstate(all="ignore"):
                block.run()
            self.memory, self.buffers = self.memory[:size], buffers

    def bytes_at(self, address: np.ndarray, size: int, alignment: int) -> np.ndarray:
        """The indices of ``size`` bytes of each address, all of which must be in a buffer."""
        address = address.astype(np.int64)
        if (address % alignment).any():
            raise PtxError(f"misaligned access of {alignment} bytes")
        if size == 0:
            return np.zeros((len(address), 0), np.int64)
        begins, sizes, where = self.buffers.T
        buffer = np.searchsorted(begins, address, side="right") - 1
        offset = address - begins[buffer]
        if (buffer < 0).any() or (offset + size > sizes[buffer]).any():
            raise PtxError("access outside every buffer")
        return (where[buffer] + offset)[:, None] + np.arange(size)


class Block:
    """A block of threads: registers, where each thread is, what it waits for, copies under way."""

    def __init__(
        self,
        machine: Machine,
        kernel: Kernel,
        parameters: bytes,
        threads: int,
        place: tuple[int, int],
        shared_bytes: int,
    ):
        self.machine, self.kernel, self.threads = machine, kernel, threads
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.registers = {name: np.zeros(threads, dtype) for name, dtype in kernel.registers.items()}
        self.at = np.zeros(threads, np.int64)
        self.at_barrier = np.zeros(threads, bool)
        self.at_collective = np.zeros(threads, bool)
        index = np.arange(threads, dtype=np.uint32)
        self.special = {"%tid.x": index, "%laneid": index % np.uint32(WARP)}
        numbers = {"%ntid.x": threads, "%ctaid.x": place[0], "%nctaid.x": place[1]}
        self.special |= {name: np.uint32(number) for name, number in numbers.items()}
        shared = machine.place(np.full(shared_bytes, 0xFF, np.uint8))
        local = machine.place(np.full(kernel.local_bytes * threads, 0xFF, np.uint8))
        # Addresses of a state space begin at 0: where that is in memory.
        self.window = dict.fromkeys(("global", "param", None), np.uint64(0)) | {"shared": np.uint64(shared)}
        self.window["local"] = np.uint64(local) + index.astype(np.uint64) * np.uint64(kernel.local_bytes)
        self.copies: list[tuple[np.ndarray, ...]] = []  # threads, to, from, size, bytes, group
        self.groups = np.zeros(threads, np.int64)

    def run(self) -> None:
        instructions = self.kernel.instructions
        while True:
            free = (self.at < len(instructions)) & ~self.at_barrier & ~self.at_collective
            if not free.any():
                if not self.open_barrier():
                    return
                continue
            here = self.at[free].min()
            try:
                self.step(here, free & (self.at == here))
            except PtxError as error:
                raise PtxError(f"{error}, in: {instructions[here].text}") from None

    def step(self, here: int, mask: np.ndarray) -> None:
        """The threads of the mask are at the same instruction and run it, or wait there for the rest of their warp."""
        one = self.kernel.instructions[here]
        run, collective = meaning(one.name)
        executing = mask
        if one.guard:
            name, wanted = one.guard
            executing = mask & (self.registers[name] == wanted)
        if not collective:
            self.at[mask] += 1
            if executing.any():
                run(self, executing, *one.operands)
            return
        self.at[mask & ~executing] += 1
        self.at_collective |= executing
        together = self.at_collective & (self.at == here)
        complete = np.repeat(together.reshape(-1, WARP).all(axis=1), WARP)
        if complete.any():
            self.at_collective &= ~complete
            self.at[complete] += 1
            run(self, complete, *one.operands)

    def open_barrier(self) -> bool:
        """No thread goes on: the barrier opens if all are there. False when all have ended."""
        if self.at_collective.any():
            place = self.at[self.at_collective][0]
            raise PtxError(f"not all lanes of a warp come to: {self.kernel.instructions[place].text}")
        if not self.at_barrier.any():
            return False
        if not self.at_barrier.all():
            raise PtxError("a barrier that some threads do not reach")
        self.at_barrier[:] = False
        return True

    def read(self, operand: str | float, kind: str) -> np.ndarray:
        """The operand as values of a type: one per thread, or one of all."""
        dtype = DTYPES[kind]
        if isinstance(operand, float):
            return np.array(operand, dtype)
        if isinstance(operand, int):
            unsigned = UNSIGNED[dtype.itemsize]
            return np.array(operand % (1 << 8 * dtype.itemsize), unsigned).view(dtype)
        if not isinstance(operand, str):
            raise PtxError(f"{operand} as {kind}")
        if operand in self.kernel.variables:
            return np.array(self.kernel.variables[operand][1], dtype)
        if operand not in self.special and operand not in self.registers:
            raise PtxError(f"unknown operand {operand}")
        value = self.special[operand] if operand in self.special else self.registers[operand]
        if value.dtype.itemsize < dtype.itemsize or (value.dtype.kind == "b") != (dtype.kind == "b"):
            raise PtxError(f"{operand} has no {kind}")
        same = value.dtype.itemsize == dtype.itemsize
        return (value if same else value.astype(UNSIGNED[dtype.itemsize])).view(dtype)

    def write(self, register: str, mask: np.ndarray, value: np.ndarray) -> None:
        """A wider register gets an integer extended by its sign, or by zeros."""
        to = self.registers[register]
        if value.dtype.itemsize == to.dtype.itemsize:
            value = value.view(to.dtype)
        elif value.dtype.itemsize > to.dtype.itemsize or value.dtype.kind not in "iu":
            raise PtxError(f"{register} does not hold {value.dtype}")
        np.copyto(to, value.astype(to.dtype), where=mask)

    def write_some(self, registers: list[str], mask: np.ndarray, values: np.ndarray) -> None:
        """``values``: those of the threads of the mask, one of each register."""
        for i, register in enumerate(registers):
            whole = np.zeros(self.threads, values.dtype)
            whole[mask] = values[:, i]
            self.write(register, mask, whole)

    def addresses(self, operand: Address, space: str | None, mask: np.ndarray) -> np.ndarray:
        """Where in memory the operand points, of the threads of the mask."""
        wide = operand.base in self.registers and self.registers[operand.base].dtype.itemsize == 8
        base = self.read(operand.base, "u64" if wide else "u32").astype(np.uint64)
        at = self.window[space] + base + np.uint64(operand.offset % (1 << 64))
        return np.broadcast_to(at, self.threads)[mask]

    def arrive(self, mask: np.ndarray, before: np.ndarray) -> None:
        """The copies of threads of the mask in groups below ``before`` (per thread) are done."""
        waiting = []
        for threads, to, source, size, count, group in self.copies:
            done = mask[threads] & (group < before[threads])
            for n in np.unique(count[done]):
                some = done & (count == n)
                data = np.zeros((some.sum(), size), np.uint8)
                memory = self.machine.memory
                data[:, :n] = memory[self.machine.bytes_at(source[some], int(n), size)]
                memory[self.machine.bytes_at(to[some], size, size)] = data
            rest = ~done
            if rest.any():
                waiting.append((threads[rest], to[rest], source[rest], size, count[rest], group[rest]))
        self.copies = waiting


INTEGER = r"\.(?P<kind>[su](?:16|32|64))"
BITS = r"\.(?P<kind>b(?:16|32|64)|pred)"


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    if a.dtype.kind == "u":
        return a // b
    return a // b + ((a % b != 0) & ((a < 0) != (b < 0)))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float, rounded once: in double the product is exact, and the sum is rounded to odd."""
    product, addend = a.astype(float) * b, c.astype(float)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = np.asarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
    odd = bits + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, odd, bits).view(float).astype(np.float32)


ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    rf"add{INTEGER}|add(?:\.rn)?\.(?P<kind2>f32)": lambda a, b: a + b,
    rf"sub{INTEGER}|sub(?:\.rn)?\.(?P<kind2>f32)": lambda a, b: a - b,
    rf"mul\.lo{INTEGER}|mul(?:\.rn)?\.(?P<kind2>f32)": lambda a, b: a * b,
    rf"mad\.lo{INTEGER}": lambda a, b, c: a * b + c,
    r"fma\.rn\.(?P<kind>f32)": fused,
    rf"div{INTEGER}": quotient,
    rf"rem{INTEGER}": lambda a, b: a - quotient(a, b) * b,
    rf"min{INTEGER}": np.minimum,
    rf"max{INTEGER}": np.maximum,
    rf"neg{INTEGER}|neg\.(?P<kind2>f32)": lambda a: -a,
    rf"and{BITS}": lambda a, b: a & b,
    rf"or{BITS}": lambda a, b: a | b,
    rf"xor{BITS}": lambda a, b: a ^ b,
    rf"not{BITS}": lambda a: ~a,
}


def add_elementwise(pattern: str, function: Callable[..., np.ndarray]) -> None:
    @instruction(pattern)
    def run(block, mask, to, *operands, kind, kind2=None):
        values = [block.read(operand, kind or kind2) for operand in operands]
        block.write(to, mask, np.asarray(function(*values)).astype(DTYPES[kind or kind2]))


for _pattern, _function in ELEMENTWISE.items():
    add_elementwise(_pattern, _function)


@instruction(r"(?P<operation>mul|mad)\.wide\.(?P<sign>[su])(?P<bits>16|32)")
def multiply_wide(block, mask, to, a, b, c=None, *, operation, sign, bits):
    narrow, wide = f"{sign}{bits}", f"{sign}{2 * int(bits)}"
    product = block.read(a, narrow).astype(DTYPES[wide]) * block.read(b, narrow).astype(DTYPES[wide])
    block.write(to, mask, np.asarray(product if operation == "mul" else product + block.read(c, wide)))


@instruction(r"(?P<direction>shl|shr)\.(?P<kind>[bsu](?:16|32|64))")
def shift(block, mask, to, value, by, *, direction, kind):
    value, by = block.read(value, kind), block.read(by, "u32")
    last = np.uint32(8 * value.dtype.itemsize - 1)  # a shift by more leaves what one more bit does
    once = np.minimum(by, last).astype(value.dtype)
    more = (by > last).astype(value.dtype)
    shifted = value << once << more if direction == "shl" else value >> once >> more
    block.write(to, mask, np.asarray(shifted).astype(value.dtype))


def shifted_left(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Of uint64, by up to 64."""
    half = by >> np.uint64(1)
    return value << half << (by - half)


@instruction(r"bfi\.(?P<kind>b32|b64)")
def insert_bits(block, mask, to, value, around, position, length, *, kind):
    value, around = block.read(value, kind), block.read(around, kind)
    dtype, one = value.dtype, np.uint64(1)
    position, length = (
        np.minimum(block.read(n, "u32").astype(np.uint64) & np.uint64(0xFF), np.uint64(8 * dtype.itemsize))
        for n in (position, length)
    )
    field = shifted_left(shifted_left(np.ones_like(length), length) - one, position)
    inserted = (shifted_left(value.astype(np.uint64), position) & field) | (around.astype(np.uint64) & ~field)
    block.write(to, mask, np.asarray(inserted).astype(dtype))


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}


@instruction(r"setp\.(?P<how>eq|ne|lt|le|gt|ge)(?P<unordered>u?)\.(?P<kind>[bsu](?:16|32|64)|f32)")
def compare(block, mask, to, a, b, *, how, unordered, kind):
    a, b = block.read(a, kind), block.read(b, kind)
    nan = (a != a) | (b != b)
    result = COMPARISONS[how](a, b)
    block.write(to, mask, np.asarray(result | nan if unordered else result & ~nan))


@instruction(r"mov\.(?P<kind>[busf](?:16|32|64)|pred)")
def move(block, mask, to, value, *, kind):
    """Registers in braces are parts of a whole, the lowest first."""
    if isinstance(value, list):
        whole, bits = UNSIGNED[DTYPES[kind].itemsize], 8 * DTYPES[kind].itemsize // len(value)
        parts = [block.read(part, f"b{bits}").astype(whole) << whole.type(i * bits) for i, part in enumerate(value)]
        value = functools.reduce(np.bitwise_or, parts)
    else:
        value = block.read(value, kind)
    if isinstance(to, list):
        part = UNSIGNED[value.dtype.itemsize // len(to)]
        for i, register in enumerate(to):
            block.write(register, mask, (value >> value.dtype.type(8 * part.itemsize * i)).astype(part))
    else:
        block.write(to, mask, value)


@instruction(r"selp\.(?P<kind>[busf](?:16|32|64))")
def select(block, mask, to, a, b, condition, *, kind):
    block.write(to, mask, np.where(block.read(condition, "pred"), block.read(a, kind), block.read(b, kind)))


@instruction(r"cvt\.(?P<to_kind>[su](?:8|16|32|64))\.(?P<kind>[su](?:8|16|32|64))")
def convert_integer(block, mask, to, value, *, to_kind, kind):
    block.write(to, mask, block.read(value, kind).astype(DTYPES[to_kind]))


@instruction(r"cvt\.f32\.f16")
def widen(block, mask, to, value):
    block.write(to, mask, block.read(value, "f16").astype(np.float32))


def narrowed(value: np.ndarray, kind: str) -> np.ndarray:
    """The bits of the nearest f16 or bf16, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


@instruction(r"cvt\.rn\.(?P<kind>f16|bf16)\.f32")
def narrow(block, mask, to, value, *, kind):
    block.write(to, mask, narrowed(block.read(value, "f32"), kind))


@instruction(r"cvt\.rn\.(?P<kind>f16|bf16)x2\.f32")
def narrow_pair(block, mask, to, high, low, *, kind):
    low, high = (narrowed(block.read(value, "f32"), kind).astype(np.uint32) for value in (low, high))
    block.write(to, mask, np.asarray(high << np.uint32(16) | low))


@instruction(r"cvt\.rna\.tf32\.f32")
def convert_tf32(block, mask, to, value):
    """To the nearest, ties away from zero; the magnitude's bits are those of an integer."""
    value = block.read(value, "f32")
    rounded = (value.view(np.uint32) + np.uint32(1 << 12)) & TF32
    finite = np.where(np.isfinite(value), rounded, value.view(np.uint32))
    block.write(to, mask, np.where(np.isnan(value), np.uint32(0x7FFFFFFF), finite))


@instruction(r"cvta(?P<direction>\.to)?\.(?P<space>global|shared|local)\.u64")
def convert_address(block, mask, to, address, *, direction, space):
    window, address = block.window[space], block.read(address, "u64")
    block.write(to, mask, np.asarray(address - window if direction else address + window))


@instruction(r"ld\.param(?:\.v(?P<count>[24]))?\.(?P<kind>[busf]\d+)")
def load_parameter(block, mask, to, address, *, count, kind):
    dtype, n = DTYPES[kind], int(count or 1)
    at = block.addresses(address, "param", mask).astype(np.int64)[:, None] + np.arange(n * dtype.itemsize)
    if (at >= len(block.parameters)).any():
        raise PtxError("access outside the parameters")
    block.write_some(to if count else [to], mask, block.parameters[at].view(dtype))


ACCESS = r"(?:\.(?P<space>global|shared|local))?{}(?:\.v(?P<count>[24]))?\.(?P<kind>[busf]\d+)"


@instruction("ld" + ACCESS.format(r"(?:\.nc)?"))
def load(block, mask, to, address, *, space, count, kind):
    size, n = DTYPES[kind].itemsize, int(count or 1)
    at = block.machine.bytes_at(block.addresses(address, space, mask), n * size, n * size)
    values = block.machine.memory[at].view(DTYPES[kind])
    block.write_some(to if count else [to], mask, values)


@instruction("st" + ACCESS.format(""))
def store(block, mask, address, value, *, space, count, kind):
    size, n = DTYPES[kind].itemsize, int(count or 1)
    at = block.machine.bytes_at(block.addresses(address, space, mask), n * size, n * size)
    values = [block.read(one, kind) for one in (value if count else [value])]
    data = np.stack([np.broadcast_to(one, block.threads)[mask] for one in values], axis=1)
    block.machine.memory[at] = data.view(np.uint8)


@instruction(r"bra(?:\.uni)?")
def branch(block, mask, label):
    block.at[mask] = block.kernel.labels[label]


@instruction(r"ret|exit")
def leave(block, mask):
    block.at[mask] = len(block.kernel.instructions)


@instruction(r"trap")
def trap(block, mask):
    raise PtxError("trap")


@instruction(r"bar\.sync")
def barrier(block, mask, which):
    if which != 0:
        raise PtxError(f"barrier {which}")
    block.at_barrier |= mask


def check_whole_warp(block: Block, mask: np.ndarray, members: str | int) -> None:
    if (np.broadcast_to(block.read(members, "u32"), block.threads)[mask] != 0xFFFFFFFF).any():
        raise PtxError("only a part of a warp")


@instruction(r"bar\.warp\.sync", collective=True)
def warp_barrier(block, mask, members):
    check_whole_warp(block, mask, members)


@instruction(r"vote\.sync\.(?P<how>all|any)\.pred", collective=True)
def vote(block, mask, to, value, members, *, how):
    check_whole_warp(block, mask, members)
    votes = np.broadcast_to(block.read(value, "pred"), block.threads).reshape(-1, WARP)
    block.write(to, mask, np.repeat(votes.all(axis=1) if how == "all" else votes.any(axis=1), WARP))


@instruction(r"cp\.async\.(?P<cache>ca|cg)\.shared(?:::cta)?\.global")
def copy_async(block, mask, to, source, size, count=None, *, cache):
    """The data comes at the wait and not before; until then nothing there can be relied on."""
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise PtxError(f"copies {size} bytes")
    to, source = block.addresses(to, "shared", mask), block.addresses(source, "global", mask)
    count = np.broadcast_to(block.read(size if count is None else count, "u32"), block.threads)[mask]
    if (count > size).any():
        raise PtxError(f"copies {count.max()} of {size} bytes")
    block.machine.memory[block.machine.bytes_at(to, size, size)] = 0xFF
    block.copies.append((np.flatnonzero(mask), to, source, size, count, block.groups[mask]))


@instruction(r"cp\.async\.commit_group")
def commit(block, mask):
    block.groups[mask] += 1


@instruction(r"cp\.async\.wait_group")
def wait_for_groups(block, mask, pending):
    block.arrive(mask, block.groups - pending)


@instruction(r"cp\.async\.wait_all")
def wait_for_all(block, mask):
    block.arrive(mask, block.groups + 1)


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<transposed>\.trans)?\.shared\.b16", collective=True)
def load_matrices(block, mask, to, address, *, count, transposed):
    """Row r of matrix m is at the address of lane 8 m + r. Before sm_80 the other lanes' must be valid too."""
    at = block.machine.bytes_at(block.addresses(address, "shared", mask), ROW, ROW)
    matrices = block.machine.memory[at].view(np.uint16).reshape(-1, 4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    # Lane T of a warp gets elements 2 (T % 4) and the next one of row T / 4: in the order of memory.
    values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, WARP).swapaxes(1, 2)
    block.write_some(to, mask, values[:, :, : int(count)].reshape(-1, int(count)))


def elements(block: Block, mask: np.ndarray, registers: Iterable[str], kind: str) -> np.ndarray:
    """What registers of whole warps hold: (warp, lane, element)."""
    bits = np.stack([block.read(register, "b32")[mask] for register in registers], axis=1)
    if kind == "tf32":
        values = (bits & TF32).view(np.float32)
    else:
        halves = bits.view(np.uint16)
        values = halves.view(np.float16) if kind == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)
    return values.astype(float).reshape(-1, WARP, values.shape[1])


@instruction(
    r"mma\.sync\.aligned\.(?P<shape>m16n8k16|m16n8k8)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32",
    collective=True,
)
def multiply_matrices(block, mask, d, a, b, c, *, shape, kind):
    """d = a b + c. The ISA leaves the order and the rounding of the sums open: here they are rounded once."""
    fragments = OPERANDS.get((shape, 32 if kind == "tf32" else 16))
    if fragments is None:
        raise PtxError(f"no {shape} of {kind}")
    product: np.ndarray | None = None
    for fragment, registers in zip(fragments, (a, b), strict=True):
        values = elements(block, mask, registers, kind)
        matrix = np.full((len(values), *fragment.shape), np.nan)
        matrix[(slice(None), *fragment.places)] = values
        product = matrix if product is None else product @ matrix
    sums = np.stack([block.read(register, "f32")[mask] for register in c], axis=1).reshape(-1, WARP, len(c))
    result = (product[(slice(None), *ACCUMULATOR.places)] + sums).astype(np.float32)
    block.write_some(d, mask, result.reshape(-1, len(d)))
