"""Two processes, with the whole model in each or with shards of it, do what one does; they take over from one another.

A pair of processes runs everything, since their start costs as much as a dozen runs.
"""

import json
import os
import shutil
from contextlib import closing
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from pal.data.collate import WaveformCache
from pal.errors import ConfigError
from pal.train import Trainer, curves, run, stages
from pal.train.curves import read_log
from pal.train.launcher import start_engine
from pal.train.objectives import build_objective
from pal.train.prefetching import PrefetchLoader
from pal.train.recipe import Recipe
from pal.train.setup import build_model
from pal.train.sources import StageData, open_sources
from pal.train.validation import Validation
from pal.train.zero import MISSING
from tests.counts import repeats
from tests.processes import exit_codes, fresh, rendezvous
from tests.train.test_quarantine import FAULTS, corpus, not_finite, quarantined, truncated
from tests.train.test_quarantine import recipe as quarantine
from tests.train.tiny import LLM, MODEL, recipe

LORA = {"llm": "lora", "lora": {"dropout": 0.0, "r": 2, "targets": ["q_proj", "v_proj", "down_proj"]}}
HAS_DEEPSPEED = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason=MISSING)

AUDIO = {"connector": True, "projectors": True}
TIED = {"llm": {"fresh": {**LLM, "tie_word_embeddings": True}, "vocabulary": 280}}
INTEGRATIONS: dict[str, Any] = {
    "plits": "plits",
    "lal": {"name": "lal", "gate": -1.0},
    "pal": {"name": "pal", "gate": -1.0},
    "flamingo": {"name": "flamingo", "every": 1, "ffn": 20},
    "lal_audio_query": "lal_audio_query",
}
TRAINED = {"frozen": AUDIO, "joint": {**AUDIO, "llm": "full"}, "lora": {**AUDIO, **LORA}, "adapters": LORA}


_TEXT = {"audio_id": [], "instruction": "Say a number.", "input": "", "dataset": "text", "task": "text"}


class Job(NamedTuple):
    """A run of both processes."""

    recipe: str
    out: Path
    resume: bool = False
    stop_at: int | None = None
    launcher: dict[str, str] = {}
    """What `accelerate launch` adds to the environment."""


def stage(train: dict[str, Any], steps: int, **fields: Any) -> dict[str, Any]:
    batch = {"clips": 3, "rows_per_clip": 2, "accumulate": fields.pop("accumulate", 1)}
    return {"train": train, "lr": 3e-3, "steps": steps, "batch": batch} | fields


def made(
    manifest: Path,
    integration: str,
    stages: list[dict[str, Any]],
    text: bool = False,
    projector: str | None = None,
    **model: Any,
) -> Recipe:
    data = {"scenes": {"manifest": str(manifest)}}
    if text:
        path = manifest.with_name("text.jsonl")
        path.write_text("".join(json.dumps(_TEXT | {"id": str(i), "output": str(i)}) + "\n" for i in range(12)))
        data["text"] = {"manifest": str(path)}
    part = INTEGRATIONS[integration]
    if projector is not None:
        part = {**part, "projector": projector}
    return recipe(manifest, stages, model={**MODEL, **model, "integration": part}, data=data)


def with_engine(made: Recipe, engine: str) -> Recipe:
    return made.model_copy(update={"keep": made.keep.model_copy(update={"engine": engine})})


def run_jobs(jobs: list[Job], environment: dict[str, str]) -> None:
    """What each of the two processes does."""
    # as `torchrun` does it on a machine without an accelerator
    os.environ.update(environment | {"CUDA_VISIBLE_DEVICES": ""})
    del os.environ["ACCELERATE_USE_CPU"]
    curves.draw = lambda *given: True  # type: ignore[assignment]
    for job in jobs:
        os.environ.update(job.launcher)
        trainer = Trainer(Recipe.model_validate_json(job.recipe), job.out, job.resume)
        try:
            for step in trainer.steps():
                if step == job.stop_at:
                    trainer.stop()
        except SystemExit:
            continue
        trainer.finish()
        for name in job.launcher:
            del os.environ[name]


def run_pair(jobs: list[Job]) -> None:
    with rendezvous(2) as environments:
        processes = [fresh().Process(target=run_jobs, args=(jobs, environment)) for environment in environments]
        for process in processes:
            process.start()
        assert exit_codes(processes) == [0, 0]


def stopped(made: Recipe, out: Path, step: int) -> None:
    """One process that stops after a step."""
    trainer = Trainer(made, out)
    with pytest.raises(SystemExit):
        for done in trainer.steps():
            if done == step:
                trainer.stop()


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out / "log.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def cases(manifest: Path) -> dict[str, Recipe]:
    """A few runs that have, together, what can go wrong with shards."""
    validation = {
        "manifest": str(manifest),
        "every": 1,
        "questions": 5,
        "samples": 5,
        "max_new_tokens": 3,
        "no_audio": True,
        "patience": 1,
    }
    return {
        # tied embeddings, whose gradient a hook completes; adapters that a later stage adds; batch statistics
        "plits": made(
            manifest, "plits", [stage(TRAINED["joint"] | {"encoder": True}, 1), stage(TRAINED["lora"], 1)], **TIED
        ),
        # keys made in the layers; a gate, used in all of them; two parts of a batch; processes that have text alone,
        # where those of others are encoded by loader threads and where they are not
        "lal": made(
            manifest,
            "lal",
            [
                stage(AUDIO, 3, cache=str(manifest.parent / "cache")) | {"batch": {"rows": 2}},
                stage(TRAINED["adapters"], 1, accumulate=2),
            ],
            text=True,
        ),
        # a number that is not sharded; layers that are computed again in backward; answers between steps, an early end
        "pal": made(
            manifest,
            "pal",
            [stage(TRAINED["joint"], 4, gradient_checkpointing=True)],
            projector="residual",
            connector={"name": "mlp", "width": 16},
        ).model_copy(update={"validation": Validation.model_validate(validation)}),
        # blocks before the layers, gates of one element
        "flamingo": made(manifest, "flamingo", [stage(TRAINED["joint"], 1)]).model_copy(
            update={"validation": Validation.model_validate(validation)}
        ),
        # attention of the layers, run outside of them
        "lal_audio_query": made(manifest, "lal_audio_query", [stage(TRAINED["joint"], 1)]),
    }


@pytest.fixture(scope="module")
def pair(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, NAME-one, and of two, NAME-ddp and so on."""
    folder = tmp_path_factory.mktemp("engines")
    jobs = []
    for name, made in cases(manifest).items():
        run(made, folder / f"{name}-one")
        out = folder / f"{name}-fsdp2"
        if name == "flamingo":
            launcher = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            jobs.append(Job(made.model_dump_json(), out, launcher=launcher))
        else:
            jobs.append(Job(with_engine(made, "fsdp2").model_dump_json(), out))
        if HAS_DEEPSPEED and name in ("plits", "lal", "pal"):
            jobs.append(Job(with_engine(made, "zero2").model_dump_json(), folder / f"{name}-zero2"))
        if name == "flamingo":
            jobs.append(Job(with_engine(made, "ddp").model_dump_json(), folder / f"{name}-ddp"))
    long = lasting(manifest)
    run(long, folder / "long-one")
    for name, made in {"cache": filling(manifest, folder), "bad": faulty(folder)}.items():
        run(made, folder / f"{name}-one")
        jobs.append(Job(made.model_dump_json(), folder / f"{name}-ddp"))
    shutil.rmtree(folder / "cache")  # for the two to fill it at once
    stopped(long, folder / "one", 2)
    for engine in ("fsdp2", "zero2") if HAS_DEEPSPEED else ("fsdp2",):
        sharded = with_engine(long, engine).model_dump_json()
        shutil.copytree(folder / "one", folder / f"one-to-{engine}")
        jobs += [
            Job(sharded, folder / f"one-to-{engine}", resume=True),
            Job(sharded, folder / f"{engine}-to-one", stop_at=2),
        ]
    run_pair(jobs)
    return folder


def lasting(manifest: Path) -> Recipe:
    """A run long enough to be cut; its learning rate is small, as Adam makes much of small differences."""
    return made(manifest, "lal", [stage(TRAINED["joint"], 4, lr=1e-4)])


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, "fsdp2") for name in ("plits", "lal", "pal", "flamingo", "lal_audio_query")]
    + [pytest.param(name, "zero2", marks=needs_deepspeed) for name in ("plits", "lal", "pal")],
)
def test_shards_train_as_one_process_does(pair: Path, name: str, engine: str) -> None:
    one, two = pair / f"{name}-one", pair / f"{name}-{engine}"
    if name != "plits":  # whose encoder has the batch statistics of each process
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    whole, gathered = weights(one), weights(two)
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in gathered.items()}
    reports = [json.loads((out / "train.json").read_text()) for out in (one, two)]
    assert [(report["processes"], report["engine"]) for report in reports] == [(1, "one process"), (2, engine)]
    for key in ("parameters", "recipe_digest"):
        assert reports[0][key] == reports[1][key]
    counts = [[total["trained_parameters"] for total in report["stages"]] for report in reports]
    assert counts[0] == counts[1]
    if name != "plits":
        for n, tensor in whole.items():
            torch.testing.assert_close(gathered[n], tensor, atol=1e-4, rtol=1e-3, msg=n)


def filling(manifest: Path, folder: Path) -> Recipe:
    """A run with batches of clips of like length, and one that fills a cache."""
    stages = [
        stage({"projectors": True}, 2) | {"batch": {"rows": 3, "bucket": 2}},
        stage({"connector": True, "llm": "full"}, 2, cache=str(folder / "cache")),
    ]
    return made(manifest, "lal", stages)


def faulty(folder: Path) -> Recipe:
    """A run over eight clips, three of which are bad."""
    manifest = corpus(folder / "c", 8, {1: FAULTS[0], 2: truncated, 5: not_finite})
    # the encoder is frozen: its batch statistics would be those of the parts
    return quarantine(manifest, {"train": {"projectors": True}, "epochs": 1, "batch": {"clips": 4, "rows_per_clip": 2}})


@pytest.mark.parametrize("name", ["cache", "bad"])
def test_whole_copies_train_as_one_process_does(pair: Path, name: str) -> None:
    assert losses(pair / f"{name}-ddp") == pytest.approx(losses(pair / f"{name}-one"), rel=1e-5)
    assert json.loads((pair / f"{name}-ddp" / "train.json").read_text())["processes"] == 2
    whole, found = weights(pair / f"{name}-one"), weights(pair / f"{name}-ddp")
    for key, tensor in whole.items():
        torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=1e-4, msg=key)


def test_whole_copies_list_the_same_bad_clips(pair: Path) -> None:
    lists = [
        sorted((line["step"], line["clip"], sorted(line["records"])) for line in quarantined(pair / f"bad-{kind}"))
        for kind in ("one", "ddp")
    ]
    assert len(lists[0]) == 3 and lists[0] == lists[1]
    reports = [json.loads((pair / f"bad-{kind}" / "train.json").read_text()) for kind in ("one", "ddp")]
    assert [report["stages"][0]["left_out"] for report in reports] == [6, 6]


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("pal", "fsdp2"),
        ("flamingo", "fsdp2"),
        ("flamingo", "ddp"),
        pytest.param("pal", "zero2", marks=needs_deepspeed),
    ],
)
def test_processes_answer_as_one_does(pair: Path, name: str, engine: str) -> None:
    """Answers and accuracies, the best step and an early end follow."""
    lines = [read_log(pair / f"{name}-{kind}" / "log.jsonl") for kind in ("one", engine)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert len(lines[0]) == {"pal": 2, "flamingo": 1}[name]
    for one, two in zip(*lines, strict=True):
        asked, told = one["validation"], two["validation"]
        assert len(asked["samples"]) == 5 and {sample["answer"] for sample in asked["samples"]} != {""}
        assert sorted(map(str, told["samples"])) == sorted(map(str, asked["samples"]))
        assert all(told[key] == asked[key] for key in ("accuracy", "no_audio_accuracy"))
    best = [sorted(path.name for path in (pair / f"{name}-{kind}" / "best").iterdir()) for kind in ("one", engine)]
    assert best[0] == best[1] == ["step0000001"]


@pytest.mark.parametrize("way", ["one-to-{}", "{}-to-one"])
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_another_number_of_processes_goes_on(pair: Path, manifest: Path, engine: str, way: str) -> None:
    cut = way.format(engine)
    if way == "{}-to-one":
        names = sorted(path.name for path in (pair / cut / "checkpoints" / "step0000003").iterdir())
        kinds = [f"{kind}-{i:05}-of-00002.safetensors" for kind in ("optimizer", "weights") for i in (1, 2)]
        assert names == sorted(["manifest.json", "state.json", *kinds])
        run(lasting(manifest), pair / cut, resume=True)
    assert losses(pair / cut) == pytest.approx(losses(pair / "long-one"), rel=1e-5)
    whole, found = weights(pair / "long-one"), weights(pair / cut)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1; give it --fsdp_version 2"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "stage 3, of which only stage 2 runs; configure it without, and set keep.engine=fsdp2",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            "a file for DeepSpeed, which training does not read",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "DeepSpeed's offloading, which training does not support",
        ),
    ],
)
def test_what_the_launcher_is_configured_for_is_refused_where_it_cannot_be(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        start_engine("auto")
    assert start_engine("ddp").num_processes == 1
    assert all(os.environ[name] == value for name, value in environment.items())


def test_sharded_layers_are_not_compiled(manifest: Path) -> None:
    insisting, left = (made(manifest, "lal", [stage(AUDIO, 1, **field)]).stages[0] for field in ({"compile": True}, {}))
    assert stages.compiles(left, torch.device("cuda")) and not stages.compiles(left, torch.device("cuda"), sharded=True)
    with pytest.raises(ConfigError, match="compile: true does not work with sharded weights"):
        stages.compiles(insisting, torch.device("cuda"), sharded=True)


@pytest.mark.torture
@pytest.mark.parametrize("integration", ["plits", "lal", "pal", "flamingo"])
def test_curves_of_fifty_steps(manifest: Path, tmp_path: Path, integration: str) -> None:
    steps = repeats(full=50, reduced=0)
    if not steps:
        pytest.skip("a few steps of each are in the other tests")
    jobs, pairs = [], []
    for name, train in TRAINED.items():
        long = made(manifest, integration, [stage(train, steps, lr=1e-3)])
        run(long, tmp_path / f"{name}-one")
        for engine in ("ddp", "fsdp2", "zero2") if HAS_DEEPSPEED else ("ddp", "fsdp2"):
            out = tmp_path / f"{name}-{engine}"
            jobs.append(Job(with_engine(long, engine).model_dump_json(), out))
            pairs.append((tmp_path / f"{name}-one", out))
    run_pair(jobs)
    far = {two.name: (losses(one), losses(two)) for one, two in pairs}
    assert [name for name, (a, b) in far.items() if b != pytest.approx(a, rel=1e-5)] == []


def test_the_order_of_the_data_is_that_of_one_process_and_one_loader(manifest: Path, tmp_path: Path) -> None:
    long = made(manifest, "lal", [stage(AUDIO, 6) | {"batch": {"rows": 5}}])
    manifests = open_sources(long, tmp_path)
    data = StageData(long, 0, manifests)
    model = build_model(long, manifests, tmp_path)
    data.start(model, build_objective(model, long.stages[0], data.records()), WaveformCache(1 << 20))

    def rows(part: int, parts: int, workers: int) -> list[list[str]]:
        with closing(PrefetchLoader(data, 1, part, parts, workers, prefetch=2)) as loader:
            return [one.batch.records if one.counts else [] for (one,) in loader]

    whole = rows(0, 1, workers=0)
    assert len(whole) == 5 and {len(step) for step in whole} > {5}
    for parts, workers in ((1, 2), (2, 0), (3, 2)):
        shared = [rows(part, parts, workers) for part in range(parts)]
        merged = [
            [row for turn in zip_longest(*(one[step] for one in shared)) for row in turn if row is not None]
            for step in range(5)
        ]
        assert merged == whole
