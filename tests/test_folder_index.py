"""Indexed folders: the answers of single clips, only what changed is prepared, and nothing foreign or damaged is read."""

import json
import os
import resource
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from pal import folder_index, long_clips
from pal.app.cli import app
from pal.backbone.audio_kv import AudioKV
from pal.errors import BundleError, PalError, PromptError
from pal.folder_index import STORES, FolderIndex, StoredSizes
from pal.types import EncodedClip
from tests.models import noise, tiny_model

QUESTION = "What sound is this?"
LENGTHS = {"a.wav": 0.4, "b.flac": 1.1, "inner/c.wav": 0.7, "inner/d.wav": 0.4, "e.wav": 2.0}


def write(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, seed).numpy(), 16_000)


@pytest.fixture(scope="module")
def model():
    return tiny_model("pal")


@pytest.fixture
def folder(tmp_path):
    for seed, (name, seconds) in enumerate(LENGTHS.items()):
        write(tmp_path / "sounds" / name, seconds, seed)
    (tmp_path / "sounds" / "notes.txt").write_text("no audio")
    return tmp_path / "sounds"


def indexed(folder, model, store="kv"):
    made = FolderIndex.open(folder.with_name(f"{store}.palidx"), model, store)
    return made, made.update(folder, model)


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
@pytest.mark.parametrize("store", ["kv", "features"])
def test_every_clip_gets_its_own_answer(integration, store, folder):
    model = tiny_model(integration)
    made, report = indexed(folder, model, store)
    assert (report.added, report.unchanged, report.removed, report.failed) == (5, 0, 0, {})
    found = made.ask(model, QUESTION, batch=2, max_new_tokens=6)
    alone = {name: model.ask(folder / name, QUESTION, max_new_tokens=6) for name in LENGTHS}
    assert found == alone and list(found) == sorted(LENGTHS) and len(set(alone.values())) > 2
    assert made.ask(model, f"<audio> {QUESTION}", max_new_tokens=6) == {
        name: model.ask(folder / name, f"<audio> {QUESTION}", max_new_tokens=6) for name in LENGTHS
    }
    with pytest.raises(PromptError):
        made.ask(model, "<audio><audio> Which is louder?")


def test_int8_is_what_an_int8_clip_answers(model, folder):
    made, _ = indexed(folder, model, "int8")
    found = made.ask(model, QUESTION, max_new_tokens=6)
    assert found == {
        name: model.ask(model.index(folder / name).quantized(), QUESTION, max_new_tokens=6) for name in LENGTHS
    }


def test_clips_are_what_is_stored(model, folder):
    for store in STORES:
        made, _ = indexed(folder, model, store)
        clip = next(one for one in made.clips() if one.source.path == "inner/c.wav")
        assert clip.seconds == 0.7 and clip.source.size == (folder / "inner/c.wav").stat().st_size
        loaded = made.load(clip)
        assert isinstance(loaded, EncodedClip if store == "features" else AudioKV) and loaded.seconds == 0.7
        assert (
            loaded.streams[0].k_LBGAC.dtype == (torch.int8 if store == "int8" else torch.float32)
            if (store != "features")
            else len(loaded.x_AE) == 1
        )


def test_only_what_changed_is_prepared_again(model, folder, monkeypatch):
    made, _ = indexed(folder, model)
    prepared = []
    ours = long_clips.index
    monkeypatch.setattr(
        long_clips, "index", lambda model, path, **more: (prepared.append(path.name), ours(model, path, **more))[1]
    )
    report = made.update(folder, model)
    assert (report.added, report.unchanged) == (0, 5) and not prepared
    os.utime(folder / "a.wav", ns=(1, 1))  # another time, the same content
    assert made.update(folder, model).unchanged == 5
    write(folder / "a.wav", 0.6, 9)
    write(folder / "f.wav", 0.3, 10)
    (folder / "e.wav").unlink()
    report = made.update(folder, model)
    assert (report.added, report.unchanged, report.removed) == (2, 3, 1)
    assert sorted(prepared) == ["a.wav", "f.wav"]
    found = made.ask(model, QUESTION, max_new_tokens=6)
    assert list(found) == ["a.wav", "b.flac", "f.wav", "inner/c.wav", "inner/d.wav"]
    assert found["a.wav"] == model.ask(folder / "a.wav", QUESTION, max_new_tokens=6)


def test_an_index_is_not_emptied_by_another_folder(model, folder, tmp_path):
    made, _ = indexed(folder, model)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "x.wav", 0.3)
    for other in ("empty", "other"):
        with pytest.raises(
            BundleError,
            match=r"none of its 5 clips is in .*; give the folder that it was made of.* delete the index or give another",
        ):
            made.update(tmp_path / other, model)
    assert len(made.clips()) == 5


def test_what_cannot_be_reached_keeps_its_entry(model, folder, monkeypatch):
    made, _ = indexed(folder, model)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    os.utime(folder / "a.wav", ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(folder_index, "sha256", denied)
        report = made.update(folder, model)
    assert list(report.failed) == ["a.wav"] and "Permission denied" in report.failed["a.wav"] and not report.removed
    walk = os.walk

    def partly(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(folder / "inner")))
        return (step for step in walk(top) if not step[0].endswith("inner"))

    with monkeypatch.context() as patch:
        patch.setattr(folder_index.os, "walk", partly)
        report = made.update(folder, model)
    assert list(report.failed) == ["inner"] and not report.removed and len(made.clips()) == 5
    assert made.update(folder, model).failed == {}


def test_an_index_keeps_its_form(model, folder):
    made, _ = indexed(folder, model, "int8")
    assert FolderIndex.open(made.path, model).store == "int8"
    (folder.with_name("begun.palidx")).mkdir()  # killed before anything was written
    assert FolderIndex.open(folder.with_name("begun.palidx"), model).store == "kv"


def test_names_that_are_not_utf_8(model, folder):
    name = os.fsdecode(b"caf\xe9.wav")
    shutil.copy(folder / "a.wav", folder / name)
    made, report = indexed(folder, model)
    assert report.added == 6 and made.ask(model, QUESTION, max_new_tokens=3)[name] == model.ask(
        folder / "a.wav", QUESTION, max_new_tokens=3
    )


def test_long_clips_do_not_share_a_batch(model, folder, monkeypatch):
    made, _ = indexed(folder, model)
    alone = made.ask(model, QUESTION, max_new_tokens=4)
    sizes = []
    ours = model.generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, clips, *more, **options: (sizes.append(len(clips)), ours(clips, *more, **options))[1],
    )
    monkeypatch.setattr(folder_index, "BATCH_SECONDS", 1.5)
    assert made.ask(model, QUESTION, max_new_tokens=4) == alone
    assert sizes == [2, 1, 1, 1]  # of 0.4, 0.4, 0.7, 1.1 and 2 seconds


def test_an_interrupted_index_goes_on(model, folder):
    made = FolderIndex.open(folder.with_name("kv.palidx"), model)

    def stops(paths):
        yield from paths[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.update(folder, model, progress=stops)
    again = FolderIndex.open(folder.with_name("kv.palidx"), model)
    assert len(again.clips()) == 2
    report = again.update(folder, model)
    assert (report.added, report.unchanged) == (3, 2) and len(again.clips()) == 5


def test_what_cannot_be_read_is_listed_and_the_rest_is_there(model, folder):
    (folder / "b.flac").write_bytes((folder / "b.flac").read_bytes()[:900])
    (folder / "empty.wav").write_bytes(b"")
    made, report = indexed(folder, model)
    assert report.added == 4 and sorted(report.failed) == ["b.flac", "empty.wav"]
    assert all("b.flac" in why or "empty.wav" in why for why in report.failed.values())
    write(folder / "empty.wav", 0.4)
    report = made.update(folder, model)
    assert report.added == 1 and list(report.failed) == ["b.flac"]
    (folder / "a.wav").write_bytes(b"RIFF")
    assert list(made.update(folder, model).failed) == ["a.wav", "b.flac"]
    assert "a.wav" not in made.ask(model, QUESTION, max_new_tokens=2)


def test_indexes_of_others_are_refused(model, folder):
    made, _ = indexed(folder, model)
    other = tiny_model("pal", seed=1)
    with pytest.raises(BundleError, match=r"another model; ask that one \(--model\), or index the folder again"):
        made.ask(other, QUESTION)
    with pytest.raises(BundleError, match="another model"):
        FolderIndex.open(made.path, other)
    with pytest.raises(BundleError, match="stores kv, not int8"):
        FolderIndex.open(made.path, model, "int8")
    with pytest.raises(BundleError, match=r"is no folder index, it has no index.json; give another path"):
        FolderIndex(folder)
    (made.path / "index.json").write_text(json.dumps({"format": "pal-folder-index-1", "store": "kv"}))
    with pytest.raises(BundleError, match="incomplete or no JSON; delete it"):
        FolderIndex(made.path)


def test_features_outlive_a_trained_projector_and_no_other_encoder(folder):
    model = tiny_model("lal")
    made, _ = indexed(folder, model, "features")
    with torch.no_grad():
        next(model.integration.parameters()).add_(0.1)
    assert made.ask(model, QUESTION, max_new_tokens=6) == {
        name: model.ask(folder / name, QUESTION, max_new_tokens=6) for name in LENGTHS
    }
    with torch.no_grad():
        next(model.ears.encoders.parameters()).add_(0.1)
    with pytest.raises(BundleError, match="other encoders"):
        made.check(model)


@pytest.mark.parametrize("store", ["kv", "features"])
def test_damaged_and_moved_entries_are_refused(model, folder, store):
    made, _ = indexed(folder, model, store)
    first, second = made.clips()[:2]
    content = first.file.read_bytes()
    first.file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(BundleError, match="damaged"):
        made.ask(model, QUESTION)
    first.file.write_bytes(content[:50])
    with pytest.raises(BundleError, match="no stored clip"):
        made.clips()
    shutil.copy(second.file, first.file)
    with pytest.raises(BundleError, match=r"'b\.flac' under another name"):
        made.clips()
    save_file({"0": torch.zeros(2)}, first.file)
    with pytest.raises(BundleError, match="no clip of this index"):
        made.clips()
    with safe_open(second.file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    about = json.loads(metadata["about"])
    save_file(tensors, second.file, metadata={**metadata, "about": json.dumps({**about, "digest": "0" * 64})})
    first.file.unlink()
    with pytest.raises(BundleError):
        made.ask(model, QUESTION)


@pytest.mark.parametrize("store", STORES)
def test_an_entry_of_another_models_index_is_refused(model, folder, store):
    """It is whole, and under the right name, so its digest alone tells."""
    made, _ = indexed(folder, model, store)
    other = tiny_model("pal", seed=1)
    foreign = FolderIndex.open(folder.with_name("foreign.palidx"), other, store)
    foreign.update(folder, other)
    entry = made.clips()[0].file
    shutil.copy(foreign.path / entry.relative_to(made.path), entry)
    with pytest.raises(BundleError, match=r"made by (another model|other encoders).*delete it, and index the folder"):
        made.ask(model, QUESTION)


@pytest.mark.parametrize("store", STORES)
def test_a_clip_that_is_read_as_far_as_it_goes_has_a_note(model, folder, store):
    (folder / "b.flac").write_bytes((folder / "b.flac").read_bytes()[:-3_000])
    made = FolderIndex.open(folder.with_name("kv.palidx"), model, store)
    report = made.update(folder, model, read_to_end=True)
    assert report.added == 5 and len(report.notes) == 1 and "b.flac: read as far as it goes" in report.notes[0]


@pytest.mark.parametrize("content", ['{"format": "pal-fol', "", "[]", '{"format": "pal-folder-index-1"}'])
def test_a_description_that_cannot_be_read_has_a_remedy_that_works(model, folder, content):
    made, _ = indexed(folder, model)
    (made.path / "index.json").write_text(content)
    for again in (lambda: FolderIndex(made.path), lambda: FolderIndex.open(made.path, model)):
        with pytest.raises(BundleError, match="delete it and index the folder again, or give another path"):
            again()
    shutil.rmtree(made.path)
    assert indexed(folder, model)[1].added == 5


def test_another_format_is_named(model, folder):
    made, _ = indexed(folder, model)
    about = json.loads((made.path / "index.json").read_text())
    (made.path / "index.json").write_text(json.dumps({**about, "format": "pal-folder-index-9"}))
    with pytest.raises(BundleError, match="its format is 'pal-folder-index-9', not pal-folder-index-1"):
        FolderIndex(made.path)


def test_links_are_followed_once_and_what_is_no_file_is_listed(model, folder, tmp_path):
    write(tmp_path / "elsewhere" / "f.wav", 0.5, 7)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "inner" / "up").symlink_to(folder)
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "inner" / "old.palidx").mkdir()
    (folder / "inner" / "old.palidx" / "index.json").write_text("{}")
    made, report = indexed(folder, model)
    assert [clip.source.path for clip in made.clips()] == sorted([*LENGTHS, "link/f.wav"])
    assert report.notes == [f"{folder / 'inner' / 'up'} is a link to a folder that it is in; not followed"]
    assert report.failed == {
        "gone.wav": f"it is a link to {tmp_path / 'nowhere.wav'}, which is not there; mend or remove the link",
        "pipe.wav": "it is no ordinary file; write it to one first",
    }
    assert report.passed_over == 1  # notes.txt; an index is none
    assert "1 other file passed over" in folder_index.describe(report, made.clips())


def test_what_killed_processes_left_is_removed_later(model, folder):
    made, _ = indexed(folder, model)
    left = [made.path / "26" / f".x.safetensors.{'3f' * 16}.tmp", made.path / f".index.json.{'0a' * 16}.tmp"]
    young = made.path / "26" / f".y.safetensors.{'3f' * 16}.tmp"
    for path in (*left, young):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    for path in left:
        os.utime(path, (0, 0))
    made.update(folder, model)
    assert not any(path.exists() for path in left) and young.exists()


@pytest.mark.parametrize("store", ["kv", "features"])
def test_a_full_disk_is_one_line_and_leaves_nothing(model, folder, store):
    made = FolderIndex.open(folder.with_name("new.palidx"), model, store)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(PalError, match=r"cannot be written: .*; make room, or give another path"):
            made.update(folder, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in made.path.rglob("*") if path.is_file()] == [made.path / "index.json"]
    assert made.update(folder, model).added == 5


def test_sizes_of_the_three_forms(model):
    sizes = StoredSizes.of_seconds(model, 1.3)
    clip = model.index((noise(1.3).numpy(), 16_000))
    assert sizes.kv == clip.nbytes and sizes.int8 == clip.quantized().nbytes < sizes.kv
    encoded = model.encode_clip((np.zeros(20_800, np.float32), 16_000))
    assert sizes.features == sum(x_AE.nbytes for x_AE in encoded.x_AE)


# The commands


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "model"
    model.save_pretrained(path, full=True)
    return path


def test_commands(model, folder, bundle, monkeypatch):
    done = run("index", folder, "--model", bundle)
    out = folder.with_name("sounds.palidx")
    assert done.exit_code == 0 and f"{out}: 5 clips (5 added, 0 unchanged, 1 other file passed over)" in done.stdout
    assert "MB as int8" in done.stdout
    answers = {name: model.ask(folder / name, QUESTION, max_new_tokens=6) for name in LENGTHS}
    done = run("ask", out, QUESTION, "--model", bundle, "--max-new-tokens", 6, "--json")
    assert json.loads(done.stdout) == [{"clip": name, "answer": answers[name]} for name in sorted(answers)]
    done = run("ask", out, QUESTION, "--model", bundle, "--max-new-tokens", 6)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["clip", "answer"] and len(lines) == 6
    assert [line.split()[0] for line in lines[1:]] == sorted(LENGTHS)
    (folder / "a.wav").write_bytes(b"RIFF")
    done = run("index", folder, "--model", bundle, "--json")
    assert done.exit_code == 1 and list(json.loads(done.stdout)["failed"]) == ["a.wav"]
    done = run("index", folder, "--model", bundle)
    assert (
        done.exit_code == 1
        and "failed: a.wav: " in done.stderr
        and "4 clips (0 added, 4 unchanged, 1 failed, 1 other file passed over)" in (done.stdout)
    )


def test_a_folder_without_audio_leaves_no_index(bundle, tmp_path):
    (tmp_path / "texts").mkdir()
    for files, says in ((0, "no name ends"), (2, "no name of its 2 files ends")):
        for number in range(files):
            (tmp_path / "texts" / f"{number}.mp4").write_bytes(b"film")
        done = run("index", tmp_path / "texts", "-m", bundle)
        assert done.exit_code == 1 and says in done.stderr and ".wav" in done.stderr
    assert not list(tmp_path.glob("*.palidx"))


def test_names_with_line_breaks_stay_in_their_rows(folder, bundle):
    write(folder / "two\nlines.wav", 0.4, 9)
    assert run("index", folder, "-m", bundle).exit_code == 0
    ask = ("ask", folder.with_suffix(".palidx"), QUESTION, "-m", bundle, "--max-new-tokens", "2")
    lines = run(*ask).stdout.splitlines()
    assert len(lines) == 7 and any(line.startswith("two lines.wav") for line in lines)
    assert "two\nlines.wav" in {one["clip"] for one in json.loads(run(*ask, "--json").stdout)}


def test_commands_with_wrong_options(folder, bundle, tmp_path):
    assert "must end in .palidx" in run("index", folder, "--out", tmp_path / "x.safetensors").output
    assert "'zip' is none of kv, int8, features" in run("index", folder, "--store", "zip").output
    assert "is needed for a single file" in run("index", folder / "a.wav", "--model", bundle).output
    done = run("index", folder / "a.wav", "--out", tmp_path / "a.safetensors", "--store", "int8")
    assert "is for folders" in done.output
    done = run("ask", tmp_path / "none.palidx", QUESTION, "--model", bundle, "--when")
    assert done.exit_code == 1 and "--when is for audio files" in done.stderr
    done = run("ask", tmp_path / "none.palidx", QUESTION, "--model", bundle)
    assert done.exit_code == 1 and "there is no such index; make it with: pal index FOLDER" in done.stderr
    FolderIndex.open(tmp_path / "empty.palidx", tiny_model("pal"))
    done = run("ask", tmp_path / "empty.palidx", QUESTION, "--model", bundle)
    assert done.exit_code == 1 and "holds no clip" in done.stderr
