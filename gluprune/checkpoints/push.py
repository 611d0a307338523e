"""`push_to_hub`: upload a checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path

from gluprune.checkpoints.card import read_history
from gluprune.io.hub import check_hub_id, first_line
from gluprune.io.shards import read_checkpoint


def push_to_hub(folder: str | Path, name: str, *, private: bool = True) -> str:
    """Upload a checkpoint folder to the Hub, in one commit: all of its files arrive, or none.

    Log in first (`hf auth login`, or the variable `HF_TOKEN`). A pruned checkpoint brings its model card, which names
    the dense model and its licence: check that the licence allows you to pass the model on.

    Args:
        folder: A folder that `save`, `prune_checkpoint`, `shrink` or `export` wrote.
        name: `owner/name`. The repository is created if it does not exist.
        private: Whether a repository that is created is private; one that exists stays as it is.

    Returns:
        The address of the commit.

    Raises:
        ValueError: `name` is not `owner/name`, or the folder holds no complete checkpoint. Nothing is uploaded.
        RuntimeError: The Hub refused, or cannot be reached; the message says why.

    Example:
        >>> import gluprune
        >>> model = gluprune.load(model_path)
        >>> report = gluprune.prune(model, pruning_ratio=0.25)
        >>> narrow = gluprune.save(model, folder / "narrow")
        >>> address = gluprune.push_to_hub(narrow, "me/narrow")
    """
    check_hub_id(name)
    folder = Path(folder)
    for needed in ("", "config.json"):
        if not (folder / needed).exists():
            raise ValueError(f"{folder / needed} does not exist: give the folder of a checkpoint")
    read_checkpoint(folder)
    from huggingface_hub import HfApi

    history = read_history(folder)
    origin = f", pruned from {history.base_model}" if history and history.base_model else ""
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        uploaded = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload by gluprune{origin}")
    except Exception as error:  # the Hub client passes on errors of many kinds
        raise RuntimeError(f"could not upload {folder} to {name}: {first_line(error)}") from error
    return str(uploaded.commit_url)
