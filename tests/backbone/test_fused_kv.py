"""Norm, k and v projection folded into a projector's last layer, against the layers one after the other."""

import pytest
import torch
from torch import nn

from pal.backbone.families import FAMILIES
from pal.backbone.finetuning import LoRA
from pal.backbone.fused_kv import fold, pays
from pal.backbone.llm import Backbone
from pal.bench.flops import flop_counter
from pal.types import AudioFeatures
from tests.models import LLM, noise, tiny_model

A, M = 7, 8


def backbone(family, **more):
    torch.manual_seed(0)
    llm = Backbone.load({**LLM, "model_type": family, "head_dim": 8, "hidden_size": 64, **more})
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.normal_(1.0, 0.3)
    return llm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_layers_one_after_the_other(family, bias):
    llm = backbone(family)
    last = nn.Linear(M, llm.width, bias=bias)
    h_BAM = torch.randn(2, A, M) * torch.logspace(-2, 1, A)[:, None]
    for layer in range(llm.n_layers):
        folded = llm.fold_kv(layer, last)
        assert folded is not None
        with torch.no_grad():
            expected = llm.project_kv(layer, last(h_BAM))
            counter = flop_counter()
            with counter:
                found = llm.folded_kv(layer, folded, h_BAM)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        kv = llm.kv_heads * llm.head_width
        assert counter.get_total_flops() == 2 * 2 * A * M * (2 * kv + M + 1)
        assert counter.get_total_flops() < 2 * 2 * A * llm.width * (M + 2 * kv)


def test_wide_projectors_and_adapters_are_left_alone():
    llm = backbone("llama")
    assert llm.fold_kv(0, nn.Linear(llm.width, llm.width)) is None
    assert not pays(2048, 2048, 512)
    assert pays(768, 2048, 512)
    last = nn.Linear(M, llm.width)
    llm.add_lora(LoRA(targets=("v_proj",)))
    assert llm.fold_kv(0, last) is None


def in_place(parameter):
    with torch.no_grad():
        parameter[(-1,) * parameter.ndim] += 1e-3


def through_data(parameter):
    parameter.data[(0,) * parameter.ndim] += 1e-3


def other_data(parameter):
    parameter.data = parameter.data * 1.001


def by_numpy(parameter):
    parameter.detach().numpy()[...] += 1e-3


def step(parameter):
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=1e-3, foreach=True).step()
    parameter.grad = None


@pytest.mark.parametrize("write", [in_place, through_data, other_data, by_numpy, step])
def test_it_is_gone_when_a_number_changes(write):
    llm = backbone("qwen2")
    block = llm.lm.model.layers[0]
    last = nn.Linear(M, llm.width)
    parts = (last, block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)
    for part in parts:
        for parameter in part.parameters():
            folded = fold(*parts)
            assert folded is not None and folded.fresh(*parts)
            before = parameter.detach().clone()
            write(parameter)
            assert not folded.fresh(*parts)
            parameter.data = before  # the same numbers elsewhere: what was folded is right again
            assert folded.fresh(*parts)


def test_it_is_gone_in_another_precision_and_back_afterwards():
    llm = backbone("gemma3_text")
    block = llm.lm.model.layers[0]
    parts = (nn.Linear(M, llm.width), block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)
    folded = fold(*parts)
    assert folded is not None
    for part in parts:
        part.to(torch.float64)
        assert not folded.fresh(*parts)
        part.to(torch.float32)
        assert folded.fresh(*parts)
    block.input_layernorm.eps *= 2
    assert not folded.fresh(*parts)


def _loaded(model, assign):
    state = {name: x * 1.01 if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def _adapted(model, **options):
    from peft import LoraConfig, inject_adapter_in_model

    names = "|".join(("k_proj", "v_proj", r"projectors\.\d\.2"))
    config = LoraConfig(r=2, target_modules=rf".*({names})", init_lora_weights=False, **options)
    inject_adapter_in_model(config, model)
    return model.eval()


def _merged(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [layer for layer in _adapted(model).modules() if isinstance(layer, BaseTunerLayer)]:
        layer.merge()


def _switched(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [layer for layer in _adapted(model).modules() if isinstance(layer, BaseTunerLayer)]:
        layer.enable_adapters(False)


def _lora(model):
    model.llm.add_lora(LoRA(r=2, targets=("k_proj",)))
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()


def _lora_merged(model):
    _lora(model)
    model.llm.merge_adapters()


def _replaced(model):
    block = model.llm.lm.model.layers[1].self_attn
    block.v_proj = nn.Linear(block.v_proj.in_features, block.v_proj.out_features, bias=False)


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _other_class(model):
    model.llm.lm.model.layers[1].self_attn.k_proj.__class__ = _Doubled


def _hooked(model):
    model.llm.lm.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, given, out: 2 * out)


def _patched(model):
    norm = model.llm.lm.model.layers[1].input_layernorm
    norm.forward = lambda x, plain=norm.forward: 2 * plain(x)


def _parametrized(model):
    from torch.nn.utils.parametrizations import weight_norm

    norm = weight_norm(model.llm.lm.model.layers[1].self_attn.k_proj)
    norm.parametrizations.weight.original0.data.mul_(2)


def _whole_hooked(model):
    for module in model.integration.modules():
        if isinstance(module, nn.Sequential):
            module.register_forward_hook(lambda module, given, out: 2 * out)


def _data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


CHANGES = {
    "state dict": lambda model: _loaded(model, assign=False),
    "assigned": lambda model: _loaded(model, assign=True),
    "data": _data,
    "LoRA": _lora,
    "LoRA merged": _lora_merged,
    "PEFT": _adapted,
    "PEFT with DoRA": lambda model: _adapted(model, use_dora=True),
    "PEFT merged in place": _merged,
    "PEFT switched off": _switched,
    "double": lambda model: model.double(),
    "a module replaced": _replaced,
    "another class": _other_class,
    "a hook": _hooked,
    "a projector hooked": _whole_hooked,
    "a forward replaced": _patched,
    "a parametrization": _parametrized,
}
NARROW = {
    "lal": {"hidden": 4},
    "pal": {"hidden": 4},
    "lal_shared": {"name": "lal", "shared": True, "projector": "low_rank", "rank": 4},
    "lal_linear": {"name": "lal", "projector": "linear"},
}


CHANGED = [
    (name, change)
    for number, change in enumerate(CHANGES)
    for i, name in enumerate(NARROW)
    if name == "lal" or change == "a projector hooked" or number % 3 == i - 1
]
"""Each change with LAL and with one of the others in turn."""


@pytest.mark.parametrize(("name", "change"), CHANGED)
def test_whatever_changes_the_answer_is_that_of_the_layers(name, change):
    made = [tiny_model({"name": name, **NARROW[name]}, warm=False) for _ in range(2)]
    assert made[0].fold() == len(made[0].integration.layers)
    keys = []
    for model in made:
        torch.manual_seed(1)
        CHANGES[change](model)
        torch.manual_seed(1)
        features = [AudioFeatures(torch.randn(1, 9, 12).to(model.llm.dtype), (9,), 0.1)]
        keys.append(model.integration.index(features, model.llm, "d").streams[0])
    torch.testing.assert_close(keys[0].k_LBGAC, keys[1].k_LBGAC, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(keys[0].v_LBGAC, keys[1].v_LBGAC, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", NARROW)
def test_with_adapters_beside_them_layers_are_not_folded(name):
    model = _adapted(tiny_model({"name": name, **NARROW[name]}, warm=False))
    assert model.fold() == 0


@pytest.mark.parametrize("name", ["lal", "pal", "pal_routed", "plits", "lal_audio_query"])
def test_a_model_says_the_same(name):
    narrow = {"hidden": 4} if name in ("lal", "pal") else {}
    model = tiny_model({"name": name, **narrow})
    clips = [noise(1.0, 1), noise(2.0, 2)]
    plain = model.index((clips[0].numpy(), 16_000))
    before = model.ask([(clip.numpy(), 16_000) for clip in clips], "What sound is this?")
    digest = model.digest
    layers = model.fold()
    assert (layers > 0) == bool(narrow)
    folded = model.index((clips[0].numpy(), 16_000))
    assert model.digest == digest and set(model.state_dict()) == set(tiny_model({"name": name, **narrow}).state_dict())
    for one, other in zip(folded.streams, plain.streams, strict=True):
        torch.testing.assert_close(one.k_LBGAC, other.k_LBGAC, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.v_LBGAC, other.v_LBGAC, atol=1e-5, rtol=1e-5)
        # not to the last bit: the folded product was really used
        assert torch.equal(one.k_LBGAC, other.k_LBGAC) == (layers == 0)
    assert model.ask([(clip.numpy(), 16_000) for clip in clips], "What sound is this?") == before


def test_training_does_not_use_it():
    model = tiny_model({"name": "lal", "hidden": 4})
    model.fold()
    projectors = model.integration.projectors
    assert projectors.folded(0, model.llm) is None  # gradients are on
    with torch.no_grad():
        assert projectors.folded(0, model.llm) is not None
        model.integration.projectors.of(0)[-1].weight.mul_(2)
        assert projectors.folded(0, model.llm) is None
        assert projectors.folded(1, model.llm) is not None
