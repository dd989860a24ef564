"""python -m tools.warmstart: rebuild the embedded model."""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import answer_at_once
    from tools.warmstart.arguments import parse

    answer_at_once(parse)

import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mosaic_fast.cli import plain_console, run_cli
from mosaic_rollout.environments.world.script import MIXED
from tools.warmstart.arguments import Recipe, parse
from tools.warmstart.examples import ExampleMaker
from tools.warmstart.tokenizer import build_tokenizer
from tools.warmstart.training import CONTEXT, build_model, train

_REPORT_EVERY = 50


def warmstart(
    out: Path = Path("build/warmstart"),
    recipe: Recipe = Recipe(),  # noqa: B008
    snapshot_every: int = 0,
) -> None:
    """Cold-start the embedded model and write it as a Hugging Face folder.

    Args:
        out: Where to write model.safetensors, config.json and the tokenizer.
        recipe: What the weights depend on.
        snapshot_every: Steps between copies of the unfinished model in OUT/snapshot; 0: none.
    """
    torch.set_num_threads(1)  # one thread: the order of every sum is fixed, so the bytes are too
    torch.use_deterministic_algorithms(True)
    console = plain_console()
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = CONTEXT
    model = build_model(recipe, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"{size:,} parameters, vocabulary {len(tokenizer)}, {recipe.steps} steps")
    start, losses, seen_tokens = time.monotonic(), [], 0

    def report(step: int, loss: float, tokens: int) -> None:
        nonlocal seen_tokens
        losses.append(loss)
        seen_tokens += tokens
        if snapshot_every and (step + 1) % snapshot_every == 0:
            _save(model, tokenizer, out / "snapshot")
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - start
            recent = losses[-_REPORT_EVERY:]
            console.print(
                f"step {step + 1}/{recipe.steps}  loss {sum(recent) / len(recent):.4f}  "
                f"{seen_tokens / seconds:,.0f} tokens/s  {seconds:,.0f} s"
            )

    train(model, ExampleMaker(tokenizer, MIXED), recipe, report)
    _save(model, tokenizer, out)
    console.print(f"written to {out}")


def main() -> int:
    arguments = parse()
    warmstart(arguments.out, arguments.recipe, arguments.snapshot_every)
    return 0


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
