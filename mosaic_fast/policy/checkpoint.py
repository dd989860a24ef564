"""A model from a local folder, and back to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy.folder import WEIGHTS, check_folder

_GENERATION = "generation_config.json"

Report = dict[str, Iterable[object]]
"""What transformers says of a load: parameter names by kind of problem."""


def load_model(path: Path, dtype: torch.dtype | str, device: torch.device | str) -> PreTrainedModel:
    """A causal LM in the given precision on the given device; nothing is ever downloaded.

    UserError for a missing folder, a folder without config or safetensors weights, a family that is not
    supported, damaged or incomplete weights, and a GGUF file: `mosaic_fast.setup.gguf` makes a folder of it.
    """
    dtype = _as_dtype(dtype)
    model, report = _load_folder(path, dtype)
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if report.get(
            problem
        ):  # transformers would go on: with random values, or without a part of the model
            names = sorted(map(str, report[problem]))
            more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
            raise UserError(
                f"{path}: the weights do not fit the model of config.json, {problem}: "
                f"{', '.join(names[:3])}{more}; use the config.json that belongs to them, or save the folder "
                "anew without what the model does not use"
            )
    _refuse_broken_values(path, model)
    _mend_generation(path, model)
    if model.config.tie_word_embeddings and not is_tied(model):
        model.config.tie_word_embeddings = False  # the folder has a head of its own, and so will checkpoints
    module: torch.nn.Module = model
    module.to(device)
    return model


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the LM head is the embedding by another name."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights by name, as `state_dict` gives them, but whole also while shards are gathered."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | kept).items():
            if tensor is not None:
                found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found


def save_model(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """config.json, generation_config.json and one model.safetensors; tied weights are written once.

    weights: to write instead of the model's own, such as those with an adapter merged in.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: a model is saved in a folder")
    try:
        with _quiet():
            tensors = dict(weights_of(model) if weights is None else weights)  # emptied as written
            model.save_pretrained(folder, state_dict=tensors, max_shard_size="1000TB")
    except ValueError as error:  # of a generation_config.json that contradicts itself
        raise UserError(f"{folder}: transformers cannot save the model: {in_one_line(error)}") from error


def check_saved(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """UserError unless a folder just saved is a model that loads, with these very weights, bit for bit.

    The model is made of config.json without memory for its weights, and the file is read once, a tensor at a
    time: no more than a checksum of it costs. Families that transformers writes in another form than it has
    them, such as experts one by one, are loaded as a whole.
    """
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if (folder / _GENERATION).is_file():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise UserError(f"transformers cannot make its model again: {in_one_line(error)}") from error
    tied = set(model.all_tied_weights_keys)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    with safe_open(str(folder / WEIGHTS), framework="pt", device="cpu") as file:
        different = set(file.keys()) ^ set(expected)
        read: Callable[[str], torch.Tensor] = file.get_tensor
        if different:
            loaded, report = _load_folder(folder, next(iter(weights.values())).dtype)
            lost = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
            if lost:
                raise UserError(f"{WEIGHTS} lacks or adds {min(different)}")
            read = loaded.state_dict().__getitem__
        for name, shape in expected.items():
            saved, own = read(name), weights[name].detach().cpu().contiguous()
            same = saved.shape == own.shape == shape and saved.dtype == own.dtype
            if not same or not torch.equal(saved.view(torch.uint8), own.view(torch.uint8)):
                raise UserError(f"{WEIGHTS} has {name} with other values than the model")


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Report]:
    check_folder(folder)
    try:
        if (folder / _GENERATION).is_file():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder}: {_GENERATION}: {in_one_line(error)}; correct or remove it") from error
    try:
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,  # code in the folder is never run, nor is anybody asked
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused by the caller
            )
    except SafetensorError as error:
        raise UserError(f"{folder}: the weights are damaged or cut short ({error})") from error
    except Exception as error:  # a value of config.json can break any line of transformers
        raise UserError(f"{folder}: transformers cannot load the model: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """The message of another library's error, cut to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3])[:300]
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _refuse_broken_values(path: Path, model: torch.nn.Module) -> None:
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{path}: the weights hold NaN or infinite values, the first in {name}")


def _mend_generation(path: Path, model: PreTrainedModel) -> None:
    """Mend or refuse a generation_config.json that transformers loads, but would not save in a checkpoint."""
    generation = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
        return
    except ValueError:
        generation.do_sample = True  # temperature and its like, in a file that says nothing of sampling
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"{path}: generation_config.json: {in_one_line(error)}; correct or remove it"
        ) from None


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not a floating type such as 'float32' or 'bfloat16'")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers; the caller's setting comes back."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
