"""The doctor's findings: version ranges against packaging's own rules, and each fault with its remedy."""

import shutil

import pytest
from packaging.specifiers import SpecifierSet

from pal.app import doctor


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.11.0", "2.13.0+cpu", "3.0", "5.17", "5.17.2", "6", "6.0.1"])
@pytest.mark.parametrize(
    "wanted", [">=2.11", ">=5.17,<6", "==2.11", "!=2.11,>2", "<=2.13", ">2.11", "~=5.17", "~=2.11.0", ""]
)
def test_ranges_agree_with_packaging(version, wanted):
    assert doctor.satisfies(version, wanted) is SpecifierSet(wanted).contains(version.partition("+")[0])


def names(findings):
    return {finding.name: finding for finding in findings}


def test_this_machine_passes(assets, monkeypatch):
    monkeypatch.setattr(doctor, "SHIPPED", assets.bundle)
    monkeypatch.setattr(doctor, "TEXT_LLM", assets.llm)
    found = names(doctor.examine())
    assert all(finding.ok for finding in found.values() if finding.required)
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
    assert doctor.report(list(found.values())).endswith("everything that the main job needs works")


def test_old_and_missing_packages_have_remedies(monkeypatch):
    versions = {"torch": "2.0.1", "av": None}
    real = doctor.metadata.version

    def version(name):
        if versions.get(name, "") is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = names(doctor._packages())
    assert (found["torch"].ok, found["torch"].required) == (False, True)
    assert found["torch"].remedy.startswith("pip install 'torch>=")
    assert (found["av"].ok, found["av"].required) == (False, False)
    assert found["av"].remedy == "pip install 'pal-audio[av]'"
    text = doctor.report(list(found.values()))
    assert "FAIL  torch: 2.0.1, wanted >=" in text
    assert text.endswith("1 to mend")


def test_flipped_byte_in_the_shipped_model(assets, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(assets.bundle, folder)
    assert doctor._shipped("shipped model", folder).ok
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    finding = doctor._shipped("shipped model", folder)
    assert not finding.ok
    assert "SHA-256" in finding.detail
    assert "pip install" in finding.remedy
    assert not doctor._shipped("shipped model", tmp_path / "nowhere").ok


def test_cpu_torch_beside_a_driver(monkeypatch):
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: None)
    finding = doctor._gpu()
    assert (finding.ok, finding.required) == (False, False)
    assert "CUDA build of torch" in finding.remedy
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "13.0")
    assert doctor._gpu().detail == "NVIDIA driver found, torch built for CUDA 13.0"


def test_torch_build_is_read_without_importing_torch():
    import torch

    assert doctor._torch_cuda() == torch.version.cuda


def test_full_disk(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    finding = doctor._disk()
    assert not finding.ok
    assert finding.remedy
