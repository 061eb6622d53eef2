"""`push`: upload of a verified bundle to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pal import bundle
from pal.errors import BundleError
from pal.files import MANIFEST, verify
from pal.pretrained import KNOWN

_CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """Result of an upload: repository, commit and files."""

    repo: str
    url: str
    commit: str | None
    files: list[str]
    size: int
    """Bytes of the files."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return asdict(self)


def push(
    path: str | Path, repo: str, private: bool | None = None, message: str | None = None, token: str | None = None
) -> Pushed:
    """Upload the files of a bundle's manifest; the repository is created if it does not exist.

    Args:
        path: folder of the bundle, or of the run that made it.
        repo: Hub id.
        private: visibility of a new repository; None for the default of the account.
        message: commit message.
        token: access token of the Hub; by default, the one saved by `hf auth login`.

    Raises:
        BundleError: a changed file, a bundle that needs a local folder, or a refusal of the Hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not Path(path).exists():
        raise BundleError(f"{path}: no such folder; give one that save_pretrained wrote")
    folder = bundle.find(path)
    files = [*verify(folder), MANIFEST]
    if (folder / _CARD).is_file() and _CARD not in files:
        files.append(_CARD)
    _check_sources(folder)
    try:
        validate_repo_id(repo)
        api = HfApi(token=token)
        url = api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message or "Upload with pal push",
        )
    except HFValidationError:
        raise BundleError(f"'{repo}' is no Hub id; write it as name/model") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        remedy = "log in with: hf auth login" if _is_refusal(error) else "check the connection and the id"
        raise BundleError(f"{repo}: the Hub did not take it ({reason[:300]}); {remedy}") from None
    size = sum((folder / name).stat().st_size for name in files)
    return Pushed(url.repo_id, str(url), getattr(done, "oid", None), sorted(files), size)


def _is_refusal(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) in (401, 403) or "token" in type(error).__name__.lower()


def _check_sources(folder: Path) -> None:
    """Raise BundleError if the weights of a part would be loaded from a local folder, which others lack."""
    description = bundle.read_description(folder)
    left_out = {".".join(name.split(".")[:3]) for name in description["left_out"]}
    model = description["model"]
    named = {}
    if any(part.startswith("llm.") for part in left_out):
        named["LLM"] = model["llm"]["path"]
    for i, encoder in enumerate(model["encoders"]):
        if f"ears.encoders.{i}" in left_out:
            named[f"encoder {i}"] = encoder.get("path")
    for part, source in named.items():
        if source and source not in KNOWN and Path(source).exists():
            raise BundleError(
                f"{folder}: its {part} is the folder {source} of this machine, which others lack; "
                "save it with full=True, or name the Hub id it came from"
            )
