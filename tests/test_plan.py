"""Plans: parameters equal those of the model that is built, FLOPs and memory what is counted while it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pal.app.cli import app
from pal.backbone.cost import AddedCost, Cost, StepSize, decoder, kv_bytes
from pal.backbone.tokenizer import train_tokenizer
from pal.bench.flops import flop_counter
from pal.bench.measure import saved_bytes
from pal.config import parse
from pal.errors import ConfigError, PalError
from pal.integrations.base import Route
from pal.integrations.cost import route_cost
from pal.model import PalModel
from pal.model_config import ModelConfig
from pal.plan import plan
from pal.plan.estimate import ANSWER_SHARE, StagePlan
from pal.plan.gpus import GPUS
from pal.plan.skeleton import skeleton
from pal.train.recipe import Recipe
from pal.train.stages import freeze, set_modes
from pal.types import AUDIO, IGNORE, Batch, Tokens

ROOT = Path(__file__).parents[1]

LLM = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 320,
}
WHISPER = {
    "name": "whisper",
    "architecture": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "max_source_positions": 100,
    },
}
INTEGRATIONS: dict[str, Any] = {
    "plits": "plits",
    "lal": "lal",
    "lal, first third": {"name": "lal", "layers": "first_third", "hidden": 40},
    "lal, last half": {"name": "lal", "layers": {"last": 0.5}, "projector": "low_rank", "rank": 8},
    "lal, shared": {"name": "lal", "shared": True, "depth": 3},
    "pal": "pal",
    "flamingo": {"name": "flamingo", "every": 2},
    "lal_audio_query": "lal_audio_query",
    "lal_audio_query, two": {"name": "lal_audio_query", "layers": [1, 3]},
}
STAGES: dict[str, dict[str, Any]] = {
    "connector": {"train": {"connector": True, "projectors": True}},
    "projectors": {"train": {"projectors": True}},
    "all": {"train": {"encoder": True, "connector": True, "projectors": True, "llm": "full"}},
    "llm": {"train": {"llm": "full"}},
    "attention": {"train": {"connector": True, "projectors": True, "llm": "attention"}},
    "no_ffn": {"train": {"connector": True, "projectors": True, "llm": "no_ffn"}},
    "lora": {"train": {"connector": True, "projectors": True, "llm": "lora", "lora": {"dropout": 0}}},
}
VARIANTS = {"lal, first third", "lal, last half", "lal, shared", "lal_audio_query, two"}
"""Options of integrations that `INTEGRATIONS` has as they are by default too."""
EACH_STAGE = [
    pytest.param(integration, stage, id=f"{name}-{stage}")
    for name, integration in INTEGRATIONS.items()
    for stage in (("connector", "all") if name in VARIANTS else STAGES)
]
EACH_ONCE = [
    pytest.param(integration, ("connector", "all", "lora")[i % 3], id=name)
    for i, (name, integration) in enumerate(INTEGRATIONS.items())
]
"""Each integration with one of three stages, for what changes a stage's cost in one way for all integrations."""
SECONDS = 2.0
TEXT = 64


def recipe(integration: Any = "lal", stage: Any = None, llm: Any = None, **model: Any) -> Recipe:
    stage = {"lr": 1e-3, "steps": 10, "batch": {"rows": 2}} | (stage or STAGES["connector"])
    fields = {"llm": {"fresh": LLM | (llm or {})}, "encoders": [WHISPER], "integration": integration, **model}
    return Recipe(model=fields, data={"x": {"manifest": "x"}}, stages=[stage])


def built(recipe: Recipe) -> PalModel:
    """The model of a recipe with weights."""
    assert recipe.model is not None
    torch.manual_seed(0)
    return PalModel.from_config(recipe.model, train_tokenizer(["What is this?"], 280)).eval()


def batch_of(model: PalModel, clips: int = 2) -> Batch:
    """A clip of `SECONDS` for each of the conversations, of `TEXT` tokens after it."""
    generator = torch.Generator().manual_seed(0)
    samples = round(SECONDS * model.sampling_rate)
    waves = [0.1 * torch.randn(samples, generator=generator) for _ in range(clips)]
    ids = torch.randint(5, 280, (TEXT,), generator=generator).tolist()
    answer = round(ANSWER_SHARE * TEXT)
    labels = [IGNORE] * (TEXT + 1 - answer) + ids[-answer:]
    return Batch(waves, [Tokens([AUDIO, *ids], [i], labels) for i in range(clips)])


def prepared(recipe: Recipe) -> tuple[PalModel, Batch]:
    model, stage = built(recipe), recipe.stages[0]
    freeze(model, stage.train)
    model.llm.checkpoint_gradients(stage.gradient_checkpointing, recompute_audio=stage.recompute_audio)
    set_modes(model, stage)
    return model, batch_of(model)


def counted(recipe: Recipe) -> tuple[int, int]:
    """Operations of a step's forward and backward pass, counted while they happen."""
    model, batch = prepared(recipe)
    counter = flop_counter()
    with counter:
        loss = model.loss(batch).sum
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def planned(recipe: Recipe) -> StagePlan:
    return plan(recipe, seconds=SECONDS, text_tokens=TEXT).stages[0]


UNFUSED = 2 * 2 * 2 * 100 * 100 * 32
"""Operations of one product in the attention of the 2 layers of `WHISPER`, for 2 clips. The plan counts encoders on the
meta device, where attention is not fused: its backward pass has four products, and not five."""


def assert_counted(recipe: Recipe) -> None:
    """A plan has exactly the operations that are counted."""
    forward, backward = counted(recipe)
    made = planned(recipe)
    assert made.forward == forward
    assert made.backward == backward - UNFUSED * recipe.stages[0].train.encoder


def within(ours: float, theirs: float, share: float) -> None:
    assert ours == pytest.approx(theirs, rel=share), f"{ours:.4g}, not {theirs:.4g}: {ours / theirs - 1:+.1%}"


@pytest.mark.covering(1)
@pytest.mark.parametrize(("integration", "stage"), EACH_STAGE)
def test_flops(integration: Any, stage: str) -> None:
    assert_counted(recipe(integration, STAGES[stage]))


@pytest.mark.parametrize(("integration", "stage"), EACH_ONCE)
def test_flops_with_gradient_checkpointing(integration: Any, stage: str) -> None:
    assert_counted(recipe(integration, {**STAGES[stage], "gradient_checkpointing": True}))


@pytest.mark.parametrize("stage", ["connector", "all"])
def test_flops_of_several_encoders(stage: str) -> None:
    tiny = {"name": "tiny", "width": 16, "channels": [4, 4, 8, 8], "blocks": 1}
    one = recipe(
        {"name": "pal_routed", "routes": {"whisper": "plits"}, "default": "lal"},
        STAGES[stage],
        encoders=[WHISPER, tiny, {**tiny, "width": 24}],
        connector=[
            {"name": "strided_conv", "stride": 5, "encoders": [0]},
            {"name": "lfst", "width": 32, "encoders": [1, 2]},
        ],
    )
    forward, backward = counted(one)
    made = planned(one)
    assert made.audio_tokens == [20, 7]
    # counted in the plan, but not seen: the keys of the second stream by the rows of the first, which lie before them
    within(made.forward, forward, share=0.007)
    within(made.backward, backward, share=0.007)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma", "gemma3_text", "mistral"])
def test_flops_of_families(kind: str) -> None:
    for stage in ("connector", "all"):
        assert_counted(recipe("pal", STAGES[stage], llm={"model_type": kind}))


def about_shared_clips(model: PalModel, before: int) -> Batch:
    """Three conversations about each of two clips, which begin alike."""
    clips = batch_of(model)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for clip in (0, 0, 0, 1, 1, 1):
        ids = torch.randint(5, 280, (TEXT - before,), generator=generator).tolist()
        labels = [IGNORE] * (TEXT + 1 - round(ANSWER_SHARE * TEXT)) + ids[-round(ANSWER_SHARE * TEXT) :]
        rows.append(Tokens([*range(5, 5 + before), AUDIO, *ids], [clip], labels))
    return Batch(clips.waveforms, rows)


SHARING = {"clips": 2, "rows_per_clip": 3, "turns": 1}


@pytest.mark.parametrize("integration", ["plits", "lal", "pal", "flamingo"])
def test_questions_about_one_clip_run_its_rows_once(integration: str) -> None:
    made = recipe(integration, {**STAGES["connector"], "batch": SHARING})
    model, _ = prepared(made)
    one = planned(made)
    with flop_counter() as counter:
        loss = model.loss(about_shared_clips(model, before=0)).sum
        forward = counter.get_total_flops()
        loss.backward()
    assert one.forward == forward
    within(one.backward, counter.get_total_flops() - forward, share=0.003)  # exact but for the hybrid
    batch = about_shared_clips(model, before=2)
    saved = saved_bytes(lambda: model.loss(batch).sum, [*model.parameters(), *model.buffers()])
    # the plan knows of no text before a clip, and counts 2 rows more for two of three conversations
    within(one.memory.activations, saved, share=0.035)
    model.llm.shares_prefixes = False
    with flop_counter() as apart:
        model.loss(about_shared_clips(model, before=0))
    assert (apart.get_total_flops() > 1.2 * forward) == (integration in ("plits", "pal"))


def test_flops_of_objectives_that_leave_parts_out() -> None:
    text = planned(recipe("plits", {"objective": "text", "train": {"llm": "full"}}))
    assert text.costs["encoder"] == text.costs["connector"] == Cost()
    assert text.sequence == TEXT
    tags = planned(recipe("plits", {"objective": "tags", "train": {"encoder": True}}))
    assert tags.costs["llm"] == tags.costs["connector"] == Cost()
    assert tags.backward > tags.forward
    heard = planned(recipe("plits", {"train": {"encoder": True}}))
    assert tags.costs["encoder"].forward == heard.costs["encoder"].forward


KEPT: dict[str, dict[str, Any]] = {
    "all": {"recompute_audio": False},
    "without what makes audio": {"recompute_audio": True},
    "the layers' inputs": {"gradient_checkpointing": True},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("stage", ["connector", "all"])
@pytest.mark.parametrize("integration", ["plits", "lal", "pal", "flamingo", "lal_audio_query"])
def test_kept_activations(integration: str, stage: str) -> None:
    given = {"name": integration, **({"every": 2} if integration == "flamingo" else {})}
    measured, made = [], []
    for kept in KEPT.values():
        one = recipe(given, {**STAGES[stage], **kept})
        model, batch = prepared(one)
        measured.append(saved_bytes(lambda: model.loss(batch).sum, [*model.parameters(), *model.buffers()]))  # noqa: B023
        made.append(planned(one).memory.activations)
    # the encoder is counted on the meta device, where attention is not fused and saves its weights
    within(made[0], measured[0], share=0.1)
    # what is computed again comes on top at the fullest moment, but not before
    assert measured[1] < 1.1 * made[1] and made[1] <= made[0] and measured[2] < made[2] < made[0]
    assert (measured[1] < measured[0]) == (integration in ("lal", "pal", "lal_audio_query"))
    assert (made[1] < made[0]) == (integration in ("lal", "lal_audio_query"))  # the tiny hybrid has a single such layer


@pytest.mark.parametrize(("integration", "stage"), EACH_ONCE)
def test_flops_without_recomputing(integration: Any, stage: str) -> None:
    assert_counted(recipe(integration, {**STAGES[stage], "recompute_audio": False}))


@pytest.mark.parametrize("integration", INTEGRATIONS.values(), ids=INTEGRATIONS)
def test_kv_bytes(integration: Any) -> None:
    one = recipe(integration)
    model = built(one)
    batch = batch_of(model, clips=1)
    index = model.index((batch.waveforms[0].numpy(), model.sampling_rate))
    stored = sum(stream.k_LBGAC.nbytes + stream.v_LBGAC.nbytes for stream in index.streams)
    rows = sum(stream.rows_BSD.shape[1] for stream in index.streams)
    cached = rows * 2 * 4 * LLM["num_hidden_layers"] * LLM["num_key_value_heads"] * LLM["head_dim"]  # type: ignore[operator]
    # half of it: two bytes a number
    made = plan(one, seconds=SECONDS, text_tokens=24, turns=7)
    assert made.kv_bytes == (stored + cached) / 2
    text = 24 * model.llm.n_layers * 2 * model.llm.kv_heads * model.llm.head_width * 2
    assert (made.turns, made.conversation_bytes) == (7, 7 * (made.kv_bytes + text))


def test_closed_forms_by_hand() -> None:
    """One layer of PLITS and of LAL with the LLM frozen, written out."""
    shape = {"num_hidden_layers": 1, "vocab_size": 1024}
    stage = {**STAGES["projectors"], "recompute_audio": False}
    D, F, Wq, Wkv, V, E = 96, 160, 144, 48, 1024, 32
    A, T, N = 100, TEXT, TEXT // 4
    plain, injected = (planned(recipe(name, stage, llm=shape)).costs["llm"] for name in ("plits", "lal"))
    attention, ffn = 2 * D * Wq + 2 * D * Wkv, 3 * D * F
    made = 2 * A * (E * D + D * D)
    forward = 2 * (A + T) * (attention + ffn) + 4 * (A + T) ** 2 * Wq + 2 * N * D * V
    assert plain.forward == 2 * (made + forward)
    # dX everywhere, five products of attention; the projector's two dW and one dX
    backward = 2 * (A + T) * (attention + ffn) + 10 * (A + T) ** 2 * Wq + 2 * N * D * V + made + 2 * A * D * D
    assert plain.backward == 2 * backward
    keys = 2 * A * 2 * D * Wkv
    forward = 2 * T * (attention + ffn) + 4 * T * (A + T) * Wq + 2 * N * D * V
    assert injected.forward == 2 * (made + keys + forward)
    # no gradient goes back through q, k and v of the text, as nothing before the only layer trains
    backward = 2 * T * (D * Wq + ffn) + 10 * T * (A + T) * Wq + 2 * N * D * V + made + 2 * A * D * D + keys
    assert injected.backward == 2 * backward


@pytest.mark.covering(1)
@pytest.mark.parametrize("integration", INTEGRATIONS.values(), ids=INTEGRATIONS)
@pytest.mark.parametrize(
    "connector",
    ["mlp", "qformer", {"name": "strided_conv", "stride": 4}, {"name": "conv_transformer", "layers": 1}],
    ids=str,
)
def test_parameters_are_those_of_the_model(integration: Any, connector: Any) -> None:
    one = recipe(integration, connector=connector)
    with_weights, without = built(one), skeleton(one)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (with_weights, without)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in without.parameters())
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in with_weights.parts().items()}
    assert plan(one, seconds=1).parameters == parts


def test_trained_parameters_of_a_stage() -> None:
    for name, stage in STAGES.items():
        one = recipe("pal", stage)
        model = built(one)
        trained = freeze(model, one.stages[0].train)
        made = planned(one)
        assert made.trained == {part: sum(p.numel() for p in given.values()) for part, given in trained.items()}, name
        assert made.memory.optimizer == 2 * 4 * sum(made.trained.values())
        assert made.memory.gradients == 4 * sum(made.trained.values())


def test_one_pass_of_a_batch() -> None:
    batch = {"rows": 24, "rows_per_clip": 6, "turns": 3, "accumulate": 2}
    made = planned(recipe("plits", {**STAGES["connector"], "batch": batch}))
    # four clips, in two parts of two; six questions of a clip in two conversations of three
    assert (made.clips, made.conversations, made.passes) == (2, 4, 2)
    assert made.sequence == 3 * TEXT + 100
    half = planned(recipe("plits", {**STAGES["connector"], "batch": {**batch, "rows": 12, "accumulate": 1}}))
    assert (made.forward, made.backward) == (2 * half.forward, 2 * half.backward)
    assert made.memory == half.memory
    seconds = planned(recipe("plits", {**STAGES["connector"], "batch": {"seconds": 11, "clips": 9}}))
    assert (seconds.clips, seconds.conversations) == (5, 5)


def test_long_clips_are_windows() -> None:
    rest, short, long = (plan(recipe("lal"), seconds=seconds).stages[0] for seconds in (1.0, 2.0, 7.0))
    assert (rest.audio_tokens, short.audio_tokens, long.audio_tokens) == ([50], [100], [350])
    # three windows of two seconds, and one of a second
    whole, window, second = (one.costs["encoder"].forward for one in (long, short, rest))
    assert whole == 3 * window + second


def test_verdict() -> None:
    one = recipe("plits", {**STAGES["all"], "batch": {"rows": 4096}}).model_dump(mode="json")
    one["model"]["llm"] = "meta-llama/Llama-3.2-1B-Instruct"
    assert not plan(Recipe(**one)).fits
    one["stages"][0]["batch"] = {"rows": 4096, "accumulate": 1024}
    assert plan(Recipe(**one)).fits
    small = plan(Recipe(**one), gpu="t4")
    assert small.gpu.name == "T4" and not small.fits
    # weights, gradients and two moments in float32 alone
    assert small.stages[0].memory.total > 16 * 1_235_814_400
    times = [plan(Recipe(**one), gpu=name).stages[0].seconds for name in ("A100-80", "H100")]
    assert times[0] > times[1]


def test_half_precision_takes_less() -> None:
    full, half = (
        planned(recipe("lal", {**STAGES["connector"], "precision": precision})) for precision in ("fp32", "bf16")
    )
    assert half.memory.activations < full.memory.activations
    assert half.seconds < full.seconds
    assert half.forward == full.forward


def test_an_integration_that_does_not_say() -> None:
    class Silent(Route):
        def inject(self, features: Any, llm: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ConfigError, match=r"Silent has no closed form of its cost; register one with .*route_cost"):
        route_cost(Silent(), StepSize(1, 1, 1, 1), 1, skeleton(recipe()).llm)


def test_nothing_added_is_the_text_alone() -> None:
    llm = skeleton(recipe()).llm
    step = StepSize(clips=1, rows=1, text=8, targets=2)
    assert decoder(llm, step, [AddedCost()]) == decoder(llm, step, [])
    assert decoder(llm, step, []).backward == 0
    assert kv_bytes(llm, [AddedCost()], 2) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm": "nobody/nothing"}, r"the shape of 'nobody/nothing' is not known here.*hf download nobody/nothing"),
        ({"encoders": ["nobody/whisper"]}, "the shape of 'nobody/whisper' is not known here"),
        ({"encoders": ["wisper"]}, "unknown encoder 'wisper'; known: .*whisper"),
        ({"llm": {"fresh": {"model_type": "bert"}}}, "LLM family 'bert' is not supported"),
        ({"integration": "lall"}, "unknown integration 'lall'; known: .*lal"),
    ],
)
def test_faults_are_one_line(change: dict[str, Any], message: str) -> None:
    one = recipe().model_dump(mode="json")
    one["model"] = parse(ModelConfig, {**one["model"], **change}, where="test").model_dump(mode="json")
    with pytest.raises(PalError, match=message) as caught:
        plan(Recipe(**one))
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe().model_dump(mode="json", exclude_defaults=True)))
    runner = CliRunner()
    done = runner.invoke(app, ["plan", str(file), "--json", "--seconds", "2", "--gpu", "l40s"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["gpu"]["name"] == "L40S" and report["fits"]
    assert report["stages"][0]["forward_pass"]["audio_tokens"] == [100]
    text = runner.invoke(app, ["plan", str(file), "--set", "stages.0.batch.rows=8"])
    assert text.exit_code == 0, text.stderr
    assert "estimate" in text.stdout and "fits" in text.stdout and "8 clips" in text.stdout
    options = ["--gpus", "2", "--shard", "--mfu", "0.25", "--records", "x=100", "--set", "stages.0.steps=null"]
    options += ["--set", "stages.0.epochs=1"]
    several = runner.invoke(app, ["plan", str(file), *options])
    assert several.exit_code == 0, several.stderr
    for said in (
        "1 a step, each GPU",
        "buffers",
        "25% of the peak (exchanges between GPUs:",
        "; 50 steps:",
        "2 x H100",
    ):
        assert said in several.stdout
    form = runner.invoke(app, ["plan", str(file), "--records", "x"])
    assert form.stderr == "error: --records 'x' is not of the form NAME=N; write it such as --records all=5600000\n"
    wrong = runner.invoke(app, ["plan", str(file), "--gpu", "H1000"])
    assert wrong.exit_code == 1
    assert wrong.stderr == f"error: unknown GPU 'H1000'; known: {', '.join(GPUS)}\n"
