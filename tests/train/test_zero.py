"""ZeRO: which elements a process updates, and what is refused; the runs are in `test_engines.py`."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pal.errors import ConfigError
from pal.train import launcher
from pal.train.recipe import CheckpointConfig
from pal.train.zero import slices


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_each_element_is_of_one_part(lengths: list[int], parts: int) -> None:
    """The parts are those of the parameters laid end to end, as torch cuts them."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    whole = torch.arange(ends[-1])
    size = -(-len(whole) // parts)
    parameters = torch.split(whole, lengths)
    for part in range(parts):
        flat = torch.full((size,), -1)
        for parameter, mine in zip(parameters, slices(lengths, size, part), strict=True):
            assert len(parameter[mine.own]) == len(flat[mine.flat]) == mine.length
            assert (flat[mine.flat] == -1).all()
            flat[mine.flat] = parameter[mine.own]
        wanted = whole[part * size : (part + 1) * size]
        assert flat.tolist() == wanted.tolist() + [-1] * (size - len(wanted))


def test_without_deepspeed_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pal.train.zero.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed: DS_BUILD_OPS=0 pip install 'pal-audio\[deepspeed\]'"):
        launcher.start_engine("zero2")


@pytest.mark.parametrize(("stage", "instead"), [("zero1", "'zero2' shards"), ("zero3", "'fsdp2' shards")])
def test_other_stages_are_refused(stage: Any, instead: str) -> None:
    with pytest.raises(ValueError, match=f"of DeepSpeed only ZeRO stage 2 runs; {instead}"):
        CheckpointConfig(engine=stage)
