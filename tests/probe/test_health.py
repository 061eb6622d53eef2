"""Each fault is planted in a model of which nothing else is wrong, and found; a healthy one passes."""

from dataclasses import dataclass, replace

import pytest
import soundfile
import torch

from pal.backbone.cost import AddedCost
from pal.backbone.stream_kv import Layout
from pal.data.manifest import Record, Turn
from pal.errors import PalError
from pal.evaluate.answerer import evaluation_mode
from pal.integrations.cost import route_cost
from pal.integrations.hybrid import PAL
from pal.integrations.lal import LAL
from pal.probe.health import probe_health, swapped
from pal.probe.layout_checks import layout_checks
from pal.registry import names
from pal.types import EncodedClip
from tests.models import noise, tiny_model, tone


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for i in range(6):
        path = folder / f"{i}.wav"
        samples = noise(0.9, i) if i % 2 else tone(0.7, 200.0 + 150 * i)
        soundfile.write(path, samples.numpy(), 16_000)
        for j, (question, choices) in enumerate((("Is there a bell?", ("yes", "no")), ("first?", ("dog", "bell")))):
            task = "presence" if j == 0 else "order"
            found.append(Record(f"{i}-{j}", (str(path),), (Turn(question, choices[i % 2]),), task, "synth", choices))
    return found


def status(model, records):
    result = probe_health(model, records, batch=8)
    return {row["check"]: (row["status"], row["measured"]) for row in result.tables["checks"]}


def layout(model, records):
    """The checks of how audio is laid out alone, which ask nothing."""
    with evaluation_mode(model):
        return {check.name: (check.status, check.measured) for check in layout_checks(model, records[0])}


STRUCTURE = (
    "audio in the feed-forward networks",
    "memory",
    "order of summary tokens and keys",
    "gaps in the positions",
    "decoding",
)


@pytest.mark.parametrize("name", [name for name in names("integration") if name != "pal_routed"])
def test_nothing_is_wrong_with_how_audio_is_laid_out(name, records):
    model = tiny_model({"name": name, "every": 1} if name == "flamingo" else name)
    # the whole of it where audio enters by both ways in, or by none of them
    found = status(model, records) if name in ("pal", "flamingo") else layout(model, records)
    for check in STRUCTURE:
        # gates at zero or weights this small may leave a checked quantity at its closed form only roughly
        assert found[check][0] in ("ok", "does not apply"), (check, found[check])
    assert (found["order of summary tokens and keys"][0] == "ok") == (name == "pal")


def with_route(model, route_class, **changes):
    """The model with a route of another class and the same weights."""
    route = model.integration
    route.__class__ = route_class
    for key, value in changes.items():
        setattr(route, key, value)
    return model


class Leaking(LAL):
    """Hands its first token on as a row too, and does not say so."""

    def inject(self, features, llm):
        spans = super().inject(features, llm)
        rows_USD = features.x_BAE[..., :1].expand(-1, -1, llm.width)
        return replace(spans, rows_USD=rows_USD, layout=Layout(spans.layout.seconds_per_token, rows=1))


class Saying(Leaking):
    """The same, and says so."""


@route_cost.register(Saying)
def _(route, step, tokens, llm):
    return replace(route_cost.dispatch(LAL)(route, step, tokens, llm), rows=tokens)


def test_audio_rows_in_the_feed_forward_networks_are_counted(records):
    found = layout(with_route(tiny_model("lal"), Leaking), records)
    kind, measured = found["audio in the feed-forward networks"]
    assert kind == "fault" and "layer 0" in measured and "its cost model has 0" in measured
    assert layout(with_route(tiny_model("lal"), Saying), records)["audio in the feed-forward networks"][0] == "ok"


class Forgetful(LAL):
    """Says that it keeps nothing."""


@route_cost.register(Forgetful)
def _(route, step, tokens, llm):
    return AddedCost()


def test_memory_that_is_not_on_paper_is_seen(records):
    assert layout(with_route(tiny_model("lal"), Forgetful), records)["memory"][0] == "warning"


@dataclass(frozen=True)
class Early(Layout):
    """Summaries before the tokens they sum up."""

    def row_offsets(self, tokens):
        return super().row_offsets(tokens) - self.tokens

    def key_offsets(self, tokens):
        return super().key_offsets(tokens) + 1


class Disordered(PAL):
    def inject(self, features, llm):
        spans = super().inject(features, llm)
        return replace(spans, layout=Early(**vars(spans.layout)))


def test_summaries_out_of_order_are_seen(records):
    kind, measured = layout(with_route(tiny_model("pal"), Disordered), records)["order of summary tokens and keys"]
    assert kind == "fault" and not measured.startswith("0 of")


@dataclass(frozen=True)
class Gapless(Layout):
    """Reserves no positions."""

    def reserved(self, tokens):
        return 0


class Crowded(LAL):
    def inject(self, features, llm):
        spans = super().inject(features, llm)
        return replace(spans, layout=Gapless(**vars(spans.layout)))


@dataclass(frozen=True)
class Wide(Layout):
    """Reserves more than it fills."""

    def reserved(self, tokens):
        return 2 * tokens


class Loose(LAL):
    def inject(self, features, llm):
        spans = super().inject(features, llm)
        return replace(spans, layout=Wide(**vars(spans.layout)))


@pytest.mark.parametrize("name", ["lal", "pal", "lal_audio_query"])
def test_clips_may_share_positions_with_the_text(name, records):
    found = layout(tiny_model({"name": name, "gate": -1.0, "positions": "shared"}), records)
    assert found["gaps in the positions"][0] == "ok"
    assert found["order of summary tokens and keys"][0] == ("ok" if name == "pal" else "does not apply")


@dataclass(frozen=True)
class Crushed(Layout):
    """More keys at a position than it says."""

    def key_rope_positions(self, tokens, start, earlier=0):
        return start + self.key_offsets(tokens) // (2 * self.per_position)


class Crushing(LAL):
    def inject(self, features, llm):
        spans = super().inject(features, llm)
        return replace(spans, layout=Crushed(**vars(spans.layout)))


@dataclass(frozen=True)
class Backwards(Layout):
    """The last key first."""

    def key_rope_positions(self, tokens, start, earlier=0):
        return super().key_rope_positions(tokens, start, earlier)[::-1]


class Turning(LAL):
    def inject(self, features, llm):
        spans = super().inject(features, llm)
        return replace(spans, layout=Backwards(**vars(spans.layout)))


@pytest.mark.parametrize("name", ["lal", "pal"])
def test_tokens_may_share_positions(name, records):
    model = tiny_model({"name": name, "tokens_per_position": 4})
    assert layout(model, records)["gaps in the positions"][0] == "ok"


@pytest.mark.parametrize("pace", [1, 4])
@pytest.mark.parametrize(("route", "says"), [(Crushing, "do not rise"), (Turning, "do not rise")])
def test_keys_that_do_not_rise_are_seen(route, says, pace, records):
    model = with_route(tiny_model({"name": "lal", "tokens_per_position": pace}), route)
    kind, measured = layout(model, records)["gaps in the positions"]
    assert kind == "fault" and says in measured


@pytest.mark.parametrize(("route", "says"), [(Crowded, "audio tokens"), (Loose, "positions free")])
def test_missing_gaps_are_seen(route, says, records):
    kind, measured = layout(with_route(tiny_model("lal"), route), records)["gaps in the positions"]
    assert kind == "fault" and says in measured


def test_a_model_whose_audio_is_always_the_same_ignores_it_and_is_deaf(records):
    model = tiny_model("lal")
    with torch.no_grad():
        for projector in model.integration.projectors.values():
            projector[-1].weight.zero_()
    found = status(model, records)
    assert found["attention ignores audio"][0] == "fault"
    assert found["answers ignore audio"][0] == "fault"
    assert found["gaps in the positions"][0] == "ok"


def test_one_layer_that_ignores_audio_is_named(records):
    model = tiny_model("lal")
    with torch.no_grad():
        model.integration.projectors["1"][-1].weight.zero_()
    kind, measured = status(model, records)["attention ignores audio"]
    assert kind == "warning" and measured.endswith("not layers [1]")


class Scripted:
    """Answers by a rule in place of generation."""

    def __init__(self, model, rule):
        self.model, self.rule = model, rule

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, clips, rows, max_new_tokens, **options):
        return [self.rule(max((float(clips[i].x_AE[0]) for i in row.clips), default=0.0)) for row in rows]

    def encode_clip(self, samples_N):
        return EncodedClip((samples_N.abs().max()[None, None],), len(samples_N) / 16_000)


def test_a_model_that_says_yes_to_silence_is_over_eager(records):
    eager = status(Scripted(tiny_model("lal"), lambda heard: "yes"), records)
    assert eager["over-eager"][0] == "warning" and "yes to 100% of 6" in eager["over-eager"][1]
    assert eager["answers ignore audio"][0] == "fault"
    # loud is yes: right by ear, and no to silence
    hearing = status(Scripted(tiny_model("lal"), lambda heard: "yes" if heard > 0.1 else "no"), records)
    assert "yes to 0% of 6" in hearing["over-eager"][1]


def test_swapping_gives_every_question_another_clip(records):
    other = swapped(records)
    assert all(a.clips != b.clips and a.turns == b.turns for a, b in zip(records, other, strict=True))
    by_clip = {a.clips: {b.clips for x, b in zip(records, other, strict=True) if x.clips == a.clips} for a in records}
    assert all(len(to) == 1 for to in by_clip.values())


def test_one_clip_is_too_few(records):
    with pytest.raises(PalError, match="at least two"):
        probe_health(tiny_model("lal"), records[:2])
