"""Checks of a model folder before anything in it is loaded: each error is one line, with what mends it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mosaic_fast.errors import UserError
from mosaic_fast.policy.support import check_family

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_PLAIN_DTYPES = {"F64", "F32", "BF16", "F16"}
_QUANTISED = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What GPTQ, AWQ and ModelOpt write beside weights, not in config.json."""
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors format has it


def check_folder(folder: Path) -> dict[str, object]:
    """The config.json of a folder whose model can be trained; UserError for any other folder.

    Refused: no folder, no config.json, an adapter, quantised weights, a family that is not supported,
    weights that are missing, cut short, in pickles, or Git LFS pointers. Reads headers only.
    """
    config = check_config(folder)
    for file in weight_files(folder):
        read_header(file)
    return config


def check_config(folder: Path) -> dict[str, object]:
    """The part of `check_folder` that needs no weights."""
    _refuse_adapter(folder)
    config = read_config(folder)
    _refuse_quantised(folder, config)
    check_family(config)
    return config


def read_config(folder: Path) -> dict[str, object]:
    """config.json. UserError where there is none."""
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(
            f"{folder} is a file; make a folder of it: python -m mosaic_fast.setup.gguf {folder} FOLDER"
        )
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json: it is not the folder of a Hugging Face model")
    refuse_pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded. UserError where one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise UserError(f"{folder} holds no weights ({WEIGHTS} or {WEIGHTS_INDEX}){_instead(folder)}")
    refuse_pointer(index)
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        absent = [name for name in shards if not (folder / name).is_file()]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: {error}") from error
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of {len(shards)} weight files, the first is {absent[0]}: copy or "
            "download them anew"
        )
    return [folder / name for name in shards]


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype as the format names it, shape) of every tensor of a safetensors file.

    UserError that names the file where it is a pointer, damaged, cut short, or quantised.
    """
    refuse_pointer(file)
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {name: (str(of["dtype"]), tuple(map(int, of["shape"]))) for name, of in header.items()}
        end = 8 + length + max((int(of["data_offsets"][1]) for of in header.values()), default=0)
        size = file.stat().st_size
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: the weights are damaged or cut short ({error})") from None
    if size != end:
        raise UserError(
            f"{file}: the weights are damaged or cut short: {size} bytes, its header speaks of {end}; copy "
            "or download it anew"
        )
    for name, (dtype, _) in found.items():
        if dtype not in _PLAIN_DTYPES:
            raise UserError(f"{file}: {name} is of type {dtype}: {_NOT_QUANTISED}")
    return found


def refuse_pointer(file: Path) -> None:
    """UserError for what Git LFS leaves in place of a file that was not downloaded."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if start == _POINTER:
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}, or "
            "download the file"
        )


_NOT_QUANTISED = (
    "quantised weights cannot be trained; name the folder of the model as it was before, or one that was "
    "dequantised and saved anew"
)


def _refuse_adapter(folder: Path) -> None:
    if not (folder / _ADAPTER).is_file():
        return
    try:
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        base = None
    if any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise UserError(
            f"{folder} holds an adapter ({_ADAPTER}) beside a model's weights, and which of the two is meant "
            f"is not plain: move {_ADAPTER} and the adapter's weights away to train the weights, or merge "
            "the adapter into them (peft's merge_and_unload) and save that"
        )
    raise UserError(
        f"{folder} holds an adapter ({_ADAPTER}) and no model: merge it into its base"
        + (f", {base!r:.200}," if isinstance(base, str) and base else "")
        + " with peft's merge_and_unload, save that, and name its folder"
    )


def _refuse_quantised(folder: Path, config: Mapping[str, object]) -> None:
    nested = [part for part in config.values() if isinstance(part, Mapping)]
    for part in (config, *nested):
        for key in _QUANTISED:
            if part.get(key):
                settings = part[key]
                method = settings.get("quant_method") if isinstance(settings, Mapping) else None
                shown = f" ({method!s:.40})" if method else ""
                raise UserError(f"{folder}: {key} in config.json{shown}: {_NOT_QUANTISED}")
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            raise UserError(f"{folder} holds {name}: {_NOT_QUANTISED}")


def _instead(folder: Path) -> str:
    """What a folder without weights holds in their place."""
    kinds = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack"}
    others = sorted(f.name for f in folder.iterdir() if f.suffix in kinds)
    if not others:
        return ""
    mend = ""
    if any(Path(name).suffix == ".bin" for name in others):
        mend = "; pickles are never opened: load them with transformers and save_pretrained them anew"
    packed = [name for name in others if Path(name).suffix == ".gguf"]
    if packed:
        mend = f"; turn it into a folder: python -m mosaic_fast.setup.gguf {folder / packed[0]} NEW_FOLDER"
    return f"; it holds {', '.join(others[:4])}{mend}"
