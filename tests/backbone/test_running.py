"""Sequences that join and leave a running batch get the tokens and logits that each gets alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.backbone import running_storage
from pal.backbone.running import RunningBatch, read, read_after
from pal.registry import names
from pal.types import AUDIO, Tokens
from tests.backbone.generating import GREEDY, Watch
from tests.identities.models import CROSSED, INTEGRATIONS, PLACEMENTS, features, shared
from tests.identities.test_streams import ENSEMBLES
from tests.identities.test_streams import shared as ensemble

CLIPS = (7, 11, 3)
WAYS = ("alone", "together", "in_place", "after", "whole", "after_whole")
NEW = 6


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    monkeypatch.setattr(running_storage, "LEAST", 3)  # so that the storage grows


def prompts(family, seed, count=7):
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ids = list(draw.choice(list(PLACEMENTS.values())))
        more = [draw.randrange(3, 48) for _ in range(draw.randrange(8))]
        found.append(Tokens([*ids, *more], [draw.randrange(len(CLIPS)) for _ in range(ids.count(AUDIO))]))
    return found


def heard(integration):
    """Clips as each of the integration's encoders hears them."""
    several = getattr(integration, "streams", None) is not None and len(integration.streams) > 1
    return [features(*CLIPS, seed=4), features(*(2 * n + 1 for n in CLIPS), seed=5)] if several else features(*CLIPS)


def alone(llm, integration, row):
    watch = Watch(read_only=True)
    asked = {**GREEDY, "max_new_tokens": NEW, "logits_processor": [watch]}
    made = llm.generate(integration(heard(integration), [row], llm, "left"), **asked)
    return made[0].tolist(), torch.stack([logits[0] for _, logits in watch.seen])


class Decoder:
    """Greedy search over a `RunningBatch`."""

    def __init__(self, llm, integration):
        self.llm, self.integration = llm, integration
        self.batch = RunningBatch(llm)
        self.rows, self.said, self.logits = [], {}, {}

    def prompt(self, *rows):
        return read(self.llm, self.integration(heard(self.integration), list(rows), self.llm, "left"))

    def begin(self, which, row, logits_V):
        assert row == len(self.rows)
        self.rows.append(which)
        self.said[which], self.logits[which] = [int(logits_V.argmax())], [logits_V]

    def step(self):
        logits_RV = self.batch.step([self.said[which][-1] for which in self.rows])
        for which, logits_V in zip(self.rows, logits_RV, strict=True):
            self.said[which].append(int(logits_V.argmax()))
            self.logits[which].append(logits_V)

    def leave(self, row):
        self.batch.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()


def run(llm, integration, given, seed):
    """Join in random groups and ways, at random steps; leave after NEW tokens."""
    draw, decoder = random.Random(seed), Decoder(llm, integration)
    waiting = list(range(len(given)))
    while waiting or decoder.rows:
        if waiting and draw.random() < 0.6:
            way = draw.choice(WAYS if not any(llm.windows) else WAYS[:2])
            some = [waiting.pop(0) for _ in range(min(len(waiting), draw.randrange(1, 4) if way == "together" else 1))]
            row = given[some[0]]
            cut = len(row.ids) - row.ids[::-1].index(AUDIO) if row.clips else 1
            others = [Tokens([5, AUDIO], [1]), Tokens(row.ids[:cut], row.clips)]
            parted = cut < len(row.ids) and set(row.ids[:cut]) > {AUDIO}
            if way == "after" and parted:
                first = [decoder.prompt(other) for other in others]
                made = read_after(llm, first, [[[9, 9, 9, 9]], [[7], row.ids[cut:]]])
                decoder.begin(some[0], decoder.batch.join_after(made, 2), made.logits_RV[2])
            elif way == "whole" and parted:  # beside a shorter and a longer prompt
                made = decoder.prompt(Tokens([5, 6], []), row, Tokens([*row.ids, 9, 8, 7], row.clips))
                rest = made.beginning(1, len(row.ids) - cut)
                decoder.begin(some[0], decoder.batch.join_whole(made, 1, rest), made.logits_BV[1])
            elif way == "after_whole" and parted and row.clips:
                made = decoder.prompt(Tokens([*row.ids[:cut], 9, 9], row.clips), Tokens([5, AUDIO, 6, 6, 6, 6, 6], [1]))
                first = [made.beginning(0, 2), made.beginning(1, 5)]
                made = read_after(llm, first, [[[7], row.ids[cut:]], [[9, 9, 9, 9]]])
                decoder.begin(some[0], decoder.batch.join_after(made, 1), made.logits_RV[1])
            else:
                made = decoder.prompt(*(given[which] for which in some))
                for at, which in enumerate(some):
                    decoder.begin(which, decoder.batch.join(made, at, way == "in_place"), made.logits_BV[at])
        elif decoder.rows:
            decoder.step()
        for row in reversed(range(len(decoder.rows))):
            if len(decoder.said[decoder.rows[row]]) == NEW:
                decoder.leave(row)
    return decoder


def check(family, name, seed, make=shared):
    llm, integration = make(family, name)
    given = prompts(family, seed)
    decoder = run(llm, integration, given, seed)
    for which, row in enumerate(given):
        said, logits = alone(llm, integration, row)
        assert decoder.said[which] == said
        torch.testing.assert_close(torch.stack(decoder.logits[which]), logits, atol=1e-4, rtol=1e-4)
    assert len(decoder.batch) == 0


@pytest.mark.covering(1)
@pytest.mark.parametrize(("family", "name"), CROSSED)
def test_each_sequence_gets_what_it_gets_alone(family, name):
    check(family, name, seed=3)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_each_sequence_of_an_ensemble_gets_what_it_gets_alone(name):
    check("llama", name, 3, ensemble)


def test_every_integration_is_there():
    tried = {one if isinstance(one, str) else one["name"] for one in (*INTEGRATIONS.values(), *ENSEMBLES.values())}
    assert tried == set(names("integration"))


@given(
    name=st.sampled_from(sorted(INTEGRATIONS)), family=st.sampled_from(["llama", "mistral"]), seed=st.integers(0, 99)
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_for_any_arrivals(family, name, seed):
    check(family, name, seed)


def test_samples_of_one_prompt_share_its_keys():
    llm, integration = shared("llama", "pal")
    decoder = Decoder(llm, integration)
    row = Tokens(PLACEMENTS["middle"], [0])
    read_once = decoder.prompt(row)
    for which in range(3):
        decoder.begin(which, decoder.batch.join(read_once, 0, in_place=True), read_once.logits_BV[0])
    assert [rows for _, rows in decoder.batch.shared()] == [[0, 1, 2]]
    copies = RunningBatch(llm)
    for _ in range(3):
        copies.join(read_once, 0)
    assert decoder.batch.nbytes * 3 < copies.nbytes
    for _ in range(2):
        decoder.step()
    assert decoder.said[0] == decoder.said[1] == decoder.said[2] == alone(llm, integration, row)[0][:3]


@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("name", ["plits", "lal", "pal_gated", "flamingo"])
def test_a_beginning_of_a_prompt_holds_what_one_that_is_read_alone_holds(name, side):
    llm, integration = shared("llama", name)
    decoder = Decoder(llm, integration)
    both = [Tokens([5, 6, AUDIO, 7, 8, 9, 9, 9], [1]), Tokens([5, 6, 6, AUDIO, 7, 8], [0])]
    whole = read(llm, integration(features(*CLIPS), both, llm, side))
    apart = decoder.prompt(Tokens([5, 6, 6, AUDIO], [0]))
    beginning = whole.beginning(1, 2)
    assert (len(beginning), beginning.last) == (1, apart.last)
    assert beginning.nbytes <= apart.nbytes < whole.nbytes
    batches = [RunningBatch(llm), RunningBatch(llm)]
    for batch, one in zip(batches, (beginning, apart), strict=True):
        batch.join(one, 0)
    torch.testing.assert_close(batches[0].step([7]), batches[1].step([7]), atol=1e-5, rtol=1e-5)
    whole.cache.stores[0].keys.zero_()  # memory of its own
    assert bool(beginning.cache.stores[0].keys.any())


def test_rows_without_audio_pass_no_cross_attention():
    llm, integration = shared("llama", "flamingo")
    decoder = Decoder(llm, integration)
    given = [Tokens(PLACEMENTS["middle"], [0]), *[Tokens([5, 6, 7, n], []) for n in range(8, 13)]]
    for which, row in enumerate(given):
        made = decoder.prompt(row)
        decoder.begin(which, decoder.batch.join(made, 0), made.logits_BV[0])
    decoder.step()
    decoder.leave(1)
    decoder.step()
    for which in (0, 2, 3, 4, 5):
        assert decoder.said[which] == alone(llm, integration, given[which])[0][:3]
