"""The noise: distributed as it must be, and a function of seed, position and token id alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headrace.kernels.sampling import (
    exponential_noise,
    gumbel_argmax,
    gumbel_argmax_reference,
    gumbel_argmax_triton,
    noise_keys,
)
from torch import Tensor


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    expected = probabilities.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return (statistic - freedom) / float(np.sqrt(2 * freedom))


def column(value: int, rows: int) -> Tensor:
    return torch.full((rows,), value, dtype=torch.int64)


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_follow_the_softmax(vary: str) -> None:
    torch.manual_seed(0)
    draws, scores = 40_000, torch.randn(20) * 2
    counter = torch.arange(draws)
    seeds, positions = (counter, column(7, draws)) if vary == "seeds" else (column(7, draws), counter)
    tokens = gumbel_argmax_reference(scores.expand(draws, -1), seeds, positions)
    assert chi_square(tokens.bincount(minlength=20), scores.softmax(0)) < 5


def test_draws_follow_the_softmax_over_a_large_vocabulary() -> None:
    draws, vocab = 1500, 20_000
    tokens = gumbel_argmax_reference(
        torch.zeros(1, vocab).expand(draws, -1), torch.arange(draws), column(0, draws)
    )
    counts = (tokens * 50 // vocab).bincount(minlength=50)
    assert chi_square(counts, torch.full((50,), 1 / 50)) < 5


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    n = 200
    seeds, positions = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    tokens = gumbel_argmax_reference(torch.zeros(n * n, 4), seeds.flatten(), positions.flatten()).view(n, n)
    uniform = torch.full((16,), 1 / 16)
    for first, second in (
        (tokens[:, 1:], tokens[:, :-1]),
        (tokens[1:], tokens[:-1]),
        (tokens[1:, 1:], tokens[:-1, :-1]),
    ):
        pairs = (first * 4 + second).flatten().bincount(minlength=16)
        assert chi_square(pairs, uniform) < 5


def test_noise_is_exponential_to_its_tails() -> None:
    keys = noise_keys(torch.arange(64), column(3, 64))
    noise = exponential_noise(keys, torch.arange(1 << 15)[None]).double().flatten()
    assert noise.min() > 0
    assert noise.isfinite().all()
    # Values of the distribution function are uniform: compare the counts of 64 bins, and of the smallest.
    counts = (-torch.expm1(-noise) * 64).long().clamp_(max=63).bincount(minlength=64)
    assert chi_square(counts, torch.full((64,), 1 / 64)) < 5
    assert 2**21 * 2**-16 * 0.3 < (noise < 2**-16).sum().item() < 2**21 * 2**-16 * 3


def test_a_rows_draw_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(1)
    scores, seeds, positions = torch.randn(33, 1001), torch.randint(2**62, (33,)), torch.randint(4096, (33,))
    together = gumbel_argmax(scores, seeds, positions)
    alone = [gumbel_argmax(scores[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(33)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_candidates_have_the_noise_of_their_token_ids() -> None:
    torch.manual_seed(2)
    scores, seeds = torch.randn(50, 300), torch.arange(50)
    ids = torch.stack([torch.randperm(300) for _ in range(50)])
    columns = gumbel_argmax(scores.gather(1, ids), seeds, seeds, ids)
    assert ids.gather(1, columns[:, None]).flatten().tolist() == gumbel_argmax(scores, seeds, seeds).tolist()


def test_the_noise_is_what_it_was() -> None:
    """Seeded output is a promise across versions: change these numbers only with a release note."""
    scores = torch.zeros(4, 49152)
    tokens = gumbel_argmax_reference(
        scores, torch.tensor([0, 1, 2**63 - 1, 0]), torch.tensor([0, 0, 5, 131071])
    )
    assert tokens.tolist() == [43301, 29145, 39303, 16305]


@pytest.mark.parametrize("value", [-torch.inf, 3e38, -3e38])
def test_extreme_scores_draw_a_token_in_range(value: float) -> None:
    tokens = gumbel_argmax(torch.full((3, 11), value), torch.arange(3), torch.arange(3))
    assert ((tokens >= 0) & (tokens < 11)).all()


@pytest.mark.parametrize("vocab", [1, 32, 2048, 49152])
def test_triton_draws_what_torch_draws(vocab: int, device: torch.device) -> None:
    torch.manual_seed(3)
    scores = (torch.randn(9, vocab) * 3).to(device)
    scores[:, vocab // 2 + 1 :: 3] = -torch.inf
    seeds, positions = torch.randint(2**62, (9,)).to(device), torch.arange(9, device=device)
    ours = gumbel_argmax_triton(scores, seeds, positions)
    reference = gumbel_argmax_reference(scores, seeds, positions)
    # The two logarithms differ in the last bit: a rare tie may fall either way.
    assert (ours == reference).sum() >= 8
