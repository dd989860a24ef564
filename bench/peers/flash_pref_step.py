"""A preference step with flash-pref's shared prefix, driven over stdin: flash_pref_step.py THREADS DEVICE

Runs in .venv-flash-pref (flash-pref 0.1.1 needs transformers below 4.52). The commands are those of
trl_step.py; `load` takes `pairwise FOLDER`. On CUDA with flash-attn, attention shares the prefix, too, which
is what flash-pref was made for; else the prefix is unshared for SDPA, and everything else is shared. The LM
head runs on rows that predict a trained token.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the libraries print goes to stderr

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from flash_pref import shared_prefix  # pyrefly: ignore [missing-import]  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402


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


class Loaded:
    """Model and batch."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        batch = {file.stem: np.load(file) for file in folder.glob("*.npy")}
        self.model = load_model(folder, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9, fused=True)
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

    def gradients(self) -> float:
        self.model.zero_grad()
        loss = self._backward()
        found = {n: p.grad.cpu() for n, p in self.model.named_parameters() if p.grad is not None}
        save_file(found, self.folder / "gradients.safetensors")
        self.model.zero_grad()
        return loss

    def step(self) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self._backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _backward(self) -> float:
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


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    device = torch.device(sys.argv[2])
    loaded: Loaded | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "load":
            loaded = Loaded(Path(arguments[1]), device)
            print("loaded", file=answers, flush=True)
            continue
        assert loaded is not None, f"{command} before load"
        print(loaded.gradients() if command == "gradients" else loaded.step(), file=answers, flush=True)


if __name__ == "__main__":
    main()
