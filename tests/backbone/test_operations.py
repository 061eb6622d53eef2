"""Device operations of a training step as a GPU runs it: counted on a CPU, each kernel of a GPU as one operation."""

from collections import Counter
from functools import cache

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from pal.registry import build
from pal.types import AUDIO, IGNORE, Tokens
from tests.identities.models import INTEGRATIONS, E, features, make_backbone

LAYERS = 16
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
SHAPES = {
    "equal": {"audio": [40] * 8, "text": [24] * 8},
    "ragged": {"audio": [20, 25, 30, 35, 40, 45, 50, 60], "text": [12, 16, 20, 24, 24, 28, 32, 36]},
}


class Operations(TorchDispatchMode):
    """Counts operations that are no views and do not just make room."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@cache
def operations(name, shape):
    """Of one step, forward and backward."""
    shape = SHAPES[shape]
    llm = make_backbone("llama", LAYERS).requires_grad_(True)
    hears = name != "text"
    integration = build("integration", INTEGRATIONS[name] if hears else {"name": "plits"}, in_width=E, llm=llm)
    rows = []
    for clip, count in enumerate(shape["text"]):
        ids = [5] * 4 + [AUDIO] * hears + [6] * (count - 4)
        rows.append(Tokens(ids, [clip] * hears, [IGNORE] * (len(ids) - 6) + ids[-6:]))
    audio = features(*shape["audio"]) if hears else None
    with Operations() as counted:
        llm.loss(integration(audio, rows, llm, "none"))[0].backward()
    return counted.names


@pytest.mark.parametrize(("name", "most"), [("plits", 1.05), ("lal", 1.5), ("lal_first", 1.25), ("pal", 1.6)])
def test_a_step_takes_few_operations_more_than_text_alone(name, most):
    assert operations(name, "equal").total() <= most * operations("text", "equal").total()


@pytest.mark.parametrize("name", ["text", "plits", "lal", "pal", "flamingo"])
def test_a_ragged_batch_takes_no_more_than_an_equal_one(name):
    """But for a few of the batch, such as putting the real tokens of clips together."""
    equal, ragged = (operations(name, shape) for shape in SHAPES)
    # text alone of one length takes the LLM's own attention, which is one operation too
    assert ragged.total() <= equal.total() + 12 + LAYERS * 4 * (name in ("text", "plits", "flamingo"))
    assert ragged["segment_attention"] == LAYERS + (LAYERS // 2 if name == "flamingo" else 0)
    assert ragged["segment_attention_backward"] == ragged["segment_attention"]
