"""Bundles: a model as a folder of safetensors, configuration and tokenizer, with digests checked on load.

A bundle holds the weights that are new or trained, or all (`full`). Weights left out are listed with their SHA-256
and loaded from their source, so that another LLM or encoder is noticed; sketches of them tell how far it differs. The
tokenizer is left out with the LLM where `pal.source_tokenizer` knows its source. transformers' Auto classes read and
write the same folder through `pal.hf`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pal import shipped, source_tokenizer
from pal.backbone.finetuning import LoRA
from pal.config import parse
from pal.errors import BundleError, WeightsWarning
from pal.files import MANIFEST, amend, atomic_folder, recover, verify, write_tensors
from pal.model_config import LLMConfig, ModelConfig
from pal.sketches import relative_difference, sketch, sketches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pal.model import PalModel

FORMAT = 2
_CONFIG = "config.json"
_PROCESSOR = "processor_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SKETCHES = "left_out.safetensors"
"""Sketches of the weights left out, one row for each in the order of their names; older bundles have none."""
_ENCODERS = "ears.encoders."
_TRANSFORMERS = {"model_type": "pal", "architectures": ["PalForConditionalGeneration"]}
"""Keys of `config.json` by which transformers' Auto classes find the model class."""
_WRAPPED = "pal."
"""Prefix of weight names in `pal.hf.PalForConditionalGeneration`. transformers compares the names in an index with the
model's before it calls our code, so weights in several files have this prefix."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


def save(
    model: PalModel,
    folder: str | Path,
    full: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write `model` as a bundle, atomically.

    Args:
        model: any model.
        folder: folder of the bundle; an existing bundle is replaced.
        full: also write untrained weights that could be loaded from their source.
        dtype: type of floating-point weights on disk; `load` restores the model's own type.
        max_shard_size: largest file of weights, in bytes or with a unit ("5GB"); tensors are not split.
        extra: name and text of further files.

    Raises:
        BundleError: `max_shard_size` is no size.
    """
    largest = _bytes(max_shard_size)
    state = model.state_dict()
    # Compare memory, not only names: tied weights have two names, and only one is in `trained`.
    ours = {tensor.data_ptr() for name, tensor in state.items() if full or _is_ours(model, name)}
    kept = {name: tensor for name, tensor in state.items() if tensor.data_ptr() in ours}
    description = {**describe(model), "left_out": _left_out(model, set(kept))}
    if any(_part_of(name) == "llm" for name in description["left_out"]):
        description["tokenizer"] = source_tokenizer.named(model)
    with atomic_folder(Path(folder)) as temporary:
        _write_weights(kept, temporary, dtype, largest)
        (temporary / _CONFIG).write_text(_json(description))
        (temporary / _PROCESSOR).write_text(_json(_processor(model)))
        if description["left_out"]:
            rows = sketches({name: state[name] for name in description["left_out"]})
            write_tensors(temporary / _SKETCHES, {"sketches": rows})
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text)
        if description["tokenizer"] is None:
            model.tokenizer.save_pretrained(temporary)


def describe(model: PalModel) -> dict[str, Any]:
    """Content of `config.json` for a model whose weights are all in the bundle."""
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    model.llm.note_ties()
    return {
        **_TRANSFORMERS,
        # None for several types: each part then has that of its source
        "dtype": str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None,
        "format": FORMAT,
        "model": model.config.model_dump(mode="json"),
        "llm": model.llm.lm.config.to_dict(),
        "encoders": [
            {"name": part["name"], **model.ears.encoder(i).standalone_config().model_dump(mode="json")}
            for i, part in enumerate(model.config.encoders)
        ],
        "lora": None if model.llm.lora is None else model.llm.lora.model_dump(),
        "left_out": {},
        "tokenizer": None,
    }


def load(path: str | Path, dtype: torch.dtype | None = None, other_weights: bool = False, **hub: Any) -> PalModel:
    """Read a bundle, in evaluation mode on the CPU.

    Args:
        path: folder of the bundle or of the training run that made it, or a Hub id.
        dtype: type of the weights in memory; by default, the type they had when they were saved.
        other_weights: go on with a `WeightsWarning` where weights at the source of the LLM or encoder, or the LLM's
            tokenizer, are not those that the bundle was made with, such as another quantisation of the same LLM.
        hub: options of huggingface_hub's snapshot_download, such as `revision` and `token`.

    Raises:
        BundleError: missing, damaged, of another format, or with another LLM, tokenizer or encoder at the source.
    """
    folder = find(path, **hub)
    files = verify(folder)
    description = read_description(folder)
    weights = _read_weights(folder, set(files))
    tokenizer = source_tokenizer.load(description.get("tokenizer"), folder, other_weights, local_files_only=True)
    model = _build(description, {_part_of(name) for name in description["left_out"]}, tokenizer, f"bundle {folder}")
    if description.get("dtype"):
        cast(model, getattr(torch, description["dtype"]))
    different = _differences(model, description["left_out"], folder)
    if different is not None and not other_weights:
        raise BundleError(f"{different}; get those, or go on with other_weights=True (--other-weights)")
    _fill(model, weights, set(description["left_out"]), folder)
    if different is not None:
        warnings.warn(f"{different}; answers will differ", WeightsWarning, stacklevel=2)
    if dtype is not None:
        cast(model, dtype)
    # weights that differ from their source must be in the next bundle, too
    model.trained = {name for name in weights if _part_of(name) == "llm" or name.startswith(_ENCODERS)}
    model.source = next((name for name, own in shipped.FOLDERS.items() if own == folder), str(path))
    return model.eval()


def untrained(description: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PalModel:
    """A model built from a description of `describe`, with random weights."""
    return _build(description, set(), tokenizer, _CONFIG)


def cast(model: PalModel, dtype: torch.dtype) -> None:
    """Convert all weights to a floating-point type; buffers outside the state dict, such as RoPE's, keep theirs.

    Raises:
        ConfigError: a type that `LLMConfig.dtype` does not allow.
    """
    name = str(dtype).removeprefix("torch.")
    llm = parse(LLMConfig, {**model.config.llm.model_dump(), "dtype": name}, where="dtype")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    lasting = set(model.state_dict())
    for place, buffer in list(model.named_buffers()):
        if place in lasting and buffer.is_floating_point():
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, buffer.to(dtype))
    model.config = model.config.model_copy(update={"llm": llm})
    model.llm.lm.config.dtype = dtype


def upgrade(folder: str | Path) -> None:
    """Add the files of transformers' Auto classes to a bundle of an earlier version; its weights stay the same.

    Raises:
        BundleError: as `load`.
    """
    folder = find(folder)
    model = load(folder)
    description = {**describe(model), **read_description(folder)}
    amend(folder, {_CONFIG: _json(description).encode(), _PROCESSOR: _json(_processor(model)).encode()})


def read_architecture(path: str | Path) -> tuple[ModelConfig, LoRA | None]:
    """Configuration of a local bundle, changed to build it with random weights, and its LoRA options.

    Raises:
        BundleError: no bundle, or one of another format.
    """
    if not Path(path).exists():
        raise BundleError(f"{path}: no such folder; give one that save_pretrained wrote")
    folder = find(path)
    description = read_description(folder)
    where = f"bundle {folder}"
    config = _model_config(description, where)
    llm = LLMConfig(fresh=description["llm"], dtype=config.llm.dtype)
    shape = config.model_copy(update={"llm": llm, "encoders": description["encoders"]})
    return shape, _lora_of(description, where)


def find(path: str | Path, **hub: Any) -> Path:
    """Folder of a bundle: `path` itself, `model/` in a run folder, or a download from the Hub.

    Raises:
        BundleError: no such bundle.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        recover(candidate)
        if (candidate / MANIFEST).is_file():
            return candidate
    if folder.exists() or not _is_hub_id(str(path)):
        raise BundleError(
            f"{path}: not a bundle (no {MANIFEST}); give a folder that save_pretrained wrote, or a Hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: no such folder, and the Hub did not give it ({reason})") from None


def read_description(folder: Path) -> dict[str, Any]:
    """Content of a bundle's `config.json`; see `describe`.

    Raises:
        BundleError: another format.
    """
    description: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    if description.get("format") != FORMAT:
        raise BundleError(
            f"{folder}: format {description.get('format')}, this version reads {FORMAT}; upgrade pal-audio"
        )
    return description


def _processor(model: PalModel) -> dict[str, Any]:
    """Content of `processor_config.json`: the options of `pal.hf.PalProcessor`."""
    return {
        "processor_class": "PalProcessor",
        "sampling_rate": model.sampling_rate,
        "system": model.config.system,
        "after_clip": model.config.after_clip,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def _build(
    description: Mapping[str, Any], from_source: set[str], tokenizer: PreTrainedTokenizerBase, where: str
) -> PalModel:
    """Build the model of a description; parts in `from_source` load their weights, others get random ones."""
    from pal.model import PalModel

    config = _model_config(description, where)
    sources: dict[str, Any] = {}
    # A part with all its weights in the bundle is built without its source.
    if "llm" not in from_source:
        sources["llm"] = LLMConfig(fresh=description["llm"], dtype=config.llm.dtype)
    sources["encoders"] = [
        given if f"{_ENCODERS}{i}" in from_source else alone
        for i, (given, alone) in enumerate(zip(config.encoders, description["encoders"], strict=True))
    ]
    model = PalModel.from_config(config.model_copy(update=sources), tokenizer)
    model.config = config
    # Training may have changed the source's architecture: more embeddings, or an untied LM head.
    if model.llm.vocab != description["llm"]["vocab_size"]:
        model.llm.resize_vocab(description["llm"]["vocab_size"], mean_resizing=False)
    if model.llm.lm.config.tie_word_embeddings and not description["llm"].get("tie_word_embeddings", True):
        model.llm.untie_head()
    lora = _lora_of(description, where)
    if lora is not None:
        model.llm.add_lora(lora)
    return model


def _model_config(description: Mapping[str, Any], where: str) -> ModelConfig:
    """The model's configuration; bundles of earlier versions have a line break after each clip and do not say so."""
    return parse(ModelConfig, {"after_clip": "\n", **description["model"]}, where=where)


def _lora_of(description: Mapping[str, Any], where: str) -> LoRA | None:
    """LoRA options; None without LoRA. Earlier bundles say `rank` for `r`."""
    options = description["lora"]
    if not options:
        return None
    return parse(LoRA, {"r" if name == "rank" else name: value for name, value in options.items()}, where=where)


def _write_weights(kept: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None, largest: int) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in kept.items():
        width = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()
        if shards[-1] and size + tensor.numel() * width > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.numel() * width
        total += tensor.numel() * width
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    before = _WRAPPED
    if len(shards) == 1:
        files, before = [_WEIGHTS], ""
    for file, names in zip(files, shards, strict=True):
        tensors = {before + name: _for_disk(kept[name], dtype) for name in names}
        write_tensors(folder / file, tensors, {"format": "pt"})
    if len(shards) > 1:
        where = {before + name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / _INDEX).write_text(_json({"metadata": {"total_size": total}, "weight_map": where}))


def _read_weights(folder: Path, checked: set[str]) -> dict[str, Tensor]:
    """Weights of the single file, or of all shards; only files in the manifest are read."""
    files = [_WEIGHTS]
    if _INDEX in checked:
        files = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for file in files:
        if file not in checked:
            raise BundleError(f"{folder}: '{file}' is not in its {MANIFEST}; copy the folder again")
        weights |= {name.removeprefix(_WRAPPED): tensor for name, tensor in load_file(folder / file).items()}
    return weights


def _bytes(size: int | str) -> int:
    found = _SIZE.fullmatch(str(size))
    number = 0
    if found is not None:
        step = 1024 if found[3] else 1000
        number = int(float(found[1]) * step ** " KMGT".index((found[2] or " ").upper()))
    if number < 1:
        raise BundleError(f"max_shard_size '{size}' is no size; give bytes, or a number and a unit such as '5GB'")
    return number


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(part and part.replace("-", "").replace("_", "").replace(".", "") for part in parts)


def _part_of(name: str) -> str:
    """Prefix of a weight's part, such as `llm` or `ears.encoders.0`; a part has one source."""
    return ".".join(name.split(".")[: 3 if name.startswith(_ENCODERS) else 1])


def _is_ours(model: PalModel, name: str) -> bool:
    """Whether the tensor exists nowhere else, since it was initialised or trained here."""
    if _part_of(name) == "llm":
        return model.config.llm.path is None or name in model.trained or "lora_" in name
    if name.startswith(_ENCODERS):
        part = _part_of(name)
        options = model.config.encoders[int(part.removeprefix(_ENCODERS))]
        return "path" not in options or any(n.startswith(f"{part}.") for n in model.trained)
    return True


def source_weights(model: PalModel, names: Collection[str]) -> dict[str, Tensor]:
    """Weights as in their source (LLM or encoder), without later training."""
    description = describe(model)
    fresh = _build(description, {_part_of(name) for name in names}, model.tokenizer, _CONFIG)
    if description["dtype"]:
        cast(fresh, getattr(torch, description["dtype"]))
    state = fresh.state_dict()
    return {name: state[name] for name in names}


def source_digests(model: PalModel) -> dict[str, str]:
    """Name and SHA-256 of each weight that can be loaded from its source, since training has not changed it."""
    return _left_out(model, {name for name in model.state_dict() if _is_ours(model, name)})


def _left_out(model: PalModel, kept: set[str]) -> dict[str, str]:
    """Name and SHA-256 of each tensor that the bundle does not hold."""
    return digests({name: tensor for name, tensor in model.state_dict().items() if name not in kept})


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, on all cores: on one, half a gigabyte takes a second."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _for_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Copy: safetensors refuses tensors that share memory, such as tied embeddings.
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).clone().contiguous()


def _differences(model: PalModel, left_out: Mapping[str, str], folder: Path) -> str | None:
    """How far weights at their source differ from those that the bundle was made with; None where none does."""
    state = model.state_dict()
    found = digests({name: state[name] for name in sorted(left_out) if name in state})
    different = [name for name, own in found.items() if own != left_out[name]]
    if not different:
        return None
    parts = [_source_of_part(model, part) for part in dict.fromkeys(map(_part_of, different))]
    text = f"{folder}: {len(different)} of {len(left_out)} weights found in {' and '.join(parts)} are not those of then"
    if not (folder / _SKETCHES).is_file():
        return f"{text}, such as '{different[0]}'"
    then = dict(zip(sorted(left_out), load_file(folder / _SKETCHES)["sketches"], strict=True))
    far = {name: relative_difference(then[name], sketch(state[name])) for name in different}
    name = max(far, key=far.__getitem__)
    return f"{text}; '{name}' differs most, by about {far[name]:.2g} of its norm"


def _source_of_part(model: PalModel, part: str) -> str:
    """Source of a part's weights, quoted."""
    if part == "llm":
        return f"'{model.config.llm.path}'"
    return f"'{model.config.encoders[int(part.removeprefix(_ENCODERS))].get('path')}'"


def _fill(model: nn.Module, weights: dict[str, Tensor], left_out: set[str], folder: Path) -> None:
    own: dict[str, Any] = model.state_dict()
    missing = set(own) - set(weights) - left_out
    unknown = set(weights) - set(own)
    if missing or unknown:
        name = sorted(missing or unknown)[0]
        raise BundleError(f"{folder}: its weights do not fit its configuration (first: '{name}'); save it again")
    with torch.no_grad():
        for name, tensor in weights.items():
            if own[name].shape != tensor.shape:
                raise BundleError(f"{folder}: '{name}' has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
            own[name].copy_(tensor)
