"""One rank of TPI-LLM, whose source tree TPI_LLM names: seconds of each token, as JSON on standard output of rank 0.

    python tpi_rank.py RANK RANKS MASTER_IP MODEL PROMPT_TOKENS NEW_TOKENS [--nodelay] [--window N]

Runs in a Python that has what TPI-LLM requires, and imports nothing of Shoal. As `examples/run_llama.py` there does
it, with random ids instead of a text. `--nodelay` sets TCP_NODELAY on its sockets; `--window` turns its sliding
window of weights on.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(os.environ["TPI_LLM"]) / "src"))

import torch
from tpi_llm import TPILlamaForCausalLM
from tpi_llm.distributed import CommunicatorClient, CommunicatorMaster, run_sync_server
from tpi_llm.split import split_pretrained_model

PORT, FILE_PORT = 29500, 29600


class Clock:
    """Takes the place of what prints the tokens."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, ids: object) -> None:
        self.times_s.append(time.perf_counter())  # the first call has the prompt

    def end(self) -> None:
        pass


def without_delay() -> None:
    """All sockets from now on send at once, those that accept included."""

    class Socket(socket.socket):
        def connect(self, address: object) -> None:
            super().connect(address)  # type: ignore[arg-type]
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def accept(self) -> tuple[socket.socket, object]:
            near, address = super().accept()
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return near, address

    socket.socket = Socket  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("rank", int), ("world_size", int), ("master_ip", str), ("model_path", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("prompt", type=int)
    parser.add_argument("new", type=int)
    parser.add_argument("--nodelay", action="store_true")
    parser.add_argument("--window", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.prompt)
    if args.nodelay:
        without_delay()
    args.ratio = [1.0 / args.world_size] * args.world_size
    args.save_dir, args.device = "split", "cpu"
    args.disable_memory_schedule, args.memory_window = not args.window, args.window or 2
    split = Path(args.model_path) / args.save_dir
    if args.rank == 0:
        comm = CommunicatorMaster(args.master_ip, PORT, args.world_size)
        if not split.exists():
            split_pretrained_model(args.model_path, args.world_size, args.ratio, args.save_dir)
        run_sync_server(args.master_ip, FILE_PORT, args.model_path, str(split))
    else:
        comm = CommunicatorClient(args.master_ip, PORT, args.rank)
    comm.barrier()
    model = TPILlamaForCausalLM.from_pretrained(args.model_path, comm, rank=args.rank, args=args)
    clock = Clock()
    head = args.rank == 0
    ids = torch.randint(8, model.config.vocab_size, (1, args.prompt)) if head else ""
    began_s = time.perf_counter()
    model.generate(
        input_ids=ids,
        max_length=args.prompt + args.new,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        streamer=clock if head else None,
        communicator=comm,
    )
    if head:
        print(json.dumps([at_s - began_s for at_s in clock.times_s[1:]]), flush=True)
    model.mem_manager.stop()
    comm.close()
    os._exit(0)


if __name__ == "__main__":
    main()
