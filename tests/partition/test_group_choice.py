"""Why a group was chosen, in words."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.partition.group_choice import Choice, NoGroup, RankPlan, Unused
from shoal.partition.group_cost import Figures
from shoal.partition.machines import LinkSpeed
from shoal.partition.sum_cost import Means

PROMPTS = (512, 4000)
STAR = Means("star", "f32")


def figures(tokens_per_s: float, first_token_s: float = 2.0) -> Figures:
    token_s = 1 / tokens_per_s
    return Figures(
        token_s, (first_token_s, 9 * first_token_s), first_token_s + 256 * token_s, STAR, STAR, 256
    )


def choice(ranks: int, machines: int, chosen: Figures, *unused: Unused, **more: Any) -> Choice:
    plans = tuple(RankPlan(f"pi{rank + 1}", rank, 1 / ranks, 1, 0, 0.0) for rank in range(ranks))
    return Choice("tensor", plans, (), "columns", chosen, PROMPTS, machines, unused, **more)


WIFI = LinkSpeed(0.027, 4e6, "Wi-Fi")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (choice(1, 1, figures(6.1)), "alone: 6.1 tokens/s"),
        (
            choice(2, 3, figures(6.1), Unused("pi3", WIFI, figures(2.4), 3)),
            "using 2 of 3 machines: pi3 (Wi-Fi, 54 ms) would cut 6.1 → 2.4 tokens/s",
        ),
        (
            choice(1, 2, figures(8.1), Unused("pi2", WIFI, figures(5.2), 2)),
            "alone: two machines would be slower (5.2 against 8.1 tokens/s)",
        ),
        (
            choice(2, 3, figures(6.1), Unused("pi3", LinkSpeed(1e-4, 1e8), figures(6.5, 4.2), 3)),
            "using 2 of 3 machines: pi3 (0.2 ms) would delay the first token of a prompt of 512 from 2 s to 4.2 s",
        ),
        (
            choice(1, 2, figures(8.1), Unused("pi2", None, figures(8.2, 40), 2)),
            "alone: with two machines, the first token of a prompt of 512 would come later (40 s against 2 s)",
        ),
        (
            choice(1, 2, figures(8.1), Unused("pi2", WIFI, None, 2, "the head does not reach it")),
            "alone: pi2 (Wi-Fi, 54 ms) cannot be used: the head does not reach it",
        ),
        (
            choice(1, 2, figures(8.1), Unused("pi2", None, figures(8.15), 2)),
            "alone: two machines would be no faster (8.2 tokens/s)",
        ),
        (choice(2, 2, figures(6.1), alone=figures(4.4)), "using both machines: 6.1 tokens/s, alone 4.4"),
        (choice(3, 3, figures(0.25)), "using all 3 machines: 0.25 tokens/s, alone it would not fit"),
        (
            choice(2, 2, figures(2.4), freely=figures(6.1), freely_ranks=1),
            "using 2 machines because a number was asked for: 2.4 tokens/s, alone 6.1",
        ),
        (
            choice(2, 4, figures(5.0), freely=figures(6.1), freely_ranks=3),
            "using 2 machines because a number was asked for: 5.0 tokens/s, with 3 6.1",
        ),
        (
            choice(2, 2, figures(6.1), freely=figures(6.1), freely_ranks=2),
            "using 2 machines because a number was asked for: 6.1 tokens/s",
        ),
        (
            choice(1, 2, figures(109.7), freely=figures(109.71), freely_ranks=2),
            "using 1 machine because a number was asked for: 109.7 tokens/s",
        ),
        (  # freely, prompts are read by both
            choice(1, 2, figures(4.3, 73), freely=figures(4.3, 25), freely_ranks=2),
            "using 1 machine because a number was asked for: 4.3 tokens/s, the first token of a prompt of 512 "
            "after 73 s, with 2 25 s",
        ),
        (
            choice(2, 2, figures(6.1), alone=None)._replace(split="pipeline"),
            "using both machines, with layers divided among them: 6.1 tokens/s, alone it would not fit",
        ),
        (
            choice(3, 3, figures(4.3, 25), alone=figures(4.3, 73))._replace(split="prompts"),
            "prompts by all 3 machines, answers by this one alone: the first token of a prompt of 512 after 25 s "
            "instead of 73 s, 4.3 tokens/s",
        ),
        (
            choice(2, 4, figures(4.3, 9), alone=figures(4.3, 17))._replace(split="prompts"),
            "prompts by 2 of 4 machines, answers by this one alone: the first token of a prompt of 512 after 9 s "
            "instead of 17 s, 4.3 tokens/s",
        ),
        (
            NoGroup("it takes about 5.3 GB of memory, there are 4 GB", 1, 1),
            "no group of these machines can run it: it takes about 5.3 GB of memory, there are 4 GB",
        ),
    ],
)
def test_words(made: Choice | NoGroup, said: str) -> None:
    assert made.describe() == said


def test_of_many_machines_only_some_are_named() -> None:
    others = (Unused(f"pi{n}", None, figures(2.0), 2) for n in range(2, 9))
    alone = choice(2, 9, figures(6.1), *others).describe()
    assert alone.count("would cut") == 3
    assert alone.endswith("; 4 more would not help either")
