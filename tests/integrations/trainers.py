"""TRL's trainers with a tiny model and words for tokens, and their LM head in fp64."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyrefly: ignore [missing-import]
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import (  # pyrefly: ignore [missing-import]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from mosaic_fast.policy.checkpoint import save_model
from tests.policy.policy_helpers import VOCAB, gradients, tiny_model

ROWS = 8
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)


def tokenizer() -> PreTrainedTokenizerFast:
    """Each token of the tiny models is a word, w3 to w22; the first three are special."""
    words = {f"w{token}": token for token in range(3, VOCAB)} | {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(generator: torch.Generator, shortest: int, longest: int) -> str:
    count = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return " ".join(f"w{token}" for token in torch.randint(3, VOCAB, (count,), generator=generator).tolist())


def rows_of(kind: str, count: int = 16) -> Dataset:
    """Texts behind few common beginnings, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    common = [text(generator, 9, 9), text(generator, 7, 7), text(generator, 8, 8)]
    prompts = [f"{common[i % 3]} {text(generator, 1, 4)}" for i in range(count)]
    answers = [[" " + text(generator, 2, 7) for _ in prompts] for _ in range(2)]
    match kind:
        case "grpo" | "rloo":
            return Dataset.from_dict({"prompt": prompts})
        case "dpo":
            return Dataset.from_dict({"prompt": prompts, "chosen": answers[0], "rejected": answers[1]})
        case "kto":
            labels = [index % 2 == 0 for index in range(count)]
            return Dataset.from_dict({"prompt": prompts, "completion": answers[0], "label": labels})
    return Dataset.from_dict({"prompt": prompts, "completion": answers[0]})


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def make(
    kind: str,
    folder: Path,
    model: PreTrainedModel | None = None,
    *,
    lora: bool = False,
    **settings: Any,
) -> Any:
    """A trainer of the kind; the model is saved first, so that TRL can load a reference of its own."""
    model = model or tiny_model("qwen3", torch.float32)
    save_model(model, folder / "model")
    model.config._name_or_path = str(folder / "model")
    settings = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": ROWS,
        "seed": 5,
        **settings,
    }
    trainer, config = {
        "grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig), "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig), "sft": (SFTTrainer, SFTConfig),
    }[kind]  # fmt: skip
    extra: dict[str, object] = {}
    if kind in ("grpo", "rloo"):
        settings = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.9, **settings}
        extra["reward_funcs"] = reward
    if kind == "kto" and settings.get("loss_type") != "apo_zero_unpaired":
        settings = {"train_sampling_strategy": "sequential", **settings}
    torch.manual_seed(0)
    return trainer(
        model=model,
        args=config(**settings),
        train_dataset=rows_of(kind),
        processing_class=tokenizer(),
        peft_config=LORA if lora else None,
        **extra,
    )


def first_batch(trainer: Any) -> dict[str, Any]:
    """What the trainer's loss is given first; GRPO and RLOO generate it."""
    trainer.model.train()
    torch.manual_seed(1)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradients(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trainer's own loss, and its gradient for each parameter that is trained."""
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(batch))
    found = gradients(trainer.model, loss)
    return {"loss": loss.detach(), **{name: x for name, x in found.items() if x.any()}}


def in_double(model: PreTrainedModel) -> None:
    """The rotary embedding in fp64, where transformers computes it in fp32 whatever the model's precision."""

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    module: Any = model.get_decoder().rotary_emb
    module.forward = types.MethodType(rotary, module)


class DoubleHead:
    """TRL's LM head as plain PyTorch in the precision of its inputs; TRL's computes in fp32 always."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,  # [N]
        temperature: float,
        chunk: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden, weight, bias) * scale / temperature
        table = logits.log_softmax(-1)
        return (
            table.gather(1, targets[:, None])[:, 0],
            -(table.exp() * table).sum(-1),
            (2 * table).logsumexp(-1).detach(),
            logits.mean(-1).detach(),
            logits.argmax(-1) == targets,
        )
