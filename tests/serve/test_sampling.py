"""Sampled tokens and log-probabilities against the distribution that they are of."""

from collections import Counter

import pytest
import torch

from pal.serve.sampling import SamplingOptions, TokenSampler, token_logprob

P = [0.45, 0.3, 0.15, 0.1]
DRAWS = 1000


def drawn(**options):
    sampler = TokenSampler(SamplingOptions(seed=1, **options), 0, torch.device("cpu"))
    logits_V = torch.tensor(P).log()
    return Counter(sampler.choose(logits_V) for _ in range(DRAWS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.6, 0.3])
def test_tokens_are_as_frequent_as_the_options_say(temperature, top_p):
    weights = [p ** (1 / temperature) for p in P]
    expected, below = [], 0.0
    for weight in weights:  # the fewest most likely tokens that reach top_p together
        expected.append(weight if below < top_p else 0.0)
        below += weight / sum(weights)
    counts = drawn(temperature=temperature, top_p=top_p)
    for token, weight in enumerate(expected):
        assert counts[token] / DRAWS == pytest.approx(weight / sum(expected), abs=0.05)
        assert weight or not counts[token]


def test_a_log_probability_is_that_of_the_token():
    logits_V = torch.tensor(P).log() + 3.0
    for token, p in enumerate(P):
        made = token_logprob(logits_V, token, 2)
        assert made.token == token and made.logprob == pytest.approx(torch.tensor(p).log().item(), abs=1e-5)
        assert [one for one, _ in made.top] == [0, 1]
