"""A whole model as a folder, and on the Hugging Face Hub: weights, record and a model card."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import require_package
from ..files import write_whole_folder
from .builders import Builder
from .card import write_card
from .files import load_acu, merged, one_way, write_file
from .transformers_folder import load_transformers, transformers_record

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

#: The names of the files, as the hub expects them.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

#: In config.json: the other libraries that read such files do not take the folder for one of their own.
_MODEL_TYPE = "lightning_acu"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    builder: Builder | str | None = None,
    kwargs: dict[str, Any] | None = None,
    **more_kwargs: Any,
) -> None:
    """Save a converted model as a folder that :func:`from_pretrained` loads and that can be put on a hub.

    ``model.safetensors`` is the file of :func:`lightning_acu.save_acu`, with everything that is needed to load it;
    ``config.json`` repeats its record for people and tools; ``README.md`` is a model card with a picture of the shapes
    (``shapes.png``, if Matplotlib is installed) and the report (if rich is). All files are written, or none. In a
    folder that exists, a ``README.md`` is kept, since it may have been edited, and so are other files.

    Args:
        model, name, builder, kwargs, more_kwargs: as in :func:`lightning_acu.save_acu`.
        folder: the folder; it is created where it does not exist.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        TypeError, ValueError, OSError: as in :func:`lightning_acu.save_acu`.
    """
    folder = Path(folder)
    _save(model, folder, folder.resolve().name, folder.name, name, builder, merged(kwargs, more_kwargs))


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    name: str | None = None,
    builder: Builder | str | None = None,
    kwargs: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model with active convolutions",
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Upload what :func:`save_pretrained` writes to a repository on the Hugging Face Hub, in one commit.

    The repository is created if it does not exist. A model card that it has is kept.

    Args:
        model, name, builder, kwargs: as in :func:`lightning_acu.save_acu`.
        repo_id: "user/name".
        private: whether a repository that is created is private; None: as the user's settings say.
        token, revision, commit_message, create_pr, endpoint: as in ``huggingface_hub.HfApi``.

    Returns:
        The address of the commit.

    Raises:
        ModuleNotFoundError: huggingface_hub or safetensors is not installed.
        TypeError, ValueError: as in :func:`lightning_acu.save_acu`; nothing has been uploaded.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses, for example because you are not logged in.
    """
    api = _api("push_to_hub", token, endpoint)
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "model")
        _save(model, folder, repo_id.rpartition("/")[2], repo_id, name, builder, merged(kwargs, {}))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
        keep = api.file_exists(repo_id, CARD, revision=revision)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr,
            ignore_patterns=[CARD] if keep else None,
        )  # fmt: skip
    return str(commit.commit_url)


def from_pretrained(
    repo_id_or_folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    builder: Builder | None = None,
    trust_builder: bool = False,
    map_location: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> nn.Module:
    """The model of a folder of :func:`save_pretrained`, or of a repository on the Hugging Face Hub.

    It is as safe as :func:`lightning_acu.load_acu`, which reads the file ``model.safetensors``; nothing else is used.
    A folder that ``save_pretrained`` of a converted model of transformers wrote (a checkpoint of its Trainer) is read
    too: pass the class as ``builder``, which gets tensors and plain values.

    Args:
        repo_id_or_folder: a folder, if there is one of that name; otherwise "user/name" of a repository.
        model, builder, trust_builder, map_location: as in :func:`lightning_acu.load_acu`.
        revision, token, cache_dir, local_files_only, endpoint: of the repository, as in
            ``huggingface_hub.hf_hub_download``. A revision that is a commit's hash is the same model for ever.

    Returns:
        The model, in eval mode, or ``model``.

    Raises:
        FileNotFoundError: the folder has no such file, or there is no such folder (given as a ``Path``).
        ModuleNotFoundError: safetensors is not installed, or, for a repository, huggingface_hub.
        TypeError, ValueError: as in :func:`lightning_acu.load_acu`.
        huggingface_hub.errors.HfHubHTTPError, OSError: it cannot be downloaded.
    """
    folder = Path(repo_id_or_folder)
    if not folder.is_dir() and isinstance(repo_id_or_folder, str):
        api = _api("loading from a hub", token, endpoint)
        folder = Path(
            api.snapshot_download(
                repo_id_or_folder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
                allow_patterns=[CONFIG, WEIGHTS, "model-*-of-*.safetensors"],
            )
        )  # fmt: skip
    if (config := transformers_record(folder)) is not None:
        one_way(model, builder, trust_builder)
        require_package("safetensors", "loading from a folder")
        with torch.inference_mode(False):  # the parameters have to be able to learn afterwards
            loaded = load_transformers(folder, config, model, builder, trust_builder)
        return loaded if map_location is None else loaded.to(map_location)  # type: ignore[arg-type]
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"`repo_id_or_folder` (={str(repo_id_or_folder)!r}) is not a folder or repository with a file {WEIGHTS}"
        )
    return load_acu(path, model=model, builder=builder, trust_builder=trust_builder, map_location=map_location)


def _save(
    model: nn.Module, folder: Path, title: str, where: str, name: str | None, builder: Builder | str | None,
    kwargs: dict[str, Any],
) -> None:  # fmt: skip
    def write(temporary: Path) -> None:
        record = write_file(model, temporary / WEIGHTS, name, builder, kwargs)
        content = {"model_type": _MODEL_TYPE, "lightning_acu": record}
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_card(temporary, model, record, title, where)
        if (folder / CARD).exists():
            (temporary / CARD).unlink()

    write_whole_folder(folder, write)


def _api(purpose: str, token: str | bool | None, endpoint: str | None) -> Any:
    require_package("huggingface_hub", purpose)
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token, library_name="lightning_acu")
