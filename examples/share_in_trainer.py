"""A Trainer of transformers with shared prefixes: its loss from `row_logprobs`, the rest as it is.

python examples/share_in_trainer.py MODEL_FOLDER    # in an environment with accelerate and mosaic_fast
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers import DataCollatorForLanguageModeling as Collator

from mosaic_fast.integrations import row_logprobs

SYSTEM = (
    "You work with tools. Plan first, check whether the next step is safe, then act, or refuse and say why."
)


class SharingTrainer(Trainer):
    """The mean negative log-prob of the labels, as Trainer's own, with each common prefix computed once."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # labels of all micro-batches of the step
    ) -> Tensor:
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != -100).sum()
        return -row_logprobs(model, **inputs).sum() / num_items_in_batch


def main(folder: str, trainer_class: type[Trainer] = SharingTrainer, steps: int = 2) -> Trainer:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [tokenizer(f"{SYSTEM} Task: add {number} and {number + 1}.") for number in range(16)]
    with tempfile.TemporaryDirectory() as output:
        options = TrainingArguments(
            output, max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True,
        )  # fmt: skip
        trainer = trainer_class(model, options, Collator(tokenizer, mlm=False), train_dataset=rows)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
