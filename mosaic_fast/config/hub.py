"""Models and data by their name on the Hugging Face hub, beside folders on this machine. No torch.

| written | what it is |
|---|---|
| `org/name` | a path of this machine where there is one, or a folder `org`; else the hub's repository |
| `hf:org/name` | the hub's repository, whatever lies here |
| `...@revision` | a branch, a tag or a commit; without it `main` |
| `...:path` | one file of a repository of data |

A name is pinned before anything else reads it: `hf:org/name@COMMIT` is what a run keeps in its config.toml,
so that it is resumed with the same files. Files lie in the hub's own cache (`HF_HOME`) and are downloaded
once; a token comes from `HF_TOKEN` and is kept nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mosaic_fast.errors import UserError

Kind = Literal["model", "dataset"]
_NAME = re.compile(
    r"(?P<prefix>hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FEW = ("config.json", "mosaic_fast.json")
"""Files of a model that its configuration needs: how large it is, and what its run had."""
_MODEL = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*")
_DATA = ("*.json", "*.jsonl", "*.csv")
_LEFT_OUT = ("*/*", "consolidated*", "*.index.fp16.json")
"""Files below the top folder are the same weights for other programs (onnx/, original/)."""


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, at a revision."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def is_pinned(self) -> bool:
        """Whether its revision is a commit, which always names the same files."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def hub_name(text: str) -> HubName | None:
    """The name on the hub that a path is; None for a path of this machine.

    >>> hub_name("hf:org/agent@v1")
    HubName(repo='org/agent', revision='v1', file=None)
    >>> hub_name("data/tasks.jsonl") is None
    True
    """
    found = _NAME.fullmatch(text)
    if found is None:
        return None
    repo = Path(found["repo"])
    if not found["prefix"] and (
        Path(text).exists()
        or repo.parent.is_dir()  # a folder mistyped beside others is not told to the hub
        or (repo.suffix in (".json", ".jsonl") and text == found["repo"])
    ):
        return None
    return HubName(found["repo"], found["revision"], found["file"])


def pinned(text: str, key: str, kind: Kind) -> str:
    """A path, or the name on the hub with the commit that it stands for now.

    What the configuration needs of a model, and data as a whole, are in the cache afterwards. Without network
    it is the commit that the cache has. key: of the setting, for the UserError where neither knows the name.
    """
    name = hub_name(text)
    if name is None:
        return text
    if name.is_pinned and cached_folder(text) is not None:
        return str(name)
    folder = _snapshot(name, text, key, kind, _FEW if kind == "model" else _DATA)
    return str(replace(name, revision=folder.name))


def model_files(text: str, *, weights: bool = True) -> Path:
    """The folder of a model, downloaded where it is a name on the hub. UserError where it cannot be had.

    weights: False for the files alone that say what the model is.
    """
    name = hub_name(text)
    if name is None:
        return Path(text)
    return _snapshot(name, text, "model.path", "model", _MODEL if weights else _FEW)


def data_path(text: str, key: str = "env.tasks", *, folder: bool = False) -> Path:
    """The file of tasks that a path or name stands for; a folder of data where the environment takes one.

    UserError where the repository has several and none is named.
    """
    name = hub_name(text)
    if name is None:
        return Path(text)
    found = _snapshot(name, text, key, "dataset", _DATA)
    if name.file is not None:
        if not (found / name.file).exists():
            raise UserError(f"{key}: {name.repo} has no {name.file} at {found.name}")
        return found / name.file
    if folder:
        return found
    files = sorted(found.rglob("*.jsonl")) or sorted(found.rglob("*.json"))
    if len(files) != 1:
        listed = ", ".join(file.relative_to(found).as_posix() for file in files[:5])
        what = f"several files of tasks ({listed}): name one," if files else "no JSON Lines file:"
        raise UserError(f"{key}: {name.repo} has {what} for example {key} = 'hf:{name.repo}:tasks.jsonl'")
    return files[0]


def cached_folder(text: str) -> Path | None:
    """The folder of a pinned model in the cache, without any network; None where it is not there."""
    name = hub_name(text) if text.startswith("hf:") else None
    if name is None or not name.is_pinned:
        return None
    from huggingface_hub import constants, file_download

    folder = Path(
        constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=name.repo, repo_type="model")
    )
    folder = folder / "snapshots" / str(name.revision)
    return folder if (folder / "config.json").exists() else None


def download_bytes(text: str) -> int | None:
    """How many bytes of a model are still to be downloaded; None for a folder of this machine."""
    name = hub_name(text)
    if name is None:
        return None
    from huggingface_hub import DryRunFileInfo

    found = _ask(name, text, "model.path", "model", _MODEL, dry_run=True)
    assert isinstance(found, list)
    left = [file for file in found if isinstance(file, DryRunFileInfo) and file.will_download]
    return sum(file.file_size or 0 for file in left)


def _snapshot(name: HubName, text: str, key: str, kind: Kind, patterns: Sequence[str]) -> Path:
    return Path(str(_ask(name, text, key, kind, patterns)))


def _ask(
    name: HubName, text: str, key: str, kind: Kind, patterns: Sequence[str], *, dry_run: bool = False
) -> object:
    """What huggingface_hub gives for the files of a repository that match; its errors as one line."""
    from huggingface_hub import errors, snapshot_download

    ignored = list(_LEFT_OUT) if kind == "model" else None
    here = "" if text.startswith("hf:") else f"there is no folder {text} here, and "
    what = name.repo if kind == "model" else f"the data set {name.repo}"
    try:
        return snapshot_download(
            name.repo, repo_type=kind, revision=name.revision, dry_run=dry_run,
            allow_patterns=list(patterns), ignore_patterns=ignored,
        )  # fmt: skip
    except errors.GatedRepoError:
        why = (
            f"the hub gives {what} only to those who accepted its terms: accept them there, and set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        why = f"the hub's {what} has no revision {name.revision!r}"
    except errors.RepositoryNotFoundError:
        why = f"the hub has no {what}; if it is private, set HF_TOKEN"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.DryRunError):
        why = f"the hub cannot be reached for {what}, which its cache does not have; name a folder instead"
    except errors.HfHubHTTPError as error:
        why = f"the hub answers {error.response.status_code} for {what}"
    except Exception as error:  # noqa: BLE001  its HTTP library, its checks of names and the disk raise their own
        why = f"{what} cannot be downloaded: {' '.join(str(error).split())[:200]}"
    raise UserError(f"{key}: {here}{why}")
