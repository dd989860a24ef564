"""TRL's GRPO with shared prefixes: one line, before `trainer.train()`. So for RLOO, DPO, KTO and SFT.

python examples/share_in_trl.py MODEL_FOLDER    # in an environment with trl==1.16.0 and mosaic_fast
"""

from __future__ import annotations

import sys
import tempfile

from datasets import Dataset  # pyrefly: ignore [missing-import]
from trl import GRPOConfig, GRPOTrainer  # pyrefly: ignore [missing-import]

from mosaic_fast.integrations.trl import Sharing, share_prefixes

SYSTEM = (
    "You work with tools. Plan first, check whether the next step is safe, then act, or refuse and say why."
)


def brevity(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward: the shorter the better."""
    return [-float(len(ids)) for ids in completion_ids]


def main(model: str, steps: int = 2) -> Sharing:
    tasks = [f"{SYSTEM} Task: add {number} and {number + 1}." for number in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=brevity,
            train_dataset=Dataset.from_dict({"prompt": tasks}),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                num_generations=4,
                per_device_train_batch_size=4,
                steps_per_generation=4,
                max_completion_length=16,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
            ),
        )
        # TRL shuffles what it has generated: `siblings` puts the rows of a prompt into one micro-batch again.
        sharing = share_prefixes(trainer, siblings=True)
        trainer.train()
    print(f"{sharing.row_tokens} tokens of rows, {sharing.computed_tokens} computed")
    return sharing


if __name__ == "__main__":
    main(sys.argv[1])
