"""The random numbers: golden draws, and the vectorised fill against the scalar class."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlp_fast.model.rng import RNG


def test_scalar_draws_are_the_references(golden: dict[str, Any]) -> None:
    rng = RNG(1337)
    assert [rng.random_u32() for _ in range(8)] == golden["rng_u32_seed1337"]
    for seed in (1337, 42):
        rng = RNG(seed)
        assert [rng.random() for _ in range(4)] == golden[f"rng_uniform_seed{seed}"]


def test_fill_reaches_the_references_millionth_draw(golden: dict[str, Any]) -> None:
    rng = RNG(1337)
    rng.fill_u32(1_000_000)
    assert [rng.random_u32(), rng.random_u32()] == golden["rng_u32_seed1337_after_1000000"]


def test_normals_are_the_references_rounded(golden: dict[str, Any]) -> None:
    expected = torch.tensor(golden["rng_randn_seed1337"], dtype=torch.float64).float()
    assert torch.equal(RNG(1337).normal((5,)), expected)


@given(seed=st.integers(1, 2**64 - 1), n=st.integers(0, 20_000))
@settings(max_examples=30, deadline=None)
def test_fill_gives_the_scalar_bits_and_state(seed: int, n: int) -> None:
    scalar, filled = RNG(seed), RNG(seed)
    expected = [scalar.random_u32() for _ in range(n)]
    assert filled.fill_u32(n).tolist() == expected
    assert filled.state == scalar.state


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 8193])
def test_fill_at_the_edges_of_its_lanes(n: int) -> None:
    scalar, filled = RNG(7), RNG(7)
    assert filled.fill_u32(n).tolist() == [scalar.random_u32() for _ in range(n)]
    assert filled.random_u32() == scalar.random_u32()


def test_uniform_is_scaled_in_float64_and_rounded_once() -> None:
    rng = RNG(3)
    expected = [np.float32(rng.random() * (0.3 - -0.1) + -0.1) for _ in range(6)]
    assert RNG(3).uniform((2, 3), -0.1, 0.3).flatten().tolist() == expected


def test_an_odd_count_of_normals_drops_the_second_of_the_last_pair() -> None:
    odd, even = RNG(9), RNG(9)
    assert torch.equal(odd.normal((3,)), even.normal((4,))[:3])
    assert odd.state == even.state


def test_a_zero_uniform_gives_a_finite_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = RNG(1)
    monkeypatch.setattr(rng, "fill_uniform", lambda n: np.zeros(n))
    largest = (-2 * np.log(2.0**-25)) ** 0.5
    assert rng.normal((2,)).tolist() == [np.float32(largest), 0.0]


@pytest.mark.parametrize("seed", [0, -1, 2**64])
def test_seeds_outside_64_bits_and_zero_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        RNG(seed)
