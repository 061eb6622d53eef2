"""Plans of several GPUs: what each holds and exchanges, and how long a stage set in epochs takes."""

import re

import pytest

from pal.errors import ConfigError
from pal.plan import plan
from pal.plan.gpus import GPUS
from pal.plan.parallel import Parallel
from pal.train.recipe import Recipe
from tests.test_plan import SECONDS, STAGES, built, planned, recipe


def test_copies_on_several_gpus() -> None:
    one = recipe("lal", {**STAGES["all"], "batch": {"rows": 12, "accumulate": 2}})
    alone, each = (plan(one, seconds=SECONDS, parallel=Parallel(n)).stages[0] for n in (1, 4))
    assert (each.clips, each.passes, alone.clips, alone.passes) == (2, 2, 6, 2)  # 3 of 12, in 2 parts
    assert each.memory.weights == alone.memory.weights and each.memory.optimizer == alone.memory.optimizer
    # DDP's buckets are as large as the gradients; a ring sends each gradient twice but for the own quarter
    assert each.memory.buffers == each.memory.gradients and alone.memory.buffers == 0
    assert each.exchange_seconds == pytest.approx(2 * 0.75 * each.memory.gradients / GPUS["H100"].link)
    assert alone.exchange_seconds == 0


def test_shards_on_several_gpus() -> None:
    """Sizes of the units are counted on the model that is built, by the names of its weights."""
    one = recipe("lal", {**STAGES["all"], "batch": {"rows": 4, "accumulate": 2}})
    alone, each = (plan(one, seconds=SECONDS, parallel=p).stages[0] for p in (Parallel(), Parallel(2, sharded=True)))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(each.memory, part) == getattr(alone.memory, part) / 2, part
    model = built(one)
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        found = re.search(r"^(llm.*layers|integration.*projectors)\.\d+\.", name)
        at = found[0] if found else "rest"
        sizes[at] = sizes.get(at, 0) + 4 * p.numel()
    assert len(sizes) == 4 + 4 + 1, sizes.keys()  # layers, projectors, and the rest, which stays whole
    buffers = sum(4 * b.numel() for b in model.buffers())
    rest = sizes.pop("rest")
    assert each.memory.buffers == 2 * rest + buffers + 2 * 2 * max(sizes.values())
    weights, gradients = alone.memory.weights, alone.memory.gradients
    assert each.passes == 2
    assert each.exchange_seconds == pytest.approx(2 * 0.5 * (2 * weights + gradients) / GPUS["H100"].link)
    with pytest.raises(ConfigError, match="a single GPU has nothing to shard; give --gpus, or remove --shard"):
        Parallel(1, sharded=True)


def test_a_slow_link_sets_the_time() -> None:
    one = recipe("lal", STAGES["all"])
    fast, slow = (plan(one, gpu=name, seconds=SECONDS, parallel=Parallel(8)).stages[0] for name in ("H100", "4090"))
    assert slow.seconds == slow.exchange_seconds > fast.exchange_seconds


def test_steps_of_epochs() -> None:
    stage = {**STAGES["connector"], "batch": {"rows": 4}, "steps": None, "epochs": 1.5}
    one = recipe("plits", stage)
    assert planned(one).steps is None
    # 1.5 passes over 1000 records, 4 a step
    assert plan(one, seconds=SECONDS, records={"x": 1000}).stages[0].steps == 375
    halved = one.model_dump(mode="json")
    halved["data"]["x"]["repeat"] = 0.5
    assert plan(Recipe(**halved), seconds=SECONDS, records={"x": 1000}).stages[0].steps == round(1.5 * 500 / 4)
    by_clip = recipe("plits", {**stage, "batch": {"clips": 2, "rows_per_clip": 3}})
    assert plan(by_clip, seconds=SECONDS, records={"x": 1000}).stages[0].steps == 250
    with pytest.raises(ConfigError, match="records: no data source 'y'; known: x"):
        plan(one, records={"y": 3})


def test_a_measured_rate() -> None:
    one = recipe("plits", {**STAGES["all"], "batch": {"rows": 512}})
    slow, fast = (plan(one, seconds=SECONDS, utilisation=mfu).stages[0] for mfu in (0.001, 0.002))
    update = 7 * slow.memory.gradients / GPUS["H100"].bandwidth
    assert slow.seconds - update == pytest.approx(2 * (fast.seconds - update))
