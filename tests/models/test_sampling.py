"""Sampling: the fast code equals plain code, draws follow the distribution, penalties are those of transformers."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from shoal.kernels.arrays import Floats
from shoal.models.errors import SamplingError
from shoal.models.sampling import Sampled, Sampler, SamplingParams

VOCAB = 37


def logits_of(seed: int, vocab: int = VOCAB, scale: float = 2.0) -> Floats:
    return np.random.default_rng(seed).standard_normal(vocab, np.float32) * np.float32(scale)


def plain_probabilities(
    logits: Floats, params: SamplingParams, prompt: list[int], generated: list[int]
) -> list[float]:
    """The definition, token by token, in plain Python."""
    values = logits.tolist()
    for token, bias in params.logit_bias.items():
        values[token] += bias
    seen = [*prompt, *generated]
    for token in set(seen):
        factor = params.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token, count in Counter(generated).items():
        values[token] -= params.presence_penalty + params.frequency_penalty * count
    values = [value / params.temperature for value in values]
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    weights = {token: math.exp(values[token] - values[order[0]]) for token in order}
    if params.top_k:
        order = order[: params.top_k]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if kept and mass >= params.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p]
    total, probabilities = sum(weights[token] for token in kept), [0.0] * len(values)
    for token in kept:
        probabilities[token] = weights[token] / total
    return probabilities


@st.composite
def some_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.3, 0.8, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 5, 20, 36, 37, 100])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.7, 0.2, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.3])),
        logit_bias=draw(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4)),
        seed=draw(st.integers(0, 1 << 40)),
    )


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=8)


@given(params=some_params(), seed=st.integers(0, 1 << 20), prompt=tokens, generated=tokens)
@settings(max_examples=200, deadline=None)
def test_equal_to_the_plain_definition(
    params: SamplingParams, seed: int, prompt: list[int], generated: list[int]
) -> None:
    logits = logits_of(seed)
    sampler = Sampler(params, prompt)
    for token in generated:
        sampler.accept(token)
    expected = plain_probabilities(logits, params, prompt, generated)
    # The draw is the inverse of the cumulative distribution at the generator's next number.
    point = random.Random(params.seed).random()
    chosen = sampler.sample(logits).token_id
    before = sum(expected[:chosen])
    assert before - 1e-5 <= point <= before + expected[chosen] + 1e-5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3),
        SamplingParams(seed=3, temperature=0.6, top_k=6),
        SamplingParams(seed=3, top_p=0.8),
        SamplingParams(seed=3, min_p=0.1, temperature=1.5),
        SamplingParams(seed=3, top_k=12, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits, draws = logits_of(7, vocab=20), 2000
    sampler = Sampler(params)
    counts = Counter(sampler.sample(logits).token_id for _ in range(draws))
    expected = [share * draws for share in plain_probabilities(logits, params, [], [])]
    assert all(expected[token] > 0 for token in counts)
    likely = [token for token in range(20) if expected[token] >= 5]
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in likely)
    assert chi_square < len(likely) + 5 * math.sqrt(2 * len(likely))  # mean k, variance 2k


@given(seed=st.integers(0, 1 << 20), prompt=tokens, penalty=st.sampled_from([0.5, 1.1, 2.0]))
@settings(max_examples=50, deadline=None)
def test_the_repetition_penalty_is_that_of_transformers(seed: int, prompt: list[int], penalty: float) -> None:
    logits = logits_of(seed)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt], dtype=torch.long), torch.from_numpy(logits)[None]
    )[0].numpy()
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=penalty), prompt)
    assert sampler.sample(logits).token_id == int(theirs.argmax())
    adjusted = Sampler(SamplingParams(repetition_penalty=penalty), prompt)._adjust(logits)
    np.testing.assert_array_max_ulp(adjusted, theirs)


def test_presence_and_frequency_look_at_generated_tokens_only() -> None:
    logits = np.array([2.0, 1.95, 0.0], np.float32)
    sampler = Sampler(
        SamplingParams(temperature=0, presence_penalty=0.2, frequency_penalty=0.1), prompt_ids=[0] * 9
    )
    assert [sampler.sample(logits).token_id for _ in range(4)] == [0, 1, 0, 1]


def test_greedy_takes_the_lowest_of_equals_and_leaves_the_logits_alone() -> None:
    logits = np.array([0.0, 3.0, 3.0, -1.0], np.float32)
    before = logits.copy()
    assert Sampler(SamplingParams(temperature=0)).sample(logits).token_id == 1
    Sampler(SamplingParams(logit_bias={0: 5.0}, repetition_penalty=1.5, top_k=2, seed=1), [1]).sample(logits)
    assert np.array_equal(logits, before)


def test_of_equals_at_the_border_the_lowest_ids_stay() -> None:
    sampler = Sampler(SamplingParams(top_k=3, seed=0))
    assert {sampler.sample(np.zeros(9, np.float32)).token_id for _ in range(200)} == {0, 1, 2}


def test_a_seed_repeats_and_neighbours_do_not_matter() -> None:
    params, rows = SamplingParams(seed=11, temperature=1.3), [logits_of(i) for i in range(30)]
    sampler = Sampler(params)
    alone = [sampler.sample(row).token_id for row in rows]
    sampler, neighbour = Sampler(params), Sampler(SamplingParams(seed=5))
    mixed = []
    for row in rows:
        neighbour.sample(row)
        random.random()
        mixed.append(sampler.sample(row).token_id)
    assert mixed == alone
    assert len({tuple(Sampler(SamplingParams()).sample(row).token_id for row in rows) for _ in range(4)}) > 1


def test_a_large_vocabulary_takes_the_same_way_as_a_small_one() -> None:
    for scale in (0.1, 3.0):  # flat: the candidates looked at first do not hold the mass
        logits = logits_of(1, vocab=20_000, scale=scale)
        params = SamplingParams(top_p=0.9, seed=4)
        expected = plain_probabilities(logits, params, [], [])
        sampler = Sampler(params)
        assert all(expected[sampler.sample(logits).token_id] > 0 for _ in range(200))


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = logits_of(3)
    params = SamplingParams(temperature=0.5, logit_bias={4: 50.0}, logprobs=5, seed=0)
    sampled = Sampler(params).sample(logits)
    expected = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-logits)[:5]
    assert sampled.token_id == 4
    assert sampled.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    assert [token for token, _ in sampled.top] == best.tolist()
    assert [logprob for _, logprob in sampled.top] == pytest.approx(expected[best], abs=1e-5)
    assert Sampler(SamplingParams(logprobs=0)).sample(logits).top == ()
    assert math.isnan(Sampler(SamplingParams()).sample(logits).logprob)


def test_masked_tokens_are_never_chosen() -> None:
    logits = np.full(9, -math.inf, np.float32)
    logits[[2, 5]] = 1.0
    for params in (
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_k=4),
        SamplingParams(seed=1, top_p=0.99),
    ):
        sampler = Sampler(params)
        assert {sampler.sample(logits).token_id for _ in range(60)} == {2, 5}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_sampled_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of(0)
    logits[5] = bad
    with pytest.raises(SamplingError, match="logits"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)
    with pytest.raises(SamplingError, match="logits"):
        Sampler(SamplingParams(temperature=temperature)).sample(np.full(4, -math.inf, np.float32))


def test_what_overflows_is_the_least_likely() -> None:
    logits = np.array([3e38, -3e38, -3e38], np.float32)
    params = SamplingParams(temperature=0.5, repetition_penalty=2.0, logprobs=1, seed=0)
    assert Sampler(params, [1]).sample(logits) == Sampled(0, 0.0, ((0, 0.0),))


def test_token_ids_outside_the_vocabulary_are_an_error() -> None:
    with pytest.raises(SamplingError, match="token id 99 is outside the model's vocabulary of 37"):
        Sampler(SamplingParams(logit_bias={99: 1.0})).sample(logits_of(0))


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = logits_of(2)
    assert Sampler(SamplingParams(temperature=temperature)).sample(logits).token_id == int(logits.argmax())
