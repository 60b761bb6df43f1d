"""Others that compute one model on two machines, and Shoal, on the same two hosts: one thread and one processor each.

What is there is measured: TPI_LLM and TPI_PYTHON (its source tree, and a Python that has what it requires), LLAMA_CPP
(the directory of llama-bench and ggml-rpc-server) and DLLAMA (distributed-llama's source tree, built). Each answers a
prompt of random tokens. TPI-LLM computes in float32 whatever is stored (`mem_manager.py`); Shoal and llama.cpp compute
with weights as they are stored, so all have the same numbers in a model of bfloat16.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from hosts.group import Group
from hosts.host import Host, HostFailed
from hosts.lab import Lab
from hosts.limits import Limits

PORT = 29700
WEIGHT = 64  # of the processors' time, as others may compute here, too
START_S = 1.0  # until a server listens


@dataclass
class Speed:
    """Of one answer."""

    prompt_s: float  # the whole prompt, up to the first token
    token_s: float  # each of the others, after that prompt


@dataclass
class Peer(ABC):
    """`directory` is the model as Hugging Face has it, `gguf` the same shape in that format."""

    name: str
    head: Host
    worker: Host
    directory: Path
    gguf: Path
    found: list[Speed] = field(default_factory=list)

    @abstractmethod
    def answer(self, prompt: int, new: int) -> Speed:
        """Raises HostFailed."""

    @property
    def at(self) -> str:
        """The head's address."""
        return address_of(self.head)


@dataclass
class Shoal(Peer):
    group: Group | None = None
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def answer(self, prompt: int, new: int) -> Speed:
        assert self.group
        answer = self.group.ask([self.source.randrange(8, 8000) for _ in range(prompt)], new)
        if answer.error:
            raise HostFailed(answer.error)
        return Speed(answer.first_s, answer.token_s)


@dataclass
class TpiLlm(Peer):
    options: tuple[str, ...] = ()

    def answer(self, prompt: int, new: int) -> Speed:
        script = str(Path(__file__).parents[1] / "engines" / "tpi_rank.py")
        place = (os.environ["TPI_PYTHON"], script)
        more = ("2", self.at, str(self.directory), str(prompt), str(new), *self.options)
        other = self.worker.start(*place, "1", *more)
        try:
            said = self.head.run(*place, "0", *more).stdout
        finally:
            other.kill()
            other.wait()
        times_s = json.loads(said.splitlines()[-1])
        # The median: one token in some waits for torch's own threads.
        return Speed(times_s[0], median(b - a for a, b in pairwise(times_s)))


@dataclass
class LlamaRpc(Peer):
    """Half of the layers on the other machine, as it divides a model."""

    layers: int = 8

    def answer(self, prompt: int, new: int) -> Speed:
        tools = Path(os.environ["LLAMA_CPP"])
        server = (str(tools / "ggml-rpc-server"), "-t", "1", "-H", "0.0.0.0", "-p", str(PORT))
        other = self.worker.start(*server)
        time.sleep(START_S)
        half = str(self.layers // 2)
        command = [
            str(tools / "llama-bench"),
            "-m",
            str(self.gguf),
            "-t",
            "1",
            "-ngl",
            half,
            "-r",
            "1",
            "-o",
            "json",
        ]
        command += ["--rpc", f"{address_of(self.worker)}:{PORT}"]
        try:
            first = self.head.run(*command, "-p", str(prompt), "-n", "0").stdout
            later = self.head.run(*command, "-p", "0", "-n", str(new), "-d", str(prompt)).stdout
        finally:
            other.kill()
            other.wait()
        return Speed(prompt / json.loads(first)[0]["avg_ts"], 1 / json.loads(later)[0]["avg_ts"])


@dataclass
class DistributedLlama(Peer):
    """`weights` is f32 or q40; what it exchanges is then f32 or q80."""

    weights: str = "f32"

    def answer(self, prompt: int, new: int) -> Speed:
        tree = Path(os.environ["DLLAMA"])
        model, tokenizer = converted(tree, self.directory, self.weights)
        program = str(tree / "dllama")
        other = self.worker.start(program, "worker", "--port", str(PORT), "--nthreads", "1")
        time.sleep(START_S)
        command = (
            program,
            "inference",
            "--model",
            str(model),
            "--tokenizer",
            str(tokenizer),
            "--nthreads",
            "1",
        )
        more = (
            "--buffer-float-type",
            "f32" if self.weights == "f32" else "q80",
            "--steps",
            str(prompt + new),
        )
        letters = "".join(random.Random(prompt).choice("abcdefgh") for _ in range(prompt))
        try:
            said = self.head.run(
                *command, *more, "--prompt", letters, "--workers", f"{address_of(self.worker)}:{PORT}"
            ).stdout
        finally:
            other.kill()
            other.wait()
        evaluated, predicted = (float(it) for it in re.findall(r"\(([\d.]+) ms/tok\)", said))
        return Speed(prompt * evaluated / 1000, predicted / 1000)


def all_peers(lab: Lab, directory: Path, gguf: Path, layers: int) -> list[Peer]:
    """Those that are there. Daemons of Shoal stay up and have hosts of their own; the others start for each answer."""
    limits = [Limits(processors=str(number), weight=WEIGHT) for number in range(2)]
    head, worker = (lab.host(f"peer{number}", limit) for number, limit in enumerate(limits))
    place = (head, worker, directory, gguf)
    found: list[Peer] = []
    if "TPI_LLM" in os.environ:
        found += [TpiLlm("TPI-LLM as shipped", *place)]
        found += [TpiLlm("TPI-LLM, TCP_NODELAY", *place, options=("--nodelay",))]
    if "LLAMA_CPP" in os.environ:
        found += [LlamaRpc("llama.cpp RPC, as stored", *place, layers=layers)]
    if "DLLAMA" in os.environ:
        found += [
            DistributedLlama(f"distributed-llama, {kind}", *place, weights=kind) for kind in ("f32", "q40")
        ]
        for kind in ("f32", "q40"):
            converted(Path(os.environ["DLLAMA"]), directory, kind)
    for weights, suffix in (("as stored", ""), ("q4", ":q4")):
        pair = [lab.host(f"{weights[:2]}-{number}", limit) for number, limit in enumerate(limits)]
        group = Group(pair[0], pair[1:])
        loaded = group.load(f"{directory}{suffix}", ranks=2)
        if loaded.ranks != 2:
            raise HostFailed(f"{loaded.ranks} ranks compute it")
        found.append(Shoal(f"Shoal, {weights}", *pair, directory, gguf, group=group))
    return found


def address_of(host: Host) -> str:
    said = host.run("ip", "-4", "-o", "addr", "show", host.cables[0].interface).stdout
    found = re.search(r"inet ([\d.]+)", said)
    assert found
    return found[1]


def converted(tree: Path, directory: Path, weights: str) -> tuple[Path, Path]:
    """The model as distributed-llama has it, and a tokenizer whose tokens are single bytes."""
    name = f"{directory.name}"
    model = directory.parent / f"dllama_model_{name}_{weights}.m"
    if not model.exists():
        script = str(tree / "converter" / "convert-hf.py")
        command = [sys.executable, script, str(directory), weights, name]
        subprocess.run(command, cwd=directory.parent, check=True, stdout=subprocess.DEVNULL)
    tokenizer = directory.parent / f"dllama_tokenizer_{name}.t"
    if not tokenizer.exists():
        size = json.loads((directory / "config.json").read_text())["vocab_size"]
        words = [bytes([n]) for n in range(256)] + [b"<%d>" % n for n in range(256, size)]
        tokenizer.write_bytes(_tokenizer(words))
    return model, tokenizer


def _tokenizer(words: Sequence[bytes]) -> bytes:
    """Its format 1: keys and values, then the ids that end a text, then score, length and bytes of each token."""
    last = len(words) - 1
    keys = {0: 1, 1: len(words), 2: max(map(len, words)), 3: last - 1, 9: 1, 10: 0}
    data = b"".join(struct.pack("ii", key, value) for key, value in keys.items())
    head = struct.pack("i", 0x567124)
    parts = [head, struct.pack("i", 2 * len(head) + len(data)), data, struct.pack("i", last)]
    parts += [struct.pack("fI", 0.0, len(word)) + word for word in words]
    return b"".join(parts)
