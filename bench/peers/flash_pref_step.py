"""A preference step with flash-pref's shared prefix, driven over stdin: flash_pref_step.py THREADS DEVICE

Runs in .venv-flash-pref (flash-pref 0.1.1 needs transformers below 4.52). The commands are those of
served.py; `load` takes `pairwise FOLDER`. On CUDA with flash-attn, attention shares the prefix, too, which
is what flash-pref was made for; else the prefix is unshared for SDPA, and everything else is shared. The LM
head runs on rows that predict a trained token.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

from served import PeerStep, serve  # first: it takes standard output for answers

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from flash_pref import shared_prefix  # pyrefly: ignore [missing-import]
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM


def load_model(folder: Path, device: torch.device) -> Qwen3ForCausalLM:
    """The model of a folder that a later transformers wrote."""
    fields = json.loads((folder / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    dtype = getattr(torch, fields.pop("dtype"))
    fields |= {"rope_theta": rope["rope_theta"], "torch_dtype": dtype, "use_cache": False}
    config = Qwen3Config(**fields)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    config._attn_implementation = "flash_attention_2" if flash else "sdpa"
    with device:
        model = Qwen3ForCausalLM._from_config(config, torch_dtype=dtype)
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file, device=str(device))
    strange = model.load_state_dict(weights, strict=False)
    assert not strange.unexpected_keys, strange.unexpected_keys
    assert set(strange.missing_keys) <= {"lm_head.weight"}, strange.missing_keys
    return model.train()


class FlashPrefStep(PeerStep[Qwen3ForCausalLM]):
    """Model and batch."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(load_model(folder, device), folder)
        self.device = device
        batch = {file.stem: np.load(file) for file in folder.glob("*.npy")}
        tokens, bounds, trained = batch["tokens"], batch["cu_seqlens"], batch["trained"]
        rows, longest = len(bounds) - 1, int(np.diff(bounds).max())
        ids, real = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.int64)
        wanted = np.zeros((rows, longest), np.bool_)
        for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
            ids[row, : stop - start], real[row, : stop - start] = tokens[start:stop], 1
            wanted[row, : stop - start] = trained[start:stop]
        self.inputs = {"input_ids": self._move(ids), "attention_mask": self._move(real)}
        self.wanted = self._move(wanted)[:, 1:]
        self.pairs, self.reference = self._move(batch["pairs"]), self._move(batch["reference"])
        self.beta = float(batch["beta"])

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def backward(self) -> float:
        rows = len(self.wanted)
        with shared_prefix(self.model, **self.inputs, group_size=rows):
            hidden = self.model.model(**self.inputs).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1][self.wanted]).float()
            targets = self.inputs["input_ids"][:, 1:][self.wanted]
            logprobs = -F.cross_entropy(logits, targets, reduction="none")
            owners = self.wanted.nonzero()[:, 0]
            margins = logprobs.new_zeros(rows).index_add(0, owners, logprobs) - self.reference
            first, second = self.pairs.unbind(1)
            loss = -F.logsigmoid(self.beta * (margins[first] - margins[second])).mean()
            loss.backward()
        return float(loss)


if __name__ == "__main__":
    serve(lambda kind, folder: FlashPrefStep(folder, torch.device(sys.argv[2])))
