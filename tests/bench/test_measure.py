"""Measurements against sizes that can be counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pal.bench.measure import peak_bytes, saved_bytes, step_seconds

MB = 1 << 20


def test_saved_bytes_of_two_layers():
    first, second = nn.Linear(64, 128), nn.Linear(128, 32)
    x = torch.randn(10, 64)
    weights = [*first.parameters(), *second.parameters()]
    # the input of each layer and the output of relu, which is the second layer's input: counted once
    assert saved_bytes(lambda: second(torch.relu(first(x))).sum(), weights) == 4 * (10 * 64 + 10 * 128)


def test_saved_bytes_counts_a_storage_once_and_weights_never():
    w = torch.randn(100, requires_grad=True)
    x = torch.randn(100)
    assert saved_bytes(lambda: (w * x[:50].repeat(2) * 1).sum(), [w]) == 4 * 100
    # two views of one storage
    assert saved_bytes(lambda: (w[:50] * x[:50] + w[50:] * x[50:]).sum(), [w]) == 4 * 100
    assert saved_bytes(lambda: (w * w).sum()) == 4 * 100


def test_frozen_network_saves_nothing():
    layer = nn.Linear(8, 8).requires_grad_(False)
    assert saved_bytes(lambda: layer(torch.randn(4, 8)).relu().sum()) == 0


def test_checkpointing_saves_less():
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(32, 64, requires_grad=True)
    plain = saved_bytes(lambda: block(x).sum(), block.parameters())
    assert saved_bytes(lambda: checkpoint(block, x, use_reentrant=False).sum(), block.parameters()) < plain / 3


def test_peak_bytes_counts_what_lives_at_once(capfd):
    def step():
        a = torch.empty(3 * MB, dtype=torch.uint8)
        b = torch.empty(2 * MB, dtype=torch.uint8)
        del a
        c = torch.empty(2 * MB, dtype=torch.uint8)
        return b, c

    assert peak_bytes(step) == 5 * MB
    assert capfd.readouterr().err == ""


def test_peak_bytes_does_not_see_what_was_there():
    there = torch.empty(8 * MB, dtype=torch.uint8)
    assert peak_bytes(lambda: there[:MB].clone()) == MB


def test_steps_take_turns_and_the_median_counts(monkeypatch):
    order = []
    clock = iter([0, 9, 0, 9, 0, 1, 0, 2, 0, 50, 0, 4, 0, 3, 0, 6])
    monkeypatch.setattr("pal.bench.measure.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = step_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert found == {"a": 3, "b": 4}


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_training_costs_leave_the_model_as_it_was(integration):
    import pal
    from pal.backbone.tokenizer import train_tokenizer
    from pal.bench.measure import audio_cache_bytes, training_costs
    from pal.data.prompts import encode, user_turn
    from pal.model import PalModel
    from pal.model_config import ModelConfig
    from pal.train.recipe import BatchSize, Stage, Trained
    from pal.types import Batch

    assert pal.__version__
    tokenizer = train_tokenizer(["what is it? a dog"], 270)
    fresh = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    fresh |= {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 270}
    config = ModelConfig(
        llm={"fresh": fresh},
        encoders=[{"name": "tiny", "width": 8, "channels": [2, 2, 4, 4], "blocks": 1}],
        integration=integration,
    )
    model = PalModel.from_config(config, tokenizer).eval().requires_grad_(False)
    talk = [user_turn("what is it?", 1), {"role": "assistant", "content": "a dog"}]
    row = encode(tokenizer, talk, [0], train=True)
    batch = Batch([torch.randn(16_000)], [row, row])
    stage = Stage(train=Trained(projectors=True, llm="full"), lr=1e-3, steps=1, batch=BatchSize(rows=2))
    before = model.digest
    cost = training_costs({integration: model}, batch, stage, rounds=1)[integration]
    assert model.digest == before
    assert not model.training
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    parts = model.parts()
    trained = sum(p.numel() for name in ("projectors", "llm") for p in parts[name].parameters())
    assert cost.trained_parameters == trained
    assert cost.peak_bytes > cost.saved_bytes > 0
    # the gradients of what is trained are part of the peak
    assert cost.peak_bytes > 4 * trained

    clip = model.index((batch.waveforms[0].numpy(), 16_000))
    (stream,) = clip.streams
    rows = stream.rows_BSD.shape[1]
    stored = stream.k_LBGAC.nbytes + stream.v_LBGAC.nbytes
    assert audio_cache_bytes(model, batch.waveforms[0], row) == stored + rows * 3 * 2 * 1 * 8 * 4
