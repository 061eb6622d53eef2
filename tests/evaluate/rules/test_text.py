"""Rules for free text: labels by similarity, captions, word errors, exact match."""

import math
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics
from transformers import BertConfig, BertModel, BertTokenizerFast
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer as TransformersNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from pal.errors import ConfigError
from pal.evaluate.embed import TextEmbedder, open_embedder
from pal.evaluate.items import Item
from pal.evaluate.rules.labels import NearestLabel
from pal.files import sha256
from pal.registry import build
from tests.counts import FULL, full_only


class Letters(TextEmbedder):
    """Counts letters: known vectors without a model."""

    name = "letters"
    digest = None

    def embed(self, texts):
        counts = np.asarray([[text.count(letter) for letter in "abcdefgh"] for text in texts], dtype=float)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def items(labels, *references):
    return [Item(str(i), (f"{i}.wav",), "?", wanted, labels) for i, wanted in enumerate(references)]


def labels_rule(**options):
    return NearestLabel(NearestLabel.Config(answer="{}", label="{}", **options), Letters())


# Labels


def test_the_nearest_label():
    asked = items(("aab", "bcd", "efg"), ("aab",), ("efg",), ("bcd",), ("aab",))
    verdict = labels_rule().judge(asked, ["AB A", "Audio caption: gfe", "aaa", None])
    assert verdict.parsed == ["aab", "efg", "aab", None]
    assert verdict.correct == [True, True, False, False]  # the one that raised is wrong, though label 0 is right
    assert verdict.metrics["accuracy"].value() == 0.5


def test_f1_is_scikit_learns():
    labels = ("a", "b", "c", "d")
    asked = items(labels, ("a", "b"), ("b",), ("c",), ("c", "a"), ("b",))
    verdict = labels_rule(metric="f1").judge(asked, ["a", "b", "b", "c", None])
    truth = np.asarray([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]])
    said = np.asarray([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    # by hand: 3 true positives, 4 said, 7 held
    assert verdict.metrics["micro_f1"].value() == pytest.approx(6 / 11)
    assert metrics.f1_score(truth, said, average="micro") == pytest.approx(6 / 11)
    # a: 2*1/(1+2), b: 2*1/(2+3), c: 2*1/(1+2); nobody holds or says d
    assert verdict.metrics["macro_f1"].value() == pytest.approx((2 / 3 + 2 / 5 + 2 / 3) / 3)
    part = np.asarray([0, 2])
    assert verdict.metrics["macro_f1"].value(part) == pytest.approx(
        metrics.f1_score(truth[part], said[part], average="macro", zero_division=np.nan)
    )


def test_map_ranks_by_the_whole_vector():
    labels = ("a", "b")
    asked = items(labels, ("a",), ("b",), ("a", "b"), ("b",))
    texts = ["aab", "aaab", "ab", None]
    verdict = labels_rule(metric="map").judge(asked, texts)
    # similarity to 'a' falls in the order 1, 0, 2, raised: its items 0 and 2 come 2nd and 3rd
    of_a = (1 / 2 + 2 / 3) / 2
    # similarity to 'b' falls in the order 2, 0, 1, raised: its items 2, 1 and 3 come 1st, 3rd and 4th
    of_b = (1 / 1 + 2 / 3 + 3 / 4) / 3
    assert verdict.metrics["mAP"].value() == pytest.approx((of_a + of_b) / 2)
    assert verdict.facts == {"labels_without_items": 0}


def test_labels_must_be_common():
    asked = [Item("0", ("0.wav",), "?", ("a",), ("a", "b")), Item("1", ("1.wav",), "?", ("a",), ("a", "c"))]
    with pytest.raises(ConfigError, match="same labels for all items"):
        labels_rule().judge(asked, ["a", "a"])


def test_the_default_needs_no_download_and_is_named():
    rule = build("rule", "labels")
    said = rule.describe()
    assert said["embedding"] == {"name": "character n-grams", "digest": None}
    assert "text-embedding-ada-002" in said["deviations"][0]
    assert "character n-grams" in said["deviations"][0] and "character n-grams" in rule.description
    asked = items(("dog", "rain", "car horn"), ("dog",), ("rain",), ("car horn",))
    verdict = rule.judge(asked, ["A dog is barking.", "it rains on a roof", "someone honks a car's horn"])
    assert verdict.parsed == ["dog", "rain", "car horn"]
    vectors = open_embedder("ngrams").embed(["sound of dog", "sound of rain"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_a_model_of_sentence_transformers(tmp_path):
    """A tiny one with random weights, saved to disk: cosine of mean-pooled rows, by transformers alone."""
    library = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "rain", "sound", "of"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).eval()
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    for part in (bert, tokenizer):
        part.save_pretrained(tmp_path / "bert")
    # a plain folder gets mean pooling
    library.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "whole"))
    embedder = open_embedder(str(tmp_path / "whole"))
    texts = ["sound of dog", "rain"]
    with torch.no_grad():
        rows = [bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1).double().numpy()
    np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)
    assert embedder.digest == sha256(tmp_path / "whole" / "model.safetensors")
    assert build("rule", {"name": "labels", "embedding": str(tmp_path / "whole")}).describe()["embedding"] == {
        "name": str(tmp_path / "whole"),
        "digest": embedder.digest,
    }


def test_an_embedding_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot load the embedding"):
        open_embedder(str(tmp_path / "none"))


# Word errors


def test_word_error_rate_by_hand():
    asked = [
        Item(str(i), (f"{i}.wav",), "?", (text,))
        for i, text in enumerate(("MISTER SMITH'S COLOUR", "a b c d", "uh", "x y"))
    ]
    verdict = build("rule", "word_errors").judge(asked, ["Mr. Smith's color!", "a x c d e", "whatever", None])
    # the normaliser makes the first pair equal, and nothing of the third reference; 1 + 1 of 4, 2 of 2
    assert verdict.metrics["wer"].value() == pytest.approx((0 + 2 + 2) / (4 + 4 + 2))
    assert verdict.value == [0.0, 0.5, 0.0, 1.0]
    assert verdict.correct == [True, False, True, False]
    assert verdict.facts == {"words": 10, "word_errors": 4, "empty_references": 1}


def test_the_normaliser_is_whispers():
    own = EnglishTextNormalizer()
    other = TransformersNormalizer(own.standardize_spellings.mapping)
    for text in (
        "It's twenty-five dollars, isn't it?",
        "Mr. O'Neil's colour",
        "[noise] um, the 3rd of May",
        "don't (laughs)",
    ):
        assert own(text) == other(text)


# Captions

REFERENCES = (("a dog barks loudly", "the dog is barking"), ("rain falls on a roof",), ("a car horn sounds twice",))
SAID = ("a dog barks", "rain falls on a roof", "music plays")


def cider_d(said, references, sigma=6.0):
    """CIDEr-D after its paper (Vedantam et al. 2015, equations 1 to 4 with the Gaussian and the clipping), times 10."""

    def grams(text, n):
        tokens = text.split()
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    scores = []
    for caption, own in zip(said, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            held_by = Counter(g for refs in references for g in {g for ref in refs for g in grams(ref, n)})

            def weigh(text, n=n, held_by=held_by):
                return {
                    g: count * (math.log(len(references)) - math.log(max(1, held_by[g])))
                    for g, count in grams(text, n).items()
                }

            vector = weigh(caption)
            for ref in own:
                other = weigh(ref)
                norm = math.sqrt(sum(v * v for v in vector.values())) * math.sqrt(sum(v * v for v in other.values()))
                inner = sum(min(vector[g], other[g]) * other[g] for g in vector if g in other)
                apart = len(caption.split()) - len(ref.split())
                total += (inner / norm if norm else 0.0) * math.exp(-(apart**2) / (2 * sigma**2)) / len(own)
        scores.append(10 * total / 4)
    return scores


def captioned():
    return [Item(str(i), (f"{i}.wav",), "?", refs) for i, refs in enumerate(REFERENCES)]


@pytest.fixture(scope="module")
def captions():
    """The rule, once. METEOR takes 15 seconds and a gigabyte to start, so only `make torture` has Java."""
    with pytest.MonkeyPatch.context() as patch:
        if not FULL:
            patch.setattr("shutil.which", lambda name: None)
        return build("rule", "captions")


@pytest.fixture(scope="module")
def said(captions):
    """What it says of `SAID`; each judging starts Java twice for the tokenizer."""
    return captions.judge(captioned(), list(SAID))


def test_cider_is_the_papers(said):
    assert said.value == pytest.approx(cider_d(SAID, REFERENCES), abs=1e-6)
    headline = next(iter(said.metrics))
    assert said.metrics[headline].value() == pytest.approx(np.mean(cider_d(SAID, REFERENCES)))
    assert said.correct == [None] * 3


def test_bleu_and_rouge_by_hand(said):
    bleu = next(score for name, score in said.single.items() if name.startswith("BLEU-1"))
    # 8 of 10 words are in the references; the closest references have 4, 5 and 5 words
    assert bleu == pytest.approx(math.exp(1 - 14 / 10) * 8 / 10, rel=1e-4)
    rouge = next(metric for name, metric in said.metrics.items() if name.startswith("ROUGE-L"))
    # of the first: precision 3/3, recall 3/4; beta is 1.2
    first = (1 + 1.44) * 1 * 0.75 / (0.75 + 1.44 * 1)
    assert rouge.value() == pytest.approx((first + 1 + 0) / 3)


def test_what_is_not_computed_is_said(said):
    assert set(said.facts["not_computed"]) | set(said.metrics) | set(said.single) >= {"SPICE", "SPIDEr", "METEOR"}
    for name in ("SPICE", "SPIDEr"):
        assert (name in said.facts["not_computed"]) != (name in said.metrics)


def test_a_caption_that_raised_is_empty(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    verdict = build("rule", "captions").judge(captioned(), [*SAID[:2], None])
    assert verdict.parsed[2] is None
    assert verdict.value[2] == 0.0


def test_without_java_the_names_say_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    rule = build("rule", "captions")
    verdict = rule.judge(captioned(), [f"{text.capitalize()}." for text in SAID])
    assert list(verdict.metrics) == ["CIDEr-D (plain words)", "ROUGE-L (plain words)"]
    assert "no Java" in rule.describe()["says"]
    missing = verdict.facts["not_computed"]
    assert {"METEOR", "SPICE", "SPIDEr"} == set(missing)
    assert missing["METEOR"] == "needs Java on the PATH, 8 or later"
    assert missing["SPICE"] == missing["SPIDEr"] == f"{missing['METEOR']}, and {_SPICE_REMEDY}"
    assert verdict.value == pytest.approx(cider_d(SAID, REFERENCES), abs=1e-6)


_SPICE_REMEDY = (
    "Stanford CoreNLP 3.6.0 in pycocoevalcap's folder spice/lib, which "
    "'python get_stanford_models.py', run in its folder spice, downloads"
)


def test_with_java_alone_spice_names_its_remedy(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/java")
    rule = build("rule", "captions")
    if rule.spice:
        pytest.skip("the parser is there")
    monkeypatch.setattr(rule, "_tokens", lambda captions: captions)
    rule._meteor = SimpleNamespace(compute_score=lambda right, said: (0.5, None))
    verdict = rule.judge(captioned(), list(SAID))
    assert verdict.single["METEOR"] == 0.5
    assert verdict.facts["not_computed"] == dict.fromkeys(("SPICE", "SPIDEr"), f"needs {_SPICE_REMEDY}")


@pytest.mark.torture
@full_only
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and the tokenizer are Java programs")
def test_with_java_the_official_tokenizer_and_meteor(captions, said):
    exact = [refs[0] for refs in REFERENCES]
    verdict = captions.judge(captioned(), [f"{text.capitalize()}." for text in exact])
    assert verdict.parsed == exact
    assert next(iter(verdict.metrics)) == "CIDEr-D"
    # METEOR 1.5 of a caption that is its reference; punctuation and case are gone
    assert verdict.single["METEOR"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < said.single["METEOR"] < 1


# Exact


def test_exact_match_takes_any_reference():
    asked = [
        Item("0", ("0.wav",), "?", ("yes", "yeah")),
        Item("1", ("1.wav",), "?", ("dog",)),
        Item("2", (), "?", ("",)),
    ]
    verdict = build("rule", "exact").judge(asked, ["Yeah!", "a cat", None])
    assert verdict.correct == [True, False, False]
    assert verdict.parsed == ["yeah", "cat", None]
