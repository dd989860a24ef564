"""The step of a TRL trainer on given rollouts, driven over stdin: trl_step.py THREADS [shared]

Runs in .venv-trl, on the CPU. The commands are those of served.py;
`load` takes `grpo FOLDER`, `dpo FOLDER` or `sft FOLDER`. shared: with prefixes shared by mosaic_fast.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from served import PeerStep, serve  # first: it takes standard output for answers

# isort: split
import numpy as np
import torch
from datasets import Dataset  # pyrefly: ignore [missing-import]
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import (  # pyrefly: ignore [missing-import]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

SHARED = sys.argv[2:] == ["shared"]


class TrlStep(PeerStep[PreTrainedModel]):
    """A trainer with its batch."""

    def __init__(self, kind: str, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        batch = {file.stem: np.load(file) for file in folder.glob("*.npy")}
        make = {"grpo": grpo, "dpo": dpo, "sft": sft}[kind]
        self.trainer, self.inputs = make(model, batch, folder)
        if SHARED:
            root = Path(__file__).parents[2]
            sys.path[:0] = [str(root), str(root / "kernels"), str(root / "rollout")]
            from mosaic_fast.integrations.trl import share_prefixes

            share_prefixes(self.trainer)
        super().__init__(self.trainer.model.train(), folder)

    def backward(self) -> float:
        loss = self.trainer.compute_loss(self.model, dict(self.inputs))
        loss.backward()
        return float(loss)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer, which the trainers want. It is never given a text that matters."""
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


def sft(
    model: PreTrainedModel, batch: dict[str, np.ndarray], folder: Path
) -> tuple[SFTTrainer, dict[str, torch.Tensor]]:
    """SFTTrainer's loss: the mean negative log-prob of the trained tokens, rows padded on the right."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common(folder), max_length=None),
        train_dataset=Dataset.from_dict({"input_ids": [[0, 0]]}),
        processing_class=tokenizer(),
    )
    bounds = batch["cu_seqlens"]
    shape = len(bounds) - 1, int(np.diff(bounds).max())
    ids, real, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        tokens, trained = batch["tokens"][start:stop], batch["trained"][start:stop]
        ids[row, : stop - start], real[row, : stop - start] = tokens, 1
        labels[row, : stop - start] = np.where(trained, tokens, -100)
    arrays = {"input_ids": ids, "attention_mask": real, "labels": labels}
    return trainer, {name: torch.from_numpy(array) for name, array in arrays.items()}


if __name__ == "__main__":
    serve(TrlStep)
