"""Training with replayed steps is training: the same weights after as many steps."""

import pytest
import torch

from pal.backbone.loss_graphs import LossGraphs
from pal.errors import ConfigError
from pal.train import stages
from pal.train.objectives import AnswerLoss, MicroBatch
from tests.models import tiny_model
from tests.repeats import Repeats
from tests.train.test_waiting import ALL, ragged, stage, updating

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def trained(name, captured, **fields):
    """Weights after some steps of two parts each, and how often a step was replayed."""
    torch.manual_seed(0)
    model = tiny_model(name, warm=False)
    model.llm.packs = True
    recorder = Repeats()
    model.llm.loss_graphs = LossGraphs(recorder) if captured else None
    made = stage(**fields)
    objective = AnswerLoss(model, AnswerLoss.Config(**made.options))
    parts = stages.freeze(model, made.train)
    objective.train()
    stages.set_modes(model, made)
    update = updating(objective, made, parts)
    micro_batches = [MicroBatch(ragged(model), ["data"] * 3, seed) for seed in range(2)]
    told = [update(micro_batches, False) for _ in range(4)]
    numbers = torch.stack([one.numbers_4 for one in told])
    weights = {f"{part}.{n}": p.detach() for part, named in parts.items() for n, p in named.items()}
    return weights, numbers, recorder.replayed


@pytest.mark.parametrize("name", ["plits", "lal", "pal"])
@pytest.mark.parametrize("fields", [{}, {"train": ALL | {"llm": "attention"}, "options": {"per": "answer"}}])
def test_the_same_weights(name, fields):
    expected, numbers, _ = trained(name, False, **fields)
    found, same, replayed = trained(name, True, **fields)
    assert replayed == 2 * (2 * 4 - 1)  # each part's two passes, but for the first part of all
    torch.testing.assert_close(same, numbers, rtol=1e-5, atol=1e-5)
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "device", "processes", "on"),
    [
        ("auto", CUDA, 1, True),
        ("auto", CUDA, 2, False),
        ("auto", CPU, 1, False),
        (False, CUDA, 1, False),
        (True, CUDA, 1, True),
    ],
)
def test_where_steps_are_replayed(key, device, processes, on):
    assert stages.captures(stage(cuda_graphs=key), device, processes) is on


@pytest.mark.parametrize(("device", "processes"), [(CPU, 1), (CUDA, 2)])
def test_insisting_where_it_cannot_be(device, processes):
    with pytest.raises(ConfigError, match="cuda_graphs: true needs CUDA, one process"):
        stages.captures(stage(cuda_graphs=True), device, processes)
