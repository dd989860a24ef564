"""The step of a TRL trainer on given rollouts, driven over stdin: trl_step.py THREADS

Runs in .venv-peers. Commands, one a line, each answered by a line:
    load grpo|dpo FOLDER   make the trainer; FOLDER holds the model and the batch's arrays as .npy files
    gradients              write FOLDER/gradients.safetensors; answers with the loss
    step                   forward, backward and AdamW; answers with the seconds
Standard output carries answers only.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the libraries print goes to stderr

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # pyrefly: ignore [missing-import]  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer  # noqa: E402  # pyrefly: ignore [missing-import]


class Loaded:
    """A trainer with its batch."""

    def __init__(self, kind: str, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        batch = {file.stem: np.load(file) for file in folder.glob("*.npy")}
        self.folder = folder
        self.trainer, self.inputs = (grpo if kind == "grpo" else dpo)(model, batch, folder)
        self.model = self.trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9, fused=True)

    def gradients(self) -> float:
        self.model.zero_grad()
        loss = self._backward()
        found = {n: p.grad.contiguous() for n, p in self.model.named_parameters() if p.grad is not None}
        save_file(found, self.folder / "gradients.safetensors")
        self.model.zero_grad()
        return loss

    def step(self) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self._backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def _backward(self) -> float:
        loss = self.trainer.compute_loss(self.model, self.inputs)
        loss.backward()
        return float(loss)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    loaded: Loaded | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "load":
            loaded = None
            loaded = Loaded(arguments[0], Path(arguments[1]))
            print("loaded", file=answers, flush=True)
            continue
        assert loaded is not None, f"{command} before load"
        print(loaded.gradients() if command == "gradients" else loaded.step(), file=answers, flush=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainers want one. It is never given a text that matters."""
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<eos>", eos_token="<eos>", unk_token="a"
    )


def common(folder: Path) -> dict[str, object]:
    return {
        "output_dir": str(folder / "trainer"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "save_strategy": "no",
    }


def grpo(
    model: PreTrainedModel, batch: dict[str, np.ndarray], folder: Path
) -> tuple[GRPOTrainer, dict[str, torch.Tensor]]:
    """GRPOTrainer's loss where sampler and policy agree: -sum(advantage x ratio) / T, gradient at ratio 1."""
    rows = len(batch["cu_seqlens"]) - 1
    arguments = GRPOConfig(
        **common(folder),
        per_device_train_batch_size=rows,
        num_generations=rows if rows > 1 else 2,
        loss_type="dapo",
        beta=0.0,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * rows}),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    tokens, bounds, trained = batch["tokens"], batch["cu_seqlens"], batch["trained"]
    prompt = int(batch["prompt"])  # leading tokens of every rollout that none trains
    longest = int(np.diff(bounds).max()) - prompt
    ids = np.zeros((rows, longest), np.int64)
    real, wanted = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.int64)
    advantages = np.zeros((rows, longest), np.float32)
    for row in range(rows):
        start, stop = bounds[row] + prompt, bounds[row + 1]
        n = stop - start
        ids[row, :n], real[row, :n] = tokens[start:stop], 1
        wanted[row, :n], advantages[row, :n] = trained[start:stop], -batch["weights"][start:stop]
    prompts = np.stack([tokens[start : start + prompt] for start in bounds[:-1]])
    inputs = {
        "prompt_ids": torch.from_numpy(prompts),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.int64),
        "completion_ids": torch.from_numpy(ids),
        "completion_mask": torch.from_numpy(real),
        "tool_mask": torch.from_numpy(wanted),
        "advantages": torch.from_numpy(advantages),
        "num_items_in_batch": torch.tensor(float(len(tokens))),
    }
    return trainer, inputs


def dpo(
    model: PreTrainedModel, batch: dict[str, np.ndarray], folder: Path
) -> tuple[DPOTrainer, dict[str, torch.Tensor]]:
    """DPOTrainer's sigmoid loss, mean over pairs, each pair two rows; reference sums given."""
    arguments = DPOConfig(**common(folder), beta=float(batch["beta"]), precompute_ref_log_probs=True)
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["a"], "rejected": ["a a"]}),
        processing_class=tokenizer(),
    )
    tokens, bounds, trained, pairs = batch["tokens"], batch["cu_seqlens"], batch["trained"], batch["pairs"]
    order = np.concatenate([pairs[:, 0], pairs[:, 1]])
    longest = int(np.diff(bounds).max())
    ids, real, wanted = (np.zeros((len(order), longest), np.int64) for _ in range(3))
    for row, rollout in enumerate(order):
        start, stop = bounds[rollout], bounds[rollout + 1]
        ids[row, : stop - start], real[row, : stop - start] = tokens[start:stop], 1
        wanted[row, : stop - start] = trained[start:stop]
    reference = torch.from_numpy(batch["reference"])  # [R] sums
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(real),
        "completion_mask": torch.from_numpy(wanted),
        "ref_chosen_logps": reference[pairs[:, 0]],
        "ref_rejected_logps": reference[pairs[:, 1]],
    }
    return trainer, inputs


if __name__ == "__main__":
    main()
