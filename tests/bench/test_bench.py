"""`pal bench`: its schema, its counts against the closed forms, its checks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pal.app.cli import app
from pal.backbone.varlen import segment_attention
from pal.bench.checks import checks
from pal.bench.flops import flop_counter
from pal.bench.measure import counts, peak_bytes, round_seconds, saved_bytes
from pal.bench.models import AttachedModel
from pal.bench.presets import PHASES, PRESETS, VARIANTS, preset_of
from pal.bench.report import to_dict, to_markdown
from pal.bench.run import run
from pal.bench.scene import BenchScene
from pal.errors import ConfigError

ROW = {
    *("variant", "scope", "phase", "audio_tokens", "text_tokens", "batch", "seconds", "seconds_spread"),
    *("peak_bytes", "saved_bytes", "flops", "flops_closed_form", "kv_bytes", "parameters"),
}


def pal(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


WINDOW, TOKENS = 400, 300
"""Frames of the encoder's windows after its convolutions, two a token; a clip of one whole window and part of another."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """JSON of the command for `cpu-small`: all variants, phases and scopes, with a shorter window and one short clip."""
    folder = tmp_path_factory.mktemp("bench")
    preset = PRESETS["cpu-small"]
    short = {"encoder": {**preset.encoder, "max_source_positions": WINDOW}, "audio_tokens": (TOKENS,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "cpu-small", preset.model_copy(update=short))
        done = pal("--preset", "cpu-small", "--json", folder / "rows.json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((folder / "rows.json").read_text())
    return found


def by_place(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(r["scope"], r["phase"], r["audio_tokens"], r["variant"]): r for r in rows}


def test_schema(small: dict[str, Any]) -> None:
    rows = small["rows"]
    assert all(set(row) == ROW for row in rows)
    assert [*dict.fromkeys(row["scope"] for row in rows)] == ["llm", "end_to_end"]
    assert len(by_place(rows)) == len(rows) == 2 * len(PHASES) * len(VARIANTS)
    assert small["left_out"] == []
    for row in rows:
        assert row["seconds"] is None and row["seconds_spread"] is None
        assert row["flops"] > 0 and row["peak_bytes"] > 0 and row["parameters"] > 0
        assert (row["saved_bytes"] > 0) == (row["phase"] == "train") == (row["kv_bytes"] == 0)
    assert {"device", "date", "torch", "transformers", "preset", "projector_width"} <= set(small["machine"])


def test_counted_operations_are_the_closed_forms(small: dict[str, Any]) -> None:
    for row in small["rows"] + small["baselines"]:
        assert row["flops"] == pytest.approx(row["flops_closed_form"], rel=1e-3), row


def test_closed_forms_of_saved_bytes_and_of_keys_and_values(small: dict[str, Any]) -> None:
    compared = [check for check in small["checks"] if check["kind"] == "closed form"]
    assert {check["quantity"] for check in compared} == {"flops", "saved_bytes", "kv_bytes"}
    for check in compared:
        limit = {"flops": 0.01, "kv_bytes": 0.0, "saved_bytes": 0.2}[check["quantity"]]
        assert check["ratio"] == pytest.approx(1, abs=limit), check
    bounds = {check["variant"]: check["at_most"] for check in compared if check["quantity"] == "flops"}
    rows = ("plits", "pal", "qwen2audio")  # whose clips add rows to the sequence
    assert bounds == {variant: pytest.approx(1.1 if variant in rows else 1.05) for variant in VARIANTS}


def test_keys_and_values_by_hand(small: dict[str, Any]) -> None:
    rows = by_place(small["rows"])
    A, T, L = TOKENS, 128, 4
    pair = 2 * 16 * 4  # K and V, one head of 16, four bytes
    of = {name: rows["llm", "prefill", A, name]["kv_bytes"] / pair for name in VARIANTS}
    assert of["text"] == L * T
    assert of["plits"] == of["qwen2audio"] == of["lal"] == L * (T + A)
    assert of["lal_third"] == of["flamingo"] == of["mllama"] == L * T + A
    assert of["pal"] == L * (T + A // 3) + A


def test_baselines_are_honest(small: dict[str, Any]) -> None:
    compared = [check for check in small["checks"] if check["kind"] == "baseline"]
    assert {(check["variant"], check["against"]) for check in compared} == {("plits", "plain"), ("text", "plain_text")}
    for check in compared:
        assert check["quantity"] == "saved_bytes" and check["ok"], check
    plain = by_place(small["baselines"])
    for place, row in by_place(small["rows"]).items():
        name = {"plits": "plain", "text": "plain_text"}.get(place[3])
        if name is not None and place[0] == "llm":
            assert plain[*place[:3], name]["flops"] == row["flops"]


def test_ratios_to_plits(small: dict[str, Any]) -> None:
    rows, ratios = by_place(small["rows"]), by_place(small["ratios"])
    assert list(rows) == list(ratios)
    for place, ratio in ratios.items():
        plits = rows[*place[:3], "plits"]
        assert ratio["flops"] == rows[place]["flops"] / plits["flops"]
        assert ratio["speed"] is None
        if place[3] == "plits":
            assert ratio["flops"] == ratio["peak_bytes"] == 1
    # the order that the paper and the closed forms promise
    step = {name: ratios["llm", "train", TOKENS, name] for name in VARIANTS}
    assert step["lal_third"]["flops"] < step["lal"]["flops"] < step["pal"]["flops"] < 1
    assert step["lal"]["saved_bytes"] < 1


def test_the_encoder_is_the_difference_of_the_scopes(small: dict[str, Any]) -> None:
    rows = by_place(small["rows"])
    A, windows = TOKENS, 2
    encoding = {
        (phase, name): rows["end_to_end", phase, A, name]["flops"] - rows["llm", phase, A, name]["flops"]
        for phase in PHASES
        for name in VARIANTS
        if name != "qwen2audio"  # whose own forward pass does more: see below
    }
    D, F, M, frames = 16, 64, 80, WINDOW
    layer = frames * (4 * D * D + 2 * D * F) + 2 * frames * frames * D
    encoder = 2 * windows * (2 * frames * M * 3 * D + frames * D * 3 * D + layer)
    for (phase, name), more in encoding.items():
        assert more == (encoder if name != "text" and phase != "decode" else 0), (phase, name)
    empty = 2 * (windows * WINDOW // 2 - A) * D * 32  # projected all the same
    logits = 2 * 512 * 32 * (A + 128 - 1) + empty
    assert (
        rows["end_to_end", "prefill", A, "qwen2audio"]["flops"] - encoder - logits
        == (rows["llm", "prefill", A, "qwen2audio"]["flops"])
    )


def test_batches_count_as_so_many_conversations() -> None:
    preset = preset_of(
        "cpu-small", variants=["plits", "pal", "mllama"], audio_tokens=[20], batch=[1, 3], scopes=["llm"]
    )
    rows = {(row.variant, row.phase, row.batch): row for row in run(preset).rows}
    for (variant, phase, batch), row in rows.items():
        one = rows[variant, phase, 1]
        assert row.flops == pytest.approx(batch * one.flops, rel=1e-6), (variant, phase)
        assert row.kv_bytes == batch * one.kv_bytes
        assert row.flops == pytest.approx(row.flops_closed_form, rel=0.01)


def test_a_long_clip_in_little_memory() -> None:
    """Ten minutes: nothing that LAL keeps or holds at once grows with the clip's length but in proportion."""
    preset = preset_of("cpu-small", variants=["lal", "flamingo"], audio_tokens=[1500, 15000], scopes=["llm"])
    rows = {(row.variant, row.phase, row.audio_tokens): row for row in run(preset).rows}
    for (variant, phase, tokens), long in rows.items():
        if tokens == 15000:
            short = rows[variant, phase, 1500]
            assert long.flops <= 10 * short.flops
            assert long.saved_bytes <= 10 * short.saved_bytes
            assert long.peak_bytes <= 12 * short.peak_bytes


def test_projectors_alone() -> None:
    preset = preset_of(
        "cpu-small",
        variants=["text", "plits", "lal", "pal", "flamingo"],
        audio_tokens=[40],
        phases=["train"],
        scopes=["llm"],
        train="projectors",
    )
    found = run(preset)
    assert [(one["variant"], one["why"]) for one in found.left_out] == [
        ("text", "nothing to train in stage 'projectors'"),
        ("plain_text", "nothing to train in stage 'projectors'"),
    ]
    joint = {row.variant: row for row in run(preset.model_copy(update={"train": "joint"})).rows}
    for row in found.rows:
        assert row.flops == pytest.approx(row.flops_closed_form, rel=0.01), row
        assert row.flops < joint[row.variant].flops


def test_timed_rows() -> None:
    """Of training and decoding; `test_shares_of_a_products_rate` times a prefill."""
    about = {"audio_tokens": [20], "scopes": ["llm"], "phases": ["train", "decode"]}
    preset = preset_of("cpu-small", variants=["plits", "lal"], repeats=1, decode_tokens=2, **about)
    found = to_dict(run(preset))
    for row in found["rows"] + found["baselines"]:
        assert row["seconds"] > 0 and row["seconds_spread"] >= 0
    for ratio in found["ratios"]:
        assert ratio["speed"] > 0
    compared = {(check["kind"], check["quantity"]) for check in found["checks"]}
    assert ("baseline", "seconds") in compared


def test_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each starts without gradients, and a row has the time of one."""
    steps, shares, loss = [], [], AttachedModel.loss

    def counted(self: AttachedModel, scene: BenchScene) -> torch.Tensor:
        steps.append(all(parameter.grad is None for parameter in self.weights()))
        return loss(self, scene)

    def timed(*args: Any, each: int, **kwargs: Any) -> Any:
        shares.append(each)
        return round_seconds(*args, each=each, **kwargs)

    monkeypatch.setattr(AttachedModel, "loss", counted)
    monkeypatch.setattr("pal.bench.place.round_seconds", timed)
    about = {"audio_tokens": [20], "scopes": ["llm"], "phases": ["train"]}
    found = run(preset_of("cpu-small", variants=["lal"], repeats=2, train_steps=5, **about))
    assert steps == [True] * (1 + 5 + 2 * 5)  # counted, uncounted, timed
    assert shares == [5, 5]
    assert "5 training steps in a row" in to_markdown(found)


def test_counts_do_not_depend_on_the_run() -> None:
    torch.manual_seed(0)
    preset = preset_of("cpu-small", variants=["lal", "mllama"], audio_tokens=[20], scopes=["llm"])
    first, second = run(preset).rows, run(preset).rows
    assert [row.flops for row in first] == [row.flops for row in second]
    assert [row.saved_bytes for row in first] == [row.saved_bytes for row in second]


def test_what_does_not_fit_is_left_out_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = preset_of("cpu-small", variants=["lal", "pal"], audio_tokens=[20], scopes=["llm"])
    calls = iter(range(100))

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("no room")
        return counts(*args, **kwargs)

    monkeypatch.setattr("pal.bench.place.counts", full)
    monkeypatch.setattr("pal.bench.place._free_bytes", lambda: 0)
    found = run(preset)
    assert [(row.variant, row.phase) for row in found.rows] == [
        ("pal", "prefill"),
        ("lal", "decode"),
        ("pal", "decode"),
    ]
    left = [(one["variant"], one["phase"], one["why"]) for one in found.left_out]
    assert left[0] == ("lal", "prefill", "out of memory")
    assert [one[:2] for one in left[1:]] == [("lal", "train"), ("pal", "train")]
    assert all("GB are free" in one[2] for one in left[1:])
    assert "out of memory" in to_markdown(found)


def test_an_interrupted_run_keeps_what_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = iter(range(100))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return counts(*args, **kwargs)

    monkeypatch.setattr("pal.bench.place.counts", stopped)
    done = pal("--preset", "cpu-small", "--variants", "lal,pal", "--tokens", "20", "--json", tmp_path / "rows.json")
    assert done.exit_code == 130 and done.stderr.startswith("error: interrupted")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["variant"], row["phase"]) for row in rows] == [("lal", "prefill"), ("pal", "prefill")]


def test_a_killed_run_keeps_the_places_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JSON and tables are there after each place, whole, and say that more was to come."""
    calls = iter(range(100))

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            found = json.loads((tmp_path / "bench.json").read_text())
            assert [(row["variant"], row["phase"]) for row in found["rows"]] == [("lal", "prefill")]
            assert not found["complete"]
            assert "**Incomplete**" in (tmp_path / "bench.md").read_text()
            raise SystemExit(137)
        return counts(*args, **kwargs)

    monkeypatch.setattr("pal.bench.place.counts", killed)
    done = pal("--preset", "cpu-small", "--variants", "lal", "--tokens", "20", "--scopes", "llm", "--out", tmp_path)
    assert done.exit_code == 137
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1


def test_a_variant_that_fails_is_left_out_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at or timed; the line says where."""
    preset = preset_of(
        "cpu-small", variants=["text", "lal", "pal"], audio_tokens=[20], scopes=["llm"], phases=["prefill"], repeats=2
    )
    calls = {"lal": 0, "pal": 0}
    read = AttachedModel.read

    def broken(self: AttachedModel, *args: Any, **kwargs: Any) -> Any:
        calls[self.name] = calls.get(self.name, 0) + 1
        if self.name == "lal" or (self.name == "pal" and calls["pal"] == 3):
            raise RuntimeError("an illegal access\nwas made")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(AttachedModel, "read", broken)
    found = run(preset)
    assert [row.variant for row in found.rows] == ["text"] and found.complete
    left = {one["variant"]: one["why"] for one in found.left_out}
    assert set(left) == {"lal", "pal"}
    assert all(why.startswith("RuntimeError: an illegal access (place.py:") for why in left.values())


def test_ragged_batches_have_a_place_of_their_own() -> None:
    preset = preset_of(
        "cpu-small",
        variants=["lal"],
        audio_tokens=["20", "ragged"],
        ragged=((5, 16), (20, 24)),
        batch=[1, 2],
        phases=["prefill"],
    )
    places = preset.places()
    assert {place.batch for place in places if place.length == "ragged"} == {2}
    result = run(preset)
    assert result.left_out == [] and result.complete
    assert all(row.scope == "llm" for row in result.rows if row.audio_tokens == "ragged")
    (row,) = (row for row in result.rows if row.audio_tokens == "ragged")
    # padding is computed, too, where rows are not packed
    assert row.flops_closed_form < row.flops < 2 * row.flops_closed_form and row.text_tokens == 24
    text = to_markdown(result)
    assert "| ragged | lal |" in text and "audio + text tokens: 5 + 16, 20 + 24." in text
    assert {check.audio_tokens for check in checks(result) if check.kind == "closed form"} == {20}


def test_gpu_quick_is_what_was_asked_for() -> None:
    preset = PRESETS["gpu-quick"]
    found = {(place.phase, place.batch, place.length) for place in preset.places()}
    lengths = (750, 1500, 7500)
    assert found == {
        *(("train", 4 if length == 7500 else 8, length) for length in (*lengths, "ragged")),
        *(("prefill", 8, length) for length in (*lengths, "ragged")),
        *(("prefill", 1, length) for length in lengths),
        *((phase, 8, length) for phase in ("decode", "decode_graph") for length in (*lengths, "ragged")),
    }
    assert preset.variants == VARIANTS and preset.compiled and preset.dtype == "bfloat16" and preset.seconds == 300
    assert sorted(clip for clip, _ in preset.ragged) == [250, 400, 600, 750, 900, 1100, 1300, 1500]
    assert (min(text for _, text in preset.ragged), max(text for _, text in preset.ragged)) == (48, 192)


def test_what_has_not_begun_in_time_is_left_out() -> None:
    preset = preset_of("cpu-small", variants=["lal"], audio_tokens=[20], scopes=["llm"], seconds=1e-9)
    found = run(preset)
    assert found.rows == [] and found.complete
    assert {one["why"] for one in found.left_out} == {"not begun within 0 s"}


def test_counts_are_those_of_each_alone() -> None:
    first, second = torch.nn.Linear(64, 128), torch.nn.Linear(128, 32)
    x_BD = torch.randn(10, 64)
    weights = [*first.parameters(), *second.parameters()]

    def forward() -> torch.Tensor:
        return second(torch.relu(first(x_BD))).sum()

    def step() -> None:
        forward().backward()

    step()
    for weight in weights:
        weight.grad = None
    found = counts(forward, backward=lambda loss: loss.backward(), weights=weights)
    assert found.flops == 2 * 10 * (2 * 64 * 128 + 3 * 128 * 32)
    assert found.saved_bytes == saved_bytes(forward, weights)
    for weight in weights:
        weight.grad = None
    assert found.peak_bytes == peak_bytes(step)


def test_spread_is_between_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 0, 2, 0, 3, 0, 4, 0, 50])
    monkeypatch.setattr("pal.bench.measure.time.perf_counter", lambda: next(clock))
    seen: list[str] = []
    found = round_seconds({"a": lambda: None}, 5, each=2, done=seen.append)["a"]
    assert (found.median, found.spread, seen) == (1.5, 1.0, ["a"] * 5)


def test_attention_counts_in_full_on_the_cpu() -> None:
    q_BHQC = torch.randn(2, 4, 10, 8, requires_grad=True)
    k_BHKC = torch.randn(2, 4, 10, 8, requires_grad=True)
    with flop_counter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q_BHQC, k_BHKC, k_BHKC, is_causal=True)
        forward = counter.get_total_flops()
        out.sum().backward()
    product = 2 * 2 * 4 * 10 * 10 * 8
    assert (forward, counter.get_total_flops()) == (2 * product, 7 * product)


def test_packed_sequences_count_one_by_one() -> None:
    q_NHC, k_NHC = torch.zeros(7, 4, 8, requires_grad=True), torch.zeros(13, 4, 8)
    first_q, first_k = torch.tensor([0, 3, 7]), torch.tensor([0, 3, 13])
    product = 2 * (3 * 3 + 4 * 10) * 4 * 8
    with flop_counter() as counter:
        out = segment_attention(q_NHC, k_NHC, k_NHC, first_q, first_k, 4, 10)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert (forward, counter.get_total_flops()) == (2 * product, 7 * product)
    # the kernel of GPUs, by its formula alone
    formula = counter.flop_registry[torch.ops.torch_attn._varlen_attn_backward]
    assert formula(*[q_NHC] * 6, first_q, first_k, 4, 10) == 5 * product


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "big"], "unknown preset 'big'; known: cpu-small, cpu, gpu-quick, gpu, gpu-3b"),
        (["--variants", "plits,wisper"], "bench: variants.1: Input should be 'text', 'plits'"),
        (["--tokens", "many"], "bench: audio_tokens.0"),
        (["--tokens", "0"], "count from 1"),
        (["--phases", ""], "bench: phases"),
        (["--repeats", "-1"], "bench: repeats"),
        (["--train", "all"], "bench: train"),
    ],
)
def test_errors_in_one_line(arguments: list[str], said: str) -> None:
    done = pal(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("preset", ["gpu-quick", "gpu", "gpu-3b"])
def test_gpu_presets_say_that_there_is_none(preset: str) -> None:
    done = pal("--preset", preset)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1 and f"preset '{preset}' needs a CUDA GPU" in done.stderr


def test_presets_are_of_published_shapes() -> None:
    layers = {name: (preset.llm["hidden_size"], preset.llm["num_hidden_layers"]) for name, preset in PRESETS.items()}
    assert layers == {
        "cpu-small": (32, 4),
        "cpu": (2048, 4),
        "gpu": (2048, 16),
        "gpu-quick": (2048, 16),
        "gpu-3b": (3072, 28),
    }
    assert preset_of("cpu", audio_tokens=["64", "64", "15000"]).audio_tokens == (64, 15000)
    with pytest.raises(ConfigError, match="unknown key"):
        preset_of("cpu", tokens=[1])
