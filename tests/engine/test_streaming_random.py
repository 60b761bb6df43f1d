"""Random models, budgets and work: whatever is streamed, cut, shared, guessed, preempted or read back from disk, every
answer has the tokens, and every logit the bits, that it has alone with everything in memory."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import pytest
from fakes import tiny
from fakes.listening import Heard, Listener
from fakes.packing import build_pack
from fakes.running import Running

from shoal.daemon.config import NodeConfig
from shoal.daemon.throughput.model_sizes import weighed
from shoal.engine.collective import Alone
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.engine.learn.step_cost import evenly
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.sampling import Sampled, Sampler, SamplingParams
from shoal.models.transformer import Transformer
from shoal.offload.kv.disk_file import KvFile
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.offload.window import readers
from shoal.offload.window.window_store import WindowStore
from shoal.partition.plan import Plan, Wanted
from shoal.partition.streamed_plan import plan_streamed

CONTEXT = 320
GREEDY = SamplingParams(temperature=0.0)
STORED = {"gguf": ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL"], "hf": ["F32", "F16", "BF16"]}
WIDE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]  # blocks of 256


class Witness(Sampler):
    """Greedy; remembers the bits of the logits that tokens were chosen from."""

    def __init__(self, prompt: list[int]) -> None:
        super().__init__(GREEDY, prompt)
        self.seen: list[bytes] = []

    def sample(self, logits: Floats) -> Sampled:
        self.seen.append(blake2b(logits.data, digest_size=8).digest())
        return super().sample(logits)


class World:
    """A model by chance, in memory and as a pack; what it says alone is the truth."""

    def __init__(self, directory: Path, source: random.Random) -> None:
        self.source = source
        self.directory = directory
        family = source.choice(tiny.FAMILIES)
        kind = source.choice(["gguf", "gguf", "hf"])
        stored = source.choice(STORED[kind] + (WIDE if kind == "gguf" else []))
        self.what = f"{family} {kind} {stored}"
        tied = {"tie_word_embeddings": source.random() < 0.5} if family != "gemma3" else {}
        model = tiny.hf_model(family, seed=source.randrange(99), **sizes(family, stored in WIDE), **tied)
        if kind == "hf":
            path = tiny.save_hf(model, directory / "model", type=stored)
        else:
            path = tiny.save_gguf(model, directory / "model.gguf", type=stored)
        self.kv_type = source.choice(["f32", "f16", "bf16", "i8"])
        self.config = NodeConfig(kv_type=self.kv_type, kv_tokens=CONTEXT, context_tokens=CONTEXT)
        self.alone = Running(path, self.config)
        with pytest.MonkeyPatch.context() as patch, open_checkpoint(path) as checkpoint:
            patch.setattr("shoal.offload.pack.layout.SLICE_BYTES", source.choice([1, 20_000, 64 << 20]))
            self.pack = build_pack(checkpoint, directory / "pack")
            model = weighed(checkpoint, "keep")
            self.extents = model.extents, model.vectors_bytes
        self.known: dict[tuple[int, ...], tuple[list[int], list[bytes]]] = {}

    def truth(self, prompt: list[int], new: int) -> tuple[list[int], list[bytes]]:
        """Tokens and what they were chosen from, one step for the prompt and one for each token."""
        tokens, seen = self.known.get(tuple(prompt), ([], []))
        if len(tokens) < new:
            witness, tokens = Witness(prompt), []
            pages = list(range(-(-(len(prompt) + new) // 64)))
            row = self.alone.step((prompt, 0, pages))[-1]
            while len(tokens) < new:
                tokens.append(witness.sample(row).token_id)
                row = self.alone.step((tokens[-1:], len(prompt) + len(tokens) - 1, pages))[-1]
            seen = witness.seen
            self.known[tuple(prompt)] = tokens, seen
        return tokens[:new], seen[:new]

    def plan(self) -> Plan:
        """A budget of odd size: the least, a little more, some more, or more than all blocks need."""
        source, spec = self.source, self.alone.spec
        wanted = Wanted(
            spec,
            CONTEXT,
            source.choice([CONTEXT, CONTEXT, 640]),
            self.kv_type,
            source.choice([16, 48]),
            8,
            8,
            1,
        )

        def made(memory: int) -> Plan | None:
            found = plan_streamed(wanted, *self.extents, memory_bytes=memory)
            return found if isinstance(found, Plan) else None

        low, high = 0, 1 << 30
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (low, middle) if made(middle) else (middle, high)
        more = source.choice([0, 1, 4096, source.randrange(sum(self.extents[0].values())), 1 << 26])
        plan = made(high + more)
        assert plan is not None
        passing = [
            b.nbytes for b in plan.blocks if b.tier == "disk" and b.block.kind not in ("embed", "expert")
        ]
        experts = (
            spec.moe.active + source.randrange(spec.moe.experts) if spec.moe and plan.expert_slots else 0
        )
        return replace(
            plan,
            part_tokens=source.choice([1, 5, 16, 32, 64, 1 << 30]),
            window_bytes=max(passing, default=0) + source.choice([0, 1, 12_345, max(passing, default=0)]),
            expert_slots=source.choice([1, plan.expert_slots, experts]) if experts else 0,
        )


def sizes(family: str, wide: bool) -> dict[str, object]:
    wanted: dict[str, object] = {"max_position_embeddings": CONTEXT}
    if wide:
        wanted |= dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 256)
        wanted |= {"shared_expert_intermediate_size": 512, "head_dim": 64}
        if family == "phi3":  # has a factor for each pair of dimensions, so heads stay as they are
            wanted |= {"head_dim": None, "num_attention_heads": 16}
    known = vars(tiny.config(family))
    return {name: size for name, size in wanted.items() if known.get(name)}


class Streamed:
    """An engine whose weights come from the pack and whose KV goes to disk when it leaves memory."""

    def __init__(self, world: World, plan: Plan, slots: int) -> None:
        spec = world.alone.spec
        self.kv = KvPool(spec, plan.kv)
        self.store = WindowStore.open(plan, world.pack)
        self.disk: KvDisk | None = None
        if slots:
            place = world.directory / "kv"
            place.mkdir(exist_ok=True)
            self.disk = KvDisk(KvFile(place, bytes(32), self.kv.page_bytes, self.kv.page_tokens), slots)
        self.scheduler = Scheduler(
            PrefixCache(self.kv.table, self.kv.page_tokens, self.disk.index if self.disk else None),
            sequences=plan.sequences,
            queue=99,
            chunk_tokens=plan.chunk_tokens,
            guesses=plan.guesses,
            expected=evenly(world.source.choice([0.001, 0.15])),
            reads=self.disk.most_reads if self.disk else 1,
        )
        executor = Executor(Transformer(spec), plan, self.store, self.kv, Alone())
        ticks = itertools.count(step=0.001)
        clock = lambda: next(ticks)  # noqa: E731
        self.engine = Engine(Rank(executor, clock, self.disk), self.scheduler, clock)
        self.listener = Listener(self.engine)

    def close(self) -> None:
        self.engine.close()
        self.store.close()


def play(directory: Path, seed: int) -> tuple[int, int, int]:
    """How often something was preempted, guessed right, and read from disk."""
    source = random.Random(seed)
    world = World(directory, source)
    vocab, preempted, accepted, read = world.alone.spec.vocab, 0, 0, 0
    stems = [[source.randrange(vocab) for _ in range(source.randrange(150))] for _ in range(3)]
    stems.append((stems[0][:5] or [7]) * 30)
    slots = source.choice([0, 3, 200])
    for _ in range(2):  # the second time with the KV that the first one left
        plan = world.plan()
        streamed = Streamed(world, plan, slots)
        asked: list[tuple[list[int], int, Witness, Heard]] = []
        for _ in range(source.randint(1, 8)):
            stem = source.choice(stems)
            prompt = stem[: source.randint(0, len(stem))] + [source.randrange(vocab) for _ in range(3)]
            new = source.choice([source.randint(1, 40), source.randint(60, 120)])
            witness, enough = Witness(prompt), source.choice([99, source.randint(1, 20)])
            limit = len(prompt) + new
            sequence = Sequence(list(prompt), limit, witness, priority=source.choice([0, 0, 1]))
            answer = streamed.listener.submit(sequence, enough)
            asked.append((prompt, new, witness, answer))
            for _ in range(source.randrange(5)):
                streamed.listener.step()
            if source.random() < 0.1:
                streamed.engine.end(sequence, "cancelled")
        streamed.listener.run()
        streamed.close()
        for prompt, new, witness, answer in asked:
            assert len(answer.ended) == 1
            assert answer.error is None
            tokens, seen = world.truth(prompt, new)
            count = len(answer.tokens)
            assert count == min(new, answer.stop_after or new) or answer.ended == ["cancelled"]
            assert answer.tokens == tokens[:count], (world.what, plan)
            assert witness.seen[:count] == seen[:count], (world.what, plan)
        preempted += streamed.scheduler.totals.preemptions
        accepted += streamed.scheduler.totals.accepted_tokens
        read += streamed.disk.pages_read if streamed.disk else 0
    return preempted, accepted, read


def test_nothing_changes_a_bit(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 16384)
    happened = [play(tmp_path_factory.mktemp("world"), seed) for seed in (5, 6, 9, 10)]
    assert all(map(sum, zip(*happened, strict=True))), "too little happened"
