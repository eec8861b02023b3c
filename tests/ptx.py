"""Runs PTX, the assembly that nvcc emits, block by block on the CPU: what the text means by NVIDIA's PTX ISA.

Nothing here knows tests/simt, so a primitive of csrc/cuda whose device body differs from its host body is found by
running both. All threads of a block that are at one instruction run it at once, as vectors of numpy; of threads at
different places those furthest behind go first. What ``ptx_isa.py`` does not know is refused when a thread comes to it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx_isa import DTYPES, ROW, UNSIGNED, WARP, PtxError, meaning

GUARD = 256  # bytes between neighbouring buffers, which nobody may touch


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
