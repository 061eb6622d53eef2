"""The plug-in of lmms-eval: against its real base class where it is installed, else against its published interface.

What of lmms-eval is needed: `lmms_eval.api.model.lmms` and `lmms_eval.models.registry_v2.ModelManifest`.
"""

import abc
import importlib
import importlib.util
import io
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from pal.data.prompts import encode, user_turn
from pal.errors import ConfigError
from pal.types import IGNORE
from tests.models import tiny_model

REAL = importlib.util.find_spec("lmms_eval") is not None


def stand_in(monkeypatch):
    """Modules with the names, abstract methods and attributes that version 0.7.3 publishes."""

    class lmms(abc.ABC):  # noqa: N801
        is_simple = True

        def __init__(self):
            self._rank, self._world_size = 0, 1
            self.cache_hook = SimpleNamespace(add_partial=lambda attr, req, res: None)
            self.task_dict = {}

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    for name in (
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = lmms
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest


@pytest.fixture
def plugin(monkeypatch):
    """(the module with the class, the model that it loads)."""
    if not REAL:
        stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, "pal.lmms.model", raising=False)
    module = importlib.import_module("pal.lmms.model")
    model = tiny_model("lal")
    monkeypatch.setattr("pal.load", lambda source: model)
    yield module, model
    sys.modules.pop("pal.lmms.model", None)


DOCUMENTS = [
    {"audio": {"array": np.random.default_rng(seed).normal(size=4000 + 2000 * seed) / 10, "sampling_rate": 8000}}
    for seed in range(3)
]


def asked(plugin, batch_size=2):
    module, _ = plugin
    loaded = module.Pal(pretrained="x", batch_size=batch_size, device="cpu")
    loaded.task_dict = {"t": {"test": DOCUMENTS}}
    return loaded


def request(*arguments):
    return SimpleNamespace(args=arguments)


def audio(document):
    return [document["audio"]]


def question(text, doc_id, **options):
    return request(
        text, {"max_new_tokens": 5, "temperature": 0, "do_sample": False, **options}, audio, doc_id, "t", "test"
    )


def direct(model, text, doc_id, tokens=5):
    clip = DOCUMENTS[doc_id]["audio"]
    return model.ask((clip["array"], clip["sampling_rate"]), text, max_new_tokens=tokens)


def test_the_class_and_its_manifest(plugin):
    from pal.lmms import manifest

    module, _ = plugin
    base = sys.modules["lmms_eval.api.model"].lmms
    assert issubclass(module.Pal, base)
    assert module.Pal.is_simple
    assert not module.Pal.__abstractmethods__
    found = manifest()
    assert (found.model_id, found.simple_class_path) == ("pal", "pal.lmms.model.Pal")
    if REAL:
        from lmms_eval.models.registry_v2 import ModelRegistryV2

        registry = ModelRegistryV2()
        registry.register_manifest(found)
        assert registry.get_model_class("pal") is module.Pal


def test_answers_are_those_of_ask_in_the_order_of_the_requests(plugin):
    _, model = plugin
    requests = [question(f"Which sound {n}?", n % 3, max_new_tokens=5 + n % 2) for n in range(5)]
    answers = asked(plugin).generate_until(requests)
    assert answers == [direct(model, f"Which sound {n}?", n % 3, 5 + n % 2) for n in range(5)]
    assert len(set(answers)) > 1
    assert asked(plugin, batch_size=1).generate_until(requests) == answers


def test_answers_are_cut_at_until(plugin):
    _, model = plugin
    whole = direct(model, "Which sound 0?", 0)
    stop = whole[2]
    for until in (stop, [stop, "never"]):
        assert asked(plugin).generate_until([question("Which sound 0?", 0, until=until)]) == [whole.split(stop)[0]]


def test_the_options_are_not_changed(plugin):
    one = question("Which sound 0?", 0, until=["."])
    before = dict(one.args[1])
    asked(plugin).generate_until([one])
    assert one.args[1] == before


def test_a_question_without_audio_is_text(plugin):
    _, model = plugin
    silent = request("Which sound?", {"max_new_tokens": 4}, lambda document: [], 0, "t", "test")
    assert asked(plugin).generate_until([silent]) == [model.ask([], "Which sound?", max_new_tokens=4)]


def test_a_picture_is_refused(plugin):
    picture = request("What?", {}, lambda document: [object()], 0, "t", "test")
    with pytest.raises(ConfigError, match="not audio with array and sampling_rate"):
        asked(plugin).generate_until([picture])


def test_loglikelihood_is_the_models_own(plugin):
    _, model = plugin
    loaded = asked(plugin)
    greedy = direct(model, "Which sound?", 1, 64)
    found = loaded.loglikelihood(
        [
            request("Which sound?", lambda document: " a loud siren", audio, 1, "t", "test"),
            request("Which sound?", "no", audio, 1, "t", "test"),
        ]
    )
    for answer, (total, is_greedy) in zip(("a loud siren", "no"), found, strict=True):
        row = encode(
            model.tokenizer, [user_turn("Which sound?", 1), {"role": "assistant", "content": answer}], [0], True
        )
        from pal.audio import load

        clip = load((DOCUMENTS[1]["audio"]["array"], 8000), model.sampling_rate).samples_N
        inputs = model.inputs([clip], [row])
        with torch.no_grad():
            logits_TV = model.llm(inputs).logits[0].log_softmax(-1)
        labels_T = inputs.labels_BT[0]
        at = [place for place in range(1, len(labels_T)) if labels_T[place] != IGNORE]
        assert total == pytest.approx(sum(float(logits_TV[p - 1, labels_T[p]]) for p in at), abs=1e-3)
        assert is_greedy is all(int(logits_TV[p - 1].argmax()) == int(labels_T[p]) for p in at)
        assert is_greedy is (answer == greedy)


def test_rounds_are_not_offered(plugin):
    with pytest.raises(NotImplementedError, match="one round"):
        asked(plugin).generate_until_multi_round([])


def test_documents_give_their_audio_in_any_form(plugin):
    """datasets 4 and 5 give decoders and undecoded files, not arrays."""
    _, model = plugin
    samples_N = np.random.default_rng(0).normal(size=4000).astype(np.float32) / 10
    file = io.BytesIO()
    soundfile.write(file, samples_N, 8000, format="WAV", subtype="FLOAT")
    decoded = SimpleNamespace(data=torch.from_numpy(samples_N)[None], sample_rate=8000)
    forms = [
        {"bytes": file.getvalue(), "path": None},
        SimpleNamespace(get_all_samples=lambda: decoded),
        (torch.from_numpy(samples_N)[None], 8000),
    ]
    expected = model.ask((samples_N, 8000), "What?", max_new_tokens=4)
    for form in forms:
        asking = request("What?", {"max_new_tokens": 4}, lambda document, form=form: [form], 0, "t", "test")
        assert asked(plugin).generate_until([asking]) == [expected]
