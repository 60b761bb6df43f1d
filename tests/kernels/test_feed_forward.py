"""Several matrices in one call give what the same kernels give one by one, in one home bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
from fakes.homes import HOMES, NATIVE, TRUTH, assert_close, frozen, layouts, linear, ones, randn, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.random_weights import random_matrix

from shoal import kernels
from shoal.kernels import (
    NARROW_INPUTS,
    WIDE_INPUTS,
    Activation,
    FeedForward,
    InputBits,
    Linears,
    OperandError,
    Routes,
    WeightType,
)
from shoal.kernels.arrays import Floats
from shoal.kernels.homes import choose, cpu
from shoal.kernels.types import F16, F32, Q4_0, Q4_K, Q6_K, Q8_0


@pytest.fixture(autouse=True)
def _best_home_afterwards() -> Iterator[None]:
    yield
    choose()
    kernels.set_threads(2)


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> str:
    choose(request.param)
    return request.param


def layer(
    kinds: tuple[WeightType, WeightType, WeightType] = (Q4_K, Q4_K, Q6_K),
    hidden: int = 256,
    ffn: int = 512,
    biases: bool = False,
    seed: int = 0,
    activation: Activation = "silu",
    leave_bits: InputBits = WIDE_INPUTS,
) -> FeedForward:
    gate, up, down = (
        random_matrix(kind, rows, cols, seed=seed + i, scale=0.02 if kind.block_weights < 256 else 2e-4)
        for i, (kind, rows, cols) in enumerate(
            zip(kinds, (ffn, ffn, hidden), (hidden, hidden, ffn), strict=True)
        )
    )
    made = [randn(w.rows, seed=seed + w.rows) if biases else None for w in (gate, up, down)]
    return FeedForward(Linears((gate, up), made[:2]), Linears((down,), made[2:], leave_bits), activation)


each_bits = pytest.mark.parametrize("leave_bits", [WIDE_INPUTS, NARROW_INPUTS])


def assert_near(got: Floats, truth: Floats, tolerance: float = 1e-4) -> None:
    assert got.shape == truth.shape
    assert got.dtype == np.float32
    assert np.linalg.norm(got.astype(float) - truth) <= tolerance * np.linalg.norm(truth.astype(float))


def test_linears_of_one_input_are_those_one_by_one(home: str) -> None:
    kinds = (Q4_K, F32, Q6_K, F16, Q8_0)
    matrices = [random_matrix(kind, 5 + 31 * i, 768, seed=i) for i, kind in enumerate(kinds)]
    biases = [randn(w.rows) if i % 2 else None for i, w in enumerate(matrices)]
    norm = randn(768)
    for tokens in (1, 3, 12, 40, 100):
        x = randn(tokens, 768)
        normal = cpu().rms_norm(x, norm, 1e-5)
        alone = [linear(normal, w, bias) for w, bias in zip(matrices, biases, strict=True)]
        together = cpu().linears(x, Linears(matrices, biases), norm, 1e-5)
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
        without = cpu().linears(normal, Linears(matrices, biases))
        assert all(np.array_equal(a, b) for a, b in zip(alone, without, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biases", [False, True])
@each_bits
def test_feed_forward_is_that_of_the_reference(
    activation: Activation, biases: bool, leave_bits: InputBits
) -> None:
    """A last bit may round an input of down the other way: of 8 bits some inputs in a thousand, by 1/127."""
    tolerance = 1e-4 if leave_bits == WIDE_INPUTS else 1e-3
    for kinds in ((Q4_K, Q4_K, Q6_K), (Q8_0, Q4_0, F32), (F32, F32, Q8_0), (F16, Q8_0, F16)):
        made = layer(kinds, biases=biases, activation=activation, leave_bits=leave_bits)
        for norm in (randn(256, seed=9), None):
            for tokens in (1, 5, 100):
                x = randn(tokens, 256)
                truth = TRUTH.feed_forward(x, made, norm, 1e-5)
                for name in NATIVE:
                    choose(name)
                    assert_near(cpu().feed_forward(x, made, norm, 1e-5), truth, tolerance)


def definition(activation: Activation, gates: Floats) -> Floats:
    """The activation, in float64."""
    x = gates.astype(float)
    if activation == "silu":
        with np.errstate(over="ignore"):
            return (x / (1 + np.exp(-x))).astype(np.float32)
    return (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(np.float32)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_at_extremes(home: str, activation: Activation) -> None:
    """Gates of any size. Up is one everywhere, so that the layer returns the activation itself."""
    gates = np.array([*np.linspace(-12, 12, 90), 0, 1e-30, 50, 88, 100, 1e4, -20, -100, -1e4], np.float32)
    n = len(gates)
    column = kernels.Matrix.of(gates[:, None])
    single = kernels.Matrix.of(ones(n, 1))
    identity = kernels.Matrix.of(np.eye(n, dtype=np.float32))
    made = FeedForward(Linears((column, single)), Linears((identity,)), activation)
    got = cpu().feed_forward(ones(1, 1), made)
    assert_close(got, definition(activation, gates)[None], rtol=3e-6, atol=1e-7)
    assert np.isnan(cpu().feed_forward(np.full((1, 1), np.nan, np.float32), made)).all()


@pytest.mark.parametrize("kinds", [(Q4_K, Q4_K, Q6_K), (Q4_0, Q6_K, Q8_0), (Q4_K, Q8_0, Q4_K)])
@pytest.mark.parametrize("name", NATIVE)
@each_bits
def test_no_bit_of_a_layer_depends_on_batch_or_threads(
    name: str, kinds: tuple[WeightType, WeightType, WeightType], leave_bits: InputBits
) -> None:
    choose(name)
    made, norm, x = layer(kinds, leave_bits=leave_bits), randn(256), randn(120, 256)
    alone = np.concatenate([cpu().feed_forward(x[t : t + 1], made, norm, 1e-5) for t in range(120)])
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for tokens in (1, 2, 4, 5, 9, 16, 17, 97, 120):
            got = cpu().feed_forward(x[:tokens], made, norm, 1e-5)
            assert np.array_equal(got, alone[:tokens])


def routes_of(choices: list[list[int]], factors: Floats) -> tuple[list[int], Routes]:
    """The experts in use and their routes, from the choices of every token."""
    used = sorted({expert for chosen in choices for expert in chosen})
    pairs = [[(t, c.index(e)) for t, c in enumerate(choices) if e in c] for e in used]
    starts = [0]
    for mine in pairs:
        starts.append(starts[-1] + len(mine))
    flat = [pair for mine in pairs for pair in mine]
    tokens = np.array([t for t, _ in flat], np.int64)
    return used, Routes(tuple(starts), tokens, np.array([factors[t, i] for t, i in flat], np.float32))


@settings(deadline=None, max_examples=15)
@given(
    data=st.data(),
    tokens=st.sampled_from([1, 2, 7, 30, 150]),
    threads=st.integers(1, 3),
    leave_bits=st.sampled_from([WIDE_INPUTS, NARROW_INPUTS]),
)
def test_experts_together_are_those_one_by_one(
    data: st.DataObject, tokens: int, threads: int, leave_bits: InputBits
) -> None:
    kinds = (Q4_0, Q8_0, Q4_0)
    experts = [layer(kinds, 64, 96, biases=True, seed=10 * i, leave_bits=leave_bits) for i in range(5)]
    choice = st.permutations(range(5)).map(lambda order: list(order)[:2])
    choices = data.draw(st.lists(choice, min_size=tokens, max_size=tokens))
    factors, x = np.random.default_rng(tokens).random((tokens, 2), np.float32), randn(tokens, 64)
    used, routes = routes_of(choices, factors)
    layers = [experts[i] for i in used]
    truth, cut = zeros(tokens, 64), zeros(tokens, 64)
    TRUTH.experts(x, layers, routes, truth)
    for name in NATIVE:
        choose(name)
        kernels.set_threads(threads)
        got = zeros(tokens, 64)
        cpu().experts(x, layers, routes, got)
        assert_near(got, truth, 1e-4 if leave_bits == WIDE_INPUTS else 2e-3)
        cut[:] = 0
        for i, layer_ in enumerate(layers):  # in calls of one each
            mine = slice(routes.starts[i], routes.starts[i + 1])
            some = Routes((0, mine.stop - mine.start), routes.tokens[mine], routes.factors[mine])
            cpu().experts(x, [layer_], some, cut)
        assert np.array_equal(cut, got)
        single = [cpu().feed_forward(x, layer) for layer in layers]
        for t in range(min(tokens, 3)):
            own, route = routes_of([choices[t]], factors[t : t + 1])
            alone = zeros(1, 64)
            cpu().experts(x[t : t + 1], [experts[i] for i in own], route, alone)
            assert np.array_equal(got[t], alone[0])
            total = zeros(64)
            for expert in own:
                total += factors[t, choices[t].index(expert)] * single[used.index(expert)][t]
            assert_near(got[t], total, 1e-6)


def test_operands_need_not_be_contiguous_or_writable(home: str) -> None:
    made, norm = layer((Q8_0, Q8_0, Q8_0), 64, 96), randn(64, seed=3)
    plain = randn(5, 64)
    routes = Routes((0, 3), np.array([0, 2, 4]), randn(3))
    truth = cpu().feed_forward(plain, made, norm, 1e-5)
    added = zeros(5, 64)
    cpu().experts(plain, [made], routes, added)
    tokens, factors = (frozen(numbers.repeat(2)[::2]) for numbers in (routes.tokens, routes.factors))
    tolerance = 1e-6 if home == "reference" else 0
    for x in layouts(plain):
        assert_near(cpu().feed_forward(x, made, frozen(norm), 1e-5), truth, tolerance)
        assert_near(cpu().feed_forward(x, made, norm.repeat(2)[::2], 1e-5), truth, tolerance)
        into = zeros(5, 64)
        cpu().experts(x, [made], Routes((0, 3), tokens, factors), into)
        assert_near(into, added, tolerance)


def test_no_tokens(home: str) -> None:
    made, none = layer((Q8_0, Q8_0, Q8_0), 64, 96), zeros(0, 64)
    assert cpu().feed_forward(none, made, ones(64), 1e-5).shape == (0, 64)
    assert [y.shape for y in cpu().linears(none, made.enter, ones(64), 1e-5)] == [(0, 96), (0, 96)]
    into = zeros(0, 64)
    cpu().experts(none, [made], Routes((0, 0), np.empty(0, np.int64), zeros(0)), into)


def test_a_token_without_experts_gets_nothing(home: str) -> None:
    made = layer((Q8_0, Q8_0, Q8_0), 64, 64)
    got = zeros(3, 64)
    cpu().experts(randn(3, 64), [made], Routes((0, 1), np.array([1]), ones(1)), got)
    assert not got[[0, 2]].any()
    assert got[1].all()


def test_what_does_not_fit_is_refused(home: str) -> None:
    made, other = layer((Q8_0, Q8_0, Q8_0), 64, 64), layer((Q8_0, Q8_0, Q8_0), 64, 96)
    x, into = randn(2, 64), zeros(2, 64)
    with pytest.raises(OperandError, match="cannot meet"):
        Linears((random_matrix(F32, 2, 3), random_matrix(F32, 2, 4)))
    with pytest.raises(OperandError, match="feed-forward"):
        FeedForward(made.enter, other.leave, "silu")
    with pytest.raises(OperandError, match="bias"):
        Linears((random_matrix(F32, 2, 3),), (zeros(3),))
    for norm in (zeros(63), np.zeros(64), zeros(1, 64)):
        with pytest.raises(OperandError, match="norm"):
            cpu().linears(x, made.enter, norm, 1e-5)
        with pytest.raises(OperandError, match="norm"):
            cpu().feed_forward(x, made, norm, 1e-5)
    good = Routes((0, 2), np.array([0, 1]), ones(2))
    for routes in (
        Routes((0, 1), good.tokens, good.factors),
        Routes((1, 2), good.tokens, good.factors),
        Routes((0, 1, 2), good.tokens, good.factors),
        Routes((0, 2), good.tokens.astype(np.int32), good.factors),
        Routes((0, 2), good.tokens, good.factors.astype(float)),
        Routes((0, 2), good.tokens, ones(3)),
    ):
        with pytest.raises(OperandError):
            cpu().experts(x, [made], routes, into)
    for unlike in (other, FeedForward(made.enter, made.leave, "gelu_tanh")):
        with pytest.raises(OperandError, match="shapes"):
            cpu().experts(x, [made, unlike], Routes((0, 1, 2), good.tokens, good.factors), into)
    with pytest.raises((OperandError, IndexError)):
        cpu().experts(x, [made], Routes((0, 1), np.array([2]), ones(1)), into)
    for wrong in (zeros(2, 63), zeros(3, 64), zeros(64, 2).T, np.zeros((2, 64)), frozen(into)):
        with pytest.raises(OperandError, match="add to"):
            cpu().experts(x, [made], good, wrong)
