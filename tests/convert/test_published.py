"""Published checkpoints become folders that our encoders read; whatever is no such checkpoint is refused."""

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from pal.app import cli
from pal.convert import convert, folder
from pal.encoders.sslam import SslamArchitecture, SslamNetwork
from pal.errors import ConfigError
from pal.registry import build
from tests.encoders.published import BEATS, beats_tensors, save_beats, save_sslam, sslam_fairseq, sslam_tensors


def clip() -> Tensor:
    return 0.1 * torch.randn(9_000, generator=torch.Generator().manual_seed(0))


def tokens(name: str, folder: Path) -> Tensor:
    with torch.no_grad():
        return build("encoder", {"name": name, "path": str(folder)}).eval().encode([clip()]).x_BAE


def written(path: Path, checkpoint: Any) -> Path:
    torch.save(checkpoint, path)
    return path


def test_sslam(tmp_path: Path) -> None:
    tensors = sslam_tensors()
    source = written(tmp_path / "s.pt", sslam_fairseq(tensors))
    facts = convert(source, tmp_path / "out", "sslam")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    # the names of the Hub's layout, the positions of one window, and nothing of the decoder or the teacher
    assert stored.keys() == {f"model.{name}" for name in tensors}
    for name, tensor in tensors.items():
        expected = tensor[:, :512] if name.endswith("positions") else tensor
        assert torch.equal(stored[f"model.{name}"], expected), name
    assert facts["numbers"] == sum(tensor.numel() for tensor in stored.values())
    assert (facts["layout"], facts["left_out"]) == ("sslam", 1)
    assert torch.equal(tokens("sslam", tmp_path / "out"), tokens("sslam", save_sslam(tmp_path / "hub", tensors)))


def test_sslam_fine_tuned(tmp_path: Path) -> None:
    checkpoint = sslam_fairseq(sslam_tensors())
    checkpoint["model"] = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    checkpoint["model"] |= {"head.weight": torch.ones(527, 16), "fc_norm.bias": torch.ones(16)}
    convert(written(tmp_path / "s.pt", checkpoint), tmp_path / "out", "sslam")
    assert torch.equal(
        tokens("sslam", tmp_path / "out"), tokens("sslam", save_sslam(tmp_path / "hub", sslam_tensors()))
    )


def test_heads_that_no_configuration_says_are_64_wide(tmp_path: Path) -> None:
    source = written(tmp_path / "s.pt", sslam_fairseq(sslam_tensors(width=128, depth=1), heads=None))
    convert(source, tmp_path / "out", "sslam")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_heads"] == 2


def test_beats(tmp_path: Path) -> None:
    source = written(tmp_path / "b.pt", {"cfg": BEATS, "model": beats_tensors()})
    facts = convert(source, tmp_path / "out", "beats")
    assert (facts["layout"], facts["left_out"]) == ("beats", 2)  # the second and third layer's copies of the bias
    assert torch.equal(tokens("beats", tmp_path / "out"), tokens("beats", save_beats(tmp_path / "o", beats_tensors())))


def test_beats_fine_tuned_in_half_precision(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in beats_tensors().items()}
    model = tensors | {"predictor.weight": torch.ones(527, 16), "predictor.bias": torch.ones(527)}
    cfg = {**BEATS, "finetuned_model": True, "predictor_class": 527}
    convert(written(tmp_path / "b.pt", {"cfg": cfg, "model": model}), tmp_path / "out", "beats")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert not any("predictor" in name for name in stored)
    again = {name: tensor.float() for name, tensor in tensors.items()}
    assert torch.equal(tokens("beats", tmp_path / "out"), tokens("beats", save_beats(tmp_path / "o", again)))


def test_what_a_cfg_does_not_say_is_as_in_the_official_code(tmp_path: Path) -> None:
    cfg = {name: value for name, value in BEATS.items() if name not in ("max_distance", "deep_norm")}
    convert(written(tmp_path / "b.pt", {"cfg": cfg, "model": beats_tensors()}), tmp_path / "out", "beats")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["max_distance"], found["deep_norm"]) == (1280, False)


class Trap:
    """Would make a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_is_run(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    for at, checkpoint in enumerate([{"model": {"x": trap}}, trap, {"args": argparse.Namespace(a=1), "model": {}}]):
        source = written(tmp_path / f"{at}.pt", checkpoint)
        with pytest.raises(ConfigError, match=r"\.pt: holds an object of [\w.]+, .*save it anew with only"):
            convert(source, tmp_path / "out", "sslam")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(ConfigError):
        convert(tmp_path / "plain.pkl", tmp_path / "out", "sslam")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap works


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    good = written(tmp_path / "good.pt", sslam_fairseq(sslam_tensors()))
    cases = {
        "no such file": None,
        "not a file of torch.save, or damaged": [
            b"",
            b"hello",
            b"\x80\x02",
            good.read_bytes()[:5000],
            b"PK\x03\x04" * 9,
        ],
        "has no dictionary 'model' .found: list.": [[torch.ones(2)]],
        "has no dictionary 'model' .found: cfg, epoch.": [{"epoch": 3, "cfg": {}}],
        "has no dictionary 'model' .found: model.": [{"model": torch.ones(2)}],
    }
    for message, contents in cases.items():
        for content in contents or [None]:
            path = tmp_path / "x.pt"
            path.unlink(missing_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                torch.save(content, path)
            with pytest.raises(ConfigError, match=message):
                convert(path, tmp_path / "out", "sslam")
            assert not (tmp_path / "out").exists()


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    def refuse(layout: str, checkpoint: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            convert(written(tmp_path / "x.pt", checkpoint), tmp_path / "out", layout)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]

    sslam, beats = sslam_fairseq(sslam_tensors()), {"cfg": BEATS, "model": beats_tensors()}
    refuse("sslam", beats, "lacks 'modality_encoders.IMAGE.local_encoder.proj.weight'; is it of another layout")
    refuse("beats", sslam, "lacks 'patch_embedding.weight'; is it of another layout")
    refuse("beats", {"model": beats["model"]}, "lacks the dictionary 'cfg'")
    refuse("beats", beats | {"cfg": BEATS | {"encoder_layers": "many"}}, "cfg: encoder_layers")
    refuse("beats", beats | {"cfg": BEATS | {"gru_rel_pos": False}}, "'gru_rel_pos' is False")
    refuse("beats", {"cfg": BEATS, "model": beats_tensors() | {"quantize.x": torch.ones(1)}}, "is a tokenizer of BEATs")

    refuse("beats", beats | {"cfg": BEATS | {"encoder_layers": 10**9}}, "cfg: encoder_layers: .* less than or equal")
    refuse("beats", beats | {"cfg": BEATS | {"encoder_attention_heads": 3}}, "no multiple of encoder_attention_heads")
    blocks = sslam["model"] | {"blocks.99999999.norm1.bias": torch.ones(16)}
    refuse("sslam", sslam | {"model": blocks}, r"lacks 'blocks\.2\..* and 9 more")

    sslam = sslam_fairseq(sslam_tensors(positions=torch.zeros(1, 512, 16)))
    for layout, whole in (("sslam", sslam), ("beats", beats)):
        names = [name for name in whole["model"] if "decoder" not in name and name != "_ema"]
        for name in names:
            if re.search(r"\.[12]\.", name):  # one block or layer stands for all
                continue
            rest = {key: value for key, value in whole["model"].items() if key != name}
            refuse(layout, whole | {"model": rest}, f"lacks '{name}'")
            fields = torch.ones(3, 5)
            refuse(
                layout, whole | {"model": whole["model"] | {name: fields}}, "has shape|lacks|this encoder shares one"
            )


def test_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    source = written(tmp_path / "s.pt", sslam_fairseq(sslam_tensors()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="mine: exists already; name a folder that does not"):
        convert(source, tmp_path / "mine", "sslam")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
    with pytest.raises(ConfigError, match="unknown layout 'fairseq'; known: beats, ct2-whisper, gguf, sslam"):
        convert(source, tmp_path / "out", "fairseq")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "s.pt", sslam_fairseq(sslam_tensors()))

    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder.json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "sslam")
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def test_the_names_are_those_of_the_whole_network() -> None:
    with torch.device("meta"):
        network = SslamNetwork(SslamArchitecture(embed_dim=16, depth=2, num_heads=4))
    assert network.state_dict().keys() == sslam_tensors().keys()


def test_the_command(tmp_path: Path) -> None:
    source = written(tmp_path / "s.pt", sslam_fairseq(sslam_tensors()))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, [str(argument) for argument in ("convert", *arguments)])

    done = run(source, tmp_path / "a" / "out", "--layout", "sslam", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["out"] == str(tmp_path / "a" / "out")
    assert (tmp_path / "a" / "out" / "model.safetensors").is_file()
    plain = run(source, tmp_path / "b", "--layout", "sslam")
    assert "numbers; 1 tensors left out" in plain.stdout
    for arguments in [
        (source, tmp_path / "b", "--layout", "sslam"),
        (tmp_path / "none.pt", tmp_path / "c", "--layout", "sslam"),
        (source, tmp_path / "c", "--layout", "beats"),
        (source, tmp_path / "c", "--layout", "other"),
    ]:
        failed = run(*arguments)
        assert failed.exit_code == 1
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert run(source, tmp_path / "c").exit_code == 2
