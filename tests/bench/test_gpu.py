"""`make gpu` at toy size on a CPU: the whole flow, what it writes, and what happens when something fails."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pal.bench import gpu, values
from pal.bench.launches import Dispatched, StepCount, waits
from pal.bench.models import AttachedModel
from pal.bench.place import eager, training
from pal.bench.presets import PRESETS, BenchPoint
from pal.bench.run import Bench, opened
from pal.bench.values import Case, Compared, Size
from pal.integrations.base import Integration

TOY = ["--device", "cpu", "--toy"]
GOOD = Compared(Case("lal", "llama", torch.bfloat16, "equal", "none", True), 1e-3, 2e-2, "x", 1e-2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, int]:
    """Numbers, tables and exit status of a run."""
    folder = tmp_path_factory.mktemp("gpu")
    status = gpu.main(["--out", str(folder), *TOY])
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text(), status


def test_all_parts_run(whole: tuple[dict[str, Any], str, int]) -> None:
    found, tables, status = whole
    assert found["complete"] and found["left_out"] == []
    assert (status == 0) == found["ok"]
    assert {one["compiled"] for one in found["values"]} == {True, False}
    assert {(one["rows"], one["dtype"]) for one in found["values"] if not one["compiled"]} == {
        (rows, dtype) for rows in ("none", "left", "right") for dtype in ("bfloat16", "float32")
    }
    rows = found["bench"]["rows"]
    assert {row["phase"] for row in rows} == set(PRESETS["gpu-quick"].phases)
    assert {row["audio_tokens"] for row in rows} == {"ragged"} and all(row["seconds"] > 0 for row in rows)
    assert found["bench"]["complete"] and found["bench"]["left_out"] == []
    for heading in ("## Checks", "## Values beside", "## What a step asks", "## pal bench --preset gpu-quick"):
        assert heading in tables
    assert "Incomplete" not in tables


def test_values_are_right_and_nothing_waits(whole: tuple[dict[str, Any], str, int]) -> None:
    found, _, _ = whole
    assert [one for one in found["values"] if not one["ok"]] == []
    assert all(one["tokens"] for one in found["values"] if one["dtype"] == "float32" and one["rows"] == "left")
    ours = [one for one in found["counts"] if one["variant"] in ("plits", "lal")]
    assert {one["phase"] for one in ours} == {"train", "decode"}
    assert [one for one in ours if one["waits"] != 0 or one["failed"]] == []
    # a row for each variant at each place, and operations that were counted
    assert all(one["operations"] > 100 for one in found["counts"])


def test_what_was_written_before_a_kill_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each value and each place; a part that fails is said, and the next one runs."""

    def some(device: Any, size: Any, in_time: Any, done: Any) -> Any:
        done(GOOD)
        raise RuntimeError("the driver is gone")

    def one(bench: Bench, subjects: Any, places: Any, in_time: Any, done: Any) -> Any:
        done(StepCount("lal", "train", 12, 2, False))
        return [], 0

    def killed(bench: Bench, scope: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "compare", some)
    monkeypatch.setattr(gpu, "count_steps", one)
    monkeypatch.setattr(Bench, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--out", str(tmp_path), *TOY])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["complete"] and not found["ok"]
    assert [one["integration"] for one in found["values"]] == ["lal"]
    assert [one["variant"] for one in found["counts"]] == ["lal"]
    assert found["left_out"][0].startswith("values: RuntimeError: the driver is gone (")
    assert "**Incomplete**" in (tmp_path / "gpu.md").read_text()


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path), *TOY, "--limit", "0"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["complete"] and not found["ok"]
    assert found["left_out"] == ["values: no time for 13 cases", "counts: no time for 8 steps"]
    left = found["bench"]["left_out"]
    assert {one["phase"] for one in left} == set(PRESETS["gpu-quick"].phases)
    assert ("mllama", "decode_graph") not in {(one["variant"], one["phase"]) for one in left}
    assert all(one["why"] == "not begun within 0 s" for one in left)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: preset 'gpu-quick' needs a CUDA GPU") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"loss": 1.1e-2}, False),
        ({"gradients": 3.1e-2}, False),
        ({"logits": 3.1e-2}, False),
        ({"logits": None}, True),
        ({"tokens": False}, False),
        ({"failed": "out of memory"}, False),
    ],
)
def test_limits_of_values(change: dict[str, Any], ok: bool) -> None:
    about = {name: getattr(GOOD, name) for name in ("case", "loss", "gradients", "worst", "logits")}
    assert Compared(**{**about, **change}).ok == ok


@pytest.mark.parametrize(("off", "ok"), [(0.9e-5, True), (1.1e-4, False)])
@pytest.mark.parametrize("quantity", ["loss", "gradients", "logits"])
def test_float32_may_be_off_by_rounding_alone(quantity: str, off: float, ok: bool) -> None:
    case = Case("lal", "llama", torch.float32, "equal", "left", False)
    assert Compared(case, **{quantity: off}).ok == ok  # type: ignore[arg-type]


def test_a_wrong_gradient_is_off() -> None:
    exact = {"a": torch.ones(100), "b": torch.ones(100)}
    assert max(values.gradient_errors(exact, exact).values()) == 0
    assert values.gradient_errors({**exact, "a": exact["a"] * 1.1}, exact)["a"] == pytest.approx(0.1, rel=0.02)
    assert values.gradient_errors({"a": exact["a"]}, exact)["b"] == float("inf")
    assert values.gradient_errors({**exact, "b": exact["b"] * float("nan")}, exact)["b"] == float("inf")


def test_a_mistake_on_the_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that drops the last key of each clip, in the packed form alone."""
    size = Size(head_width=8, layers=2, families=("llama",), integrations=("lal",))
    one = Case("lal", "llama", torch.float32, "ragged", "none", False)
    monkeypatch.setattr(values, "cases", lambda size, device: [one])
    (right,), left = values.compare(torch.device("cpu"), size)
    assert right.ok and left == 0
    forward = Integration.forward

    def shorter(self: Integration, features: Any, rows: Any, llm: Any, padding_side: Any) -> Any:
        (audio,) = features
        if padding_side == "none":
            audio = type(audio)(audio.x_BAE, tuple(n - 1 for n in audio.lengths), audio.seconds_per_token)
        return forward(self, [audio], rows, llm, padding_side)

    monkeypatch.setattr(Integration, "forward", shorter)
    (wrong,), _ = values.compare(torch.device("cpu"), size)
    assert not wrong.ok and wrong.gradients is not None and wrong.gradients > 1e-2


def test_a_case_that_fails_is_said_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Integration.forward

    def fails(self: Integration, features: Any, *others: Any) -> Any:
        if features[0].lengths == (40, 40, 40):
            raise RuntimeError("no kernel image\nis there")
        return forward(self, features, *others)

    both = [Case("lal", "llama", torch.float32, batch, "none", False) for batch in ("equal", "ragged")]
    monkeypatch.setattr(Integration, "forward", fails)
    monkeypatch.setattr(values, "cases", lambda size, device: both)
    (failed, right), left = values.compare(torch.device("cpu"), values.TOY)
    assert left == 0 and right.ok and not failed.ok
    assert failed.failed is not None and failed.failed.startswith("RuntimeError: no kernel image (values.py:")


def test_on_a_gpu_packed_rows_in_float32_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Case("lal", "llama", torch.float32, "equal", "none", False)
    monkeypatch.setattr(values, "cases", lambda size, device: [one])
    assert values.compare(torch.device("cuda"), values.TOY) == ([], 0)
    (found,), left = values.compare(torch.device("cpu"), values.TOY)
    assert found.ok and left == 0


def test_waits_name_the_line() -> None:
    x = torch.ones(3)
    found = waits(lambda: (x.sum().item(), x.nonzero(), x + x), torch.device("cpu"))
    assert len(found) == 2


def test_operations_without_views() -> None:
    x = torch.ones(3, 4)
    with Dispatched() as dispatched:
        (x.T[1:] + 1).sum()
    assert dispatched.operations == 2


@pytest.mark.parametrize(
    ("variant", "found", "ok"),
    [("lal", 0, True), ("lal", 1, False), ("plain", 2, True)],
)
def test_only_ours_must_not_wait(variant: str, found: int, ok: bool) -> None:
    assert StepCount(variant, "train", 1500, 8, False, waits=found).ok == ok
    assert not StepCount(variant, "train", 1500, 8, False, waits=found, failed="out of memory").ok


def test_warnings_of_cuda_are_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    modes: list[Any] = []
    monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("does not yet detect all synchronizing operations", stacklevel=1)

    found = waits(step, torch.device("cuda"))
    assert len(found) == 2 and all(place.startswith("test_gpu.py:") for place in found)
    assert modes == ["warn", 0]


def test_compiled_layers_are_counted_and_undone_by_the_stance() -> None:
    preset = gpu.toy()[0].model_copy(update={"compiled": True, "compiler": "eager", "variants": ("lal",)})
    with opened(preset) as bench:
        (lal,) = bench.subjects(None)
        scene = bench.scene(BenchPoint(2, "ragged", "train"), None)
        layer: Any = bench.llm.layers[0]
        assert "forward" in vars(layer)
        with training(lal, "joint"), eager():
            plain = lal.loss(scene)
        with training(lal, "joint"):
            torch.testing.assert_close(lal.loss(scene), plain)
        assert bench.subjects(None)[0] is lal


@torch.inference_mode()
def test_graphs_decode_with_buffers_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = gpu.toy()[0].model_copy(update={"variants": ("lal",), "phases": ("decode", "decode_graph")})
    asked: list[bool] = []
    read = AttachedModel.read

    def remembered(self: AttachedModel, *given: Any, fixed: bool = False) -> Any:
        reading = read(self, *given, fixed=fixed)
        assert reading.cache.plan.fixed == fixed
        asked.append(fixed)
        return reading

    monkeypatch.setattr(AttachedModel, "read", remembered)
    with opened(preset) as bench:
        bench.measure("llm")
        assert [row.phase for row in bench.result.rows] == ["decode", "decode_graph"]
    assert asked == [False, True]


def test_version_of_a_source_tree(tmp_path: Path) -> None:
    """That is on the path and not installed."""
    root = Path(gpu.__file__).parents[2]
    program = (
        "import sys, importlib.metadata as metadata\n"
        "def version(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "from pal import __version__\n"
        "print(__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = [line for line in (root / "pyproject.toml").read_text().splitlines() if line.startswith("version")]
    assert said == [f'version = "{done.stdout.strip()}"']


def test_lines_say_what_was_asked_and_found(tmp_path: Path) -> None:
    run = gpu.GpuRun(tmp_path, gpu.toy()[0], 100.0)
    run.values = [GOOD, Compared(GOOD.case, failed="out of memory | of all")]
    run.counts = [StepCount("lal", "train", "ragged", 8, True, launches=2000, waits=1, where=("base.py:7 (1)",))]
    lines = {name: (value, target, ok) for name, value, target, ok in run.lines()}
    assert lines["bfloat16: worst gradients"] == (2e-2, "<= 0.03", True)
    assert lines["bfloat16: cases that fail, of 2"] == (1, "0", False)
    assert lines["waits for the device: lal, train, ragged, batch 8, compiled"] == (1, "0", False)
    text = run.to_markdown()
    assert "base.py:7 (1)" in text and "out of memory / of all" in text


def test_goals_are_said_as_they_were_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check: Any = SimpleNamespace(
        ratio=0.25, at_most=1 / 4.5, at_least=None, quantity="seconds", variant="lal", phase="train",
        audio_tokens=1500, batch=8, against="plits", ok=False,
    )  # fmt: skip
    monkeypatch.setattr(gpu.GpuRun, "goals", lambda run: [check])
    run = gpu.GpuRun(tmp_path, gpu.toy()[0], 100.0)
    assert run.lines() == [("lal, train, 1500, batch 8: seconds, times faster than plits", 4.0, ">= 4.5", False)]
    check.at_most, check.ratio = 1.1, 1.05
    assert run.lines()[0][1:3] == (1.05, "<= 1.1")
    check.at_most, check.at_least, check.quantity = None, 0.45, "rate"
    assert run.lines()[0][2] == ">= 0.45"
