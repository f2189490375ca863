"""The sampler against a slow float64 reference, row by row; statistics; bad logits."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from headrace.ipc.config import LogprobsMode
from headrace.ipc.messages import Admit, Sampling, StepPlan, pack
from headrace.kernels.sampling import exponential_noise, noise_keys
from headrace.worker.constraints import Constraint, Constraints, Tokens
from headrace.worker.nucleus import Nucleus, keep_likeliest, keep_of_all
from headrace.worker.rules import BadWords
from headrace.worker.sampler import Sampler
from headrace.worker.slots import Batch, Slots
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")
Prompt = tuple[list[int], list[int], Sampling]
"""Prompt tokens, tokens generated so far, parameters."""


def build(sampling: Sampling, prompt: Tokens) -> list[Constraint]:
    words = [word for word in sampling.bad_words if len(word) > 1]
    return [BadWords(words)] if words else []


def admitted(requests: Sequence[Prompt]) -> tuple[Slots, Batch]:
    """A slot table with these requests, and the batch that samples for each."""
    longest = max(len(prompt) + len(output) for prompt, output, _ in requests)
    slots = Slots(len(requests), longest + 1, 16, 1000, Constraints(build))
    blocks = pack(range(longest // 16 + 1))
    lengths = [len(prompt) + len(output) for prompt, output, _ in requests]
    admits = [
        Admit(slot, pack(prompt + output), len(prompt), 0, blocks, sampling)
        for slot, (prompt, output, sampling) in enumerate(requests)
    ]
    plan = StepPlan(0, b"", admits, b"", pack(range(len(requests))), pack(lengths))
    return slots, slots.apply(plan)


def sample(logits: Tensor, requests: Sequence[Prompt]) -> list[int]:
    """One step of a fresh sampler."""
    return Sampler(CPU).sample(logits.clone(), *admitted(requests)).tokens.tolist()


def survivors(logits: NDArray[np.float64], request: Prompt) -> NDArray[np.float64]:
    """The reference: scores of one row after every stage but the draw, -inf where a token is out."""
    prompt, output, sampling = request
    scores = logits.copy()
    if len(output) < sampling.min_tokens:
        eos = [] if sampling.eos_token_id is None else [sampling.eos_token_id]
        scores[eos + sampling.stop_token_ids] = -np.inf
    allowed = np.frombuffer(sampling.allowed_token_ids, np.int32)
    if len(allowed):
        scores[np.setdiff1d(np.arange(len(scores)), allowed)] = -np.inf
    for word in sampling.bad_words:
        if output[len(output) - len(word) + 1 :] == word[:-1] and len(word) <= len(output) + 1:
            scores[word[-1]] = -np.inf
    scores[np.frombuffer(sampling.bias_tokens, np.int32)] += np.frombuffer(sampling.bias_values, np.float32)
    for token in set(prompt + output):
        factor = sampling.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(output).items():
        scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if sampling.min_p > 0:
        scores[scores < scores.max() + np.log(sampling.min_p)] = -np.inf
    if sampling.top_k > 0:
        scores[scores < np.sort(scores)[::-1][min(sampling.top_k, len(scores)) - 1]] = -np.inf
    if sampling.top_p < 1:
        ordered = np.sort(scores)[::-1]
        probabilities = np.exp(ordered - ordered[0])
        probabilities /= probabilities.sum()
        shortest = int(np.flatnonzero(np.cumsum(probabilities) >= sampling.top_p)[0])
        scores[scores < ordered[shortest]] = -np.inf
    return scores


def reference(logits: NDArray[np.float64], request: Prompt) -> int:
    prompt, output, sampling = request
    scores = survivors(logits, request)
    if sampling.temperature == 0:
        return int(scores.argmax())
    position = len(prompt) + len(output)
    keys = noise_keys(torch.tensor([sampling.seed]), torch.tensor([position]))
    noise = exponential_noise(keys, torch.arange(len(logits))[None])[0].double().numpy()
    return int((scores - np.log(noise)).argmax())


def random_request(rng: random.Random, vocab: int) -> Prompt:
    def some(off: float, *on: float) -> float:
        return rng.choice([off, off, *on])

    sampling = Sampling(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_p=some(1.0, 0.05, 0.5, 0.9, 0.999),
        top_k=int(some(0, 1, 5, 40, vocab - 1, vocab + 5)),
        min_p=some(0.0, 0.02, 0.3),
        seed=rng.randrange(2**63),
        presence_penalty=some(0.0, 1.5, -0.7),
        frequency_penalty=some(0.0, 0.8, -0.3),
        repetition_penalty=some(1.0, 1.3, 0.8),
        min_tokens=int(some(0, 5, 20)),
        eos_token_id=rng.choice([None, 2]),
        stop_token_ids=rng.choice([[], [7, 9]]),
    )
    prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 30))]
    output = [rng.randrange(vocab) for _ in range(rng.randint(0, 30))]
    output += output[:5]
    return prompt, output, msgspec.structs.replace(sampling, **random_rules(rng, vocab, output))


def random_rules(rng: random.Random, vocab: int, output: list[int]) -> dict[str, Any]:
    """Fields that say which tokens may come; some bad words are about to be completed."""
    biased = rng.sample(range(vocab), rng.choice([0, 0, 1, 9]))
    allowed = rng.sample(range(vocab), rng.choice([0, 0, 15, vocab // 2]))
    words = [output[len(output) - rng.randint(0, 3) :] for _ in range(rng.choice([0, 0, 8]))]
    return {
        "bias_tokens": pack(biased),
        "bias_values": array("f", [rng.gauss(0, 5) for _ in biased]).tobytes(),
        "allowed_token_ids": pack(allowed),
        "bad_words": [[*word, rng.randrange(vocab)] for word in words],
    }


@pytest.mark.parametrize(("vocab", "scale"), [(50, 2.0), (3000, 4.0), (3000, 0.3)])
def test_mixed_batches_agree_with_the_reference(vocab: int, scale: float) -> None:
    rng = random.Random(vocab + int(scale * 10))
    torch.manual_seed(rng.randrange(1000))
    wrong = total = 0
    for _ in range(30):
        requests = [random_request(rng, vocab) for _ in range(rng.randint(1, 12))]
        logits = torch.randn(len(requests), vocab) * scale
        expected = [reference(row.double().numpy(), r) for row, r in zip(logits, requests, strict=True)]
        wrong += sum(a != b for a, b in zip(sample(logits, requests), expected, strict=True))
        total += len(requests)
    # float32 may put a token at a boundary on its other side.
    assert wrong <= total // 100


def test_a_row_samples_the_same_alone_and_in_any_batch() -> None:
    rng = random.Random(3)
    torch.manual_seed(3)
    requests = [random_request(rng, 2000) for _ in range(24)]
    logits = torch.randn(24, 2000) * 3
    together = sample(logits, requests)
    alone = [sample(logits[i : i + 1], [requests[i]])[0] for i in range(24)]
    order = rng.sample(range(24), 24)
    shuffled = sample(logits[order], [requests[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == shuffled


COMBINATIONS = [
    Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    for temperature, top_k, top_p, min_p, repetition, presence, frequency in itertools.product(
        (0.6, 1.0, 1.6), (0, 6), (1.0, 0.8), (0.0, 0.05), (1.0, 1.4), (0.0, 0.5), (0.0, -0.3)
    )
]


def test_draws_follow_the_reference_for_every_combination() -> None:
    """Chi-square over 20,000 draws of each, all combinations in one batch."""
    torch.manual_seed(4)
    vocab, seeds, positions = 25, 200, 100
    row = torch.randn(vocab) * 2
    prompt, output = [3, 8, 8, 11], [8, 20, 20, 20, 4]
    requests = [
        (prompt, output, msgspec.structs.replace(sampling, seed=1000 * i + seed))
        for i, sampling in enumerate(COMBINATIONS)
        for seed in range(seeds)
    ]
    slots, batch = admitted(requests)
    sampler, logits = Sampler(CPU), row.expand(len(requests), -1)
    counts = np.zeros((len(COMBINATIONS), vocab), np.int64)
    which = np.repeat(np.arange(len(COMBINATIONS)), seeds)
    for position in range(positions):
        # The noise of another position; what was generated so far stays the same.
        there = replace(batch, ends=batch.ends + position, changed=position == 0)
        tokens = sampler.sample(logits.clone(), slots, there).tokens.numpy()
        np.add.at(counts, (which, tokens), 1)
    for sampling, found in zip(COMBINATIONS, counts, strict=True):
        scores = survivors(row.double().numpy(), (prompt, output, sampling))
        wanted = np.exp(scores - scores.max())
        expected = seeds * positions * wanted / wanted.sum()
        assert found[expected == 0].sum() == 0, sampling
        # Of cells with few draws the distribution is another one.
        large = expected >= 5
        found_cells = np.append(found[large], found[~large].sum())
        cells = np.append(expected[large], expected[~large].sum())
        kept = cells > 0
        statistic = ((found_cells - cells)[kept] ** 2 / cells[kept]).sum()
        freedom = max(kept.sum() - 1, 1)
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (sampling, statistic, freedom)


def kept(scores: list[float], top_k: int = 0, top_p: float = 1.0, repeat: int = 1) -> list[int]:
    """Which of the scores stay; `repeat` pads with impossible tokens, so that the short look is taken."""
    padded = torch.tensor([scores + [-3e38] * (len(scores) * (repeat - 1))])
    nucleus = Nucleus.of(np.array([top_k]), np.array([top_p]), CPU)
    stay, ids, complete = keep_likeliest(padded, nucleus)
    everything = keep_of_all(padded.clone(), nucleus)[0]
    alive = sorted((everything > -torch.inf).nonzero().flatten().tolist())
    if complete.all():
        assert sorted(ids[stay > -torch.inf].tolist()) == alive
    return alive


@pytest.mark.parametrize("repeat", [1, 400])
def test_boundaries_of_top_k_and_top_p(repeat: int) -> None:
    quarter, eighth = float(np.log(0.25)), float(np.log(0.125))
    scores = [eighth, quarter, eighth, float(np.log(0.5))]
    assert kept(scores, top_k=1, repeat=repeat) == [3]
    assert kept(scores, top_k=3, repeat=repeat) == [0, 1, 2, 3]  # the third and fourth tie: both stay
    assert kept(scores, top_p=0.5, repeat=repeat) == [3]  # reached exactly: the next is out
    assert kept(scores, top_p=0.51, repeat=repeat) == [1, 3]
    assert kept(scores, top_p=0.8, repeat=repeat) == [0, 1, 2, 3]  # the last of the run ties
    assert kept(scores, top_p=1e-9, repeat=repeat) == [3]
    # top_p counts within what top_k left: 0.5 of 0.75 is 0.667
    assert kept(scores, top_k=2, top_p=0.66, repeat=repeat) == [3]
    assert kept(scores, top_k=2, top_p=0.67, repeat=repeat) == [1, 3]


def test_a_flat_distribution_falls_back_to_the_sort() -> None:
    torch.manual_seed(5)
    scores = torch.randn(1, 8000) * 0.01
    nucleus = Nucleus.of(np.array([0]), np.array([0.5]), CPU)
    assert not keep_likeliest(scores, nucleus)[2].any()
    stay = keep_of_all(scores.clone(), nucleus)
    alive = stay[0] > -torch.inf
    assert 3900 < int(alive.sum()) < 4000
    probabilities = scores[0].double().softmax(0)
    assert probabilities[alive].sum() >= 0.5
    assert probabilities[alive].sum() - probabilities[alive].min() < 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_rows_without_numbers_yield_a_defined_token(value: float, temperature: float) -> None:
    good: Prompt = ([1], [], Sampling(temperature=temperature, seed=3))
    filtered = Sampling(temperature=temperature, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2)
    requests = [good, ([1], [], Sampling(temperature=temperature)), ([1], [2], filtered)]
    torch.manual_seed(6)
    logits = torch.randn(3, 400)
    logits[1:] = value
    tokens = sample(logits, requests)
    assert tokens == sample(logits, requests)
    assert all(0 <= token < 400 for token in tokens)
    assert tokens[0] == sample(logits[:1], [good])[0]


def test_a_nan_among_numbers_is_not_drawn() -> None:
    logits = torch.zeros(50, 4)
    logits[:, 1] = torch.nan
    tokens = sample(logits, [([1], [], Sampling(seed=i)) for i in range(50)])
    assert set(tokens) == {0, 2, 3}


def test_min_tokens_counts_generated_tokens() -> None:
    sampling = Sampling(temperature=0.0, min_tokens=2, eos_token_id=0, stop_token_ids=[1, 99])
    logits = torch.tensor([[3.0, 2.0, 1.0]]).expand(3, -1)
    requests = [([2], [], sampling), ([2], [2], sampling), ([2], [2, 2], sampling)]
    assert sample(logits, requests) == [2, 2, 0]


def test_a_prompt_that_ends_joins_the_rows_that_sample() -> None:
    """No slot is new then: only which rows sample differs."""
    slots = Slots(2, 16, 16, 4)
    admits = [
        Admit(0, pack([1]), 1, 0, pack([0]), Sampling(temperature=0)),
        Admit(1, pack([1, 2, 3, 4]), 4, 0, pack([1]), Sampling(allowed_token_ids=pack([2]))),
    ]
    sampler, logits = Sampler(CPU), torch.eye(8)
    first = slots.apply(StepPlan(0, b"", admits, b"", pack([1, 0]), pack([2, 1])))
    tokens = sampler.sample(logits[[5]].clone(), slots, first).tokens
    assert tokens.tolist() == [5]
    slots.commit(first, tokens.numpy())
    second = slots.apply(StepPlan(1, b"", [], b"", None, pack([2, 1])))
    assert not second.changed
    assert sampler.sample(logits[[6, 7]].clone(), slots, second).tokens.tolist() == [2, 7]


def test_steps_in_a_row_need_no_new_description() -> None:
    """The same rows again: parameters come from the cache, positions move on."""
    torch.manual_seed(7)
    slots, sampler = Slots(2, 64, 16, 16), Sampler(CPU)
    requests = [Sampling(temperature=0.0), Sampling(seed=9, top_k=50)]
    admitted = [Admit(i, pack([1]), 1, 0, pack([i, i + 2]), s) for i, s in enumerate(requests)]
    plan = StepPlan(0, b"", admitted, b"", pack([0, 1]), pack([1, 1]))
    outputs: list[list[int]] = [[], []]
    for step in range(20):
        batch = slots.apply(plan)
        logits = torch.randn(2, 500)
        expected = [reference(logits[i].double().numpy(), ([1], outputs[i], requests[i])) for i in range(2)]
        tokens = sampler.sample(logits, slots, batch).tokens
        assert tokens.tolist() == expected
        slots.commit(batch, tokens.numpy().astype(np.int32))
        for output, token in zip(outputs, expected, strict=True):
            output.append(token)
        plan = StepPlan(step + 1, b"", [], b"", None, None)


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_logprobs_are_of_the_scores_that_the_mode_names(mode: LogprobsMode) -> None:
    rng = random.Random(9)
    torch.manual_seed(9)
    requests = [random_request(rng, 60) for _ in range(40)]
    requests = [
        (prompt, output, msgspec.structs.replace(sampling, logprobs=rng.choice([None, 0, 60])))
        for prompt, output, sampling in requests
    ]
    logits = torch.randn(len(requests), 60) * 2
    sampled = Sampler(CPU, mode).sample(logits.clone(), *admitted(requests))
    seen: dict[int, dict[int, float]] = {}
    for part in sampled.logprobs:
        for row, tokens, values in zip(part.rows, part.token_ids, part.values, strict=True):
            assert int(tokens[0]) == int(sampled.tokens[row])
            seen[int(row)] = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    assert set(seen) == {row for row, each in enumerate(requests) if each[2].logprobs is not None}
    for row, found in seen.items():
        scores = logits[row].double().numpy()
        if mode.startswith("processed"):
            scores = survivors(scores, requests[row])
        if mode.endswith("logprobs"):
            scores = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
        expected = [scores[token] for token in found]
        np.testing.assert_allclose(list(found.values()), expected, atol=1e-4)
