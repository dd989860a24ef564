"""A model as its config.json describes it, without weights: parameters have shapes and no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.lora import Lora
from mosaic_fast.policy.checkpoint import in_one_line
from mosaic_fast.policy.folder import check_config
from mosaic_fast.policy.support import check_model


def shape_of(folder: Path, config: Config) -> PreTrainedModel:
    """The policy on the meta device, with adapters where the run has them.

    UserError for a folder that is missing or has no config.json, and for a model that is not supported.
    """
    if not folder.is_dir():
        raise UserError(
            f"model.path: there is no folder {folder}. Download the model there, or name where it is with "
            "--model.path; --dry-run needs no more of it than its config.json"
        )
    try:
        check_config(folder)
    except UserError as error:
        raise UserError(f"model.path: {folder}: {error}") from None
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described, dtype=getattr(torch, config.model.dtype))
    except Exception as error:  # noqa: BLE001  a value of config.json can break any line of transformers
        raise UserError(f"model.path: {folder / 'config.json'}: {in_one_line(error)}") from None
    check_model(model)
    if config.model.lora_rank:
        Lora(model, config.model, config.seed)
    return model.train()
