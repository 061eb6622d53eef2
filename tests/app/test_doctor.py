"""The diagnoses of `pal doctor`: versions against the ranges of the metadata, and each fault with its remedy."""

import importlib.machinery
import shutil

import pytest
from packaging.specifiers import SpecifierSet

from pal.app import doctor


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.13.0+cpu", "<=2.13", True),
        ("2.10.9", ">=2.11", False),
        ("6.0", ">=5.17,<6", False),
        ("5.17", ">=5.17,<6", True),
        ("2.14.0.dev20261101", ">=2.11", True),
        ("1", "", True),
    ],
)
def test_installed_versions_against_ranges(version, wanted, fits):
    assert doctor.satisfies(version, SpecifierSet(wanted)) is fits


def test_every_form_of_requirement(small, monkeypatch):
    """Extras of a package, markers of a platform and of one of our extras, alone and together."""
    lines = [
        "torch>=2.11",
        'ray[data]>=1; extra == "ray"',
        'ray[data]>=999; extra == "ray"',
        'winloop>=1; sys_platform == "win32"',
        'soundfile<0.1; sys_platform != "win32" and extra == "av"',
        'pytest>=999; extra == "test"',
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.60.0")
    found = [d for d in doctor.examine() if d.name in ("torch", "ray", "winloop", "soundfile", "pytest")]
    assert [(d.name, d.ok, d.required) for d in found] == [
        ("torch", True, True),
        ("ray", True, False),
        ("ray", False, False),
        ("soundfile", False, False),
    ]
    assert [d.remedy for d in found[2:]] == ["pip install 'pal-audio[ray]'", "pip install 'pal-audio[av]'"]


@pytest.fixture
def small(assets, monkeypatch):
    """Models of the tests in place of the shipped ones."""
    monkeypatch.setattr(doctor, "SHIPPED", assets.bundle)
    monkeypatch.setattr(doctor, "TEXT_LLM", assets.llm)
    return assets


def examined():
    return {diagnosis.name: diagnosis for diagnosis in doctor.examine()}


def test_this_machine_passes(small):
    found = examined()
    assert all(diagnosis.ok for diagnosis in found.values() if diagnosis.required)
    assert {
        "python",
        "torch",
        "transformers",
        "peft",
        "audio formats",
        "gpu",
        "disk",
        "shipped model",
        "its text-only LLM",
    } <= set(found)
    assert not {"pytest", "ruff"} & set(found)
    assert doctor.report(list(found.values())).endswith("all required parts work")


def test_old_and_missing_packages_have_remedies(small, monkeypatch):
    versions = {"torch": "2.0.1", "av": None}
    real = doctor.metadata.version

    def version(name):
        if versions.get(name, "") is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = examined()
    assert (found["torch"].ok, found["torch"].required) == (False, True)
    assert found["torch"].remedy.startswith("pip install 'torch>=")
    assert (found["av"].ok, found["av"].required) == (False, False)
    assert found["av"].remedy == "pip install 'pal-audio[av]'"
    text = doctor.report(list(found.values()))
    assert "FAIL  torch: 2.0.1, wanted >=" in text
    assert text.endswith("faults to fix: 1")


def test_flipped_byte_in_the_shipped_model(small, tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    shutil.copytree(small.bundle, folder)
    monkeypatch.setattr(doctor, "SHIPPED", folder)
    assert examined()["shipped model"].ok
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    diagnosis = examined()["shipped model"]
    assert not diagnosis.ok
    assert "SHA-256" in diagnosis.detail
    assert "pip install" in diagnosis.remedy
    monkeypatch.setattr(doctor, "TEXT_LLM", tmp_path / "nowhere")
    assert not examined()["its text-only LLM"].ok


@pytest.fixture
def driver(small, monkeypatch):
    """Linux with an NVIDIA driver."""
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")


def built_for(cuda):
    return "built for the CPU" if cuda is None else f"NVIDIA driver found, torch built for CUDA {cuda}"


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_torch_of_a_build_beside_a_driver(driver, tmp_path, monkeypatch, cuda):
    (tmp_path / "version.py").write_text(f"__version__ = '2.12.0'\ncuda: Optional[str] = {cuda!r}\nhip = None\n")
    find_spec = doctor.find_spec
    torch = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor, "find_spec", lambda name: torch if name == "torch" else find_spec(name))
    diagnosis = examined()["gpu"]
    assert (diagnosis.ok, diagnosis.required) == (cuda is not None, False)
    assert built_for(cuda) in diagnosis.detail
    assert ("CUDA build of torch" in diagnosis.remedy) == (cuda is None)


def test_torch_build_is_read_without_importing_torch(driver):
    import torch

    assert built_for(torch.version.cuda) in examined()["gpu"].detail


def test_full_disk(small, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    diagnosis = examined()["disk"]
    assert not diagnosis.ok
    assert diagnosis.remedy
