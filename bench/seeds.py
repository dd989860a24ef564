"""Several seeds of the default run, and what they reach: python bench/seeds.py [--seeds 5] [--out FILE.md]

Trains each seed (a seed that has finished is not trained again), then plays held-out and training tasks with
the cold start and with every result, greedy and at T = 1, and prints a Markdown table with every seed in it.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from seeds_arguments import parse

    from mosaic_fast.cli import answer_at_once

    answer_at_once(parse)

import json
from pathlib import Path

from seeds_arguments import parse

from mosaic_fast.cli import run_cli
from mosaic_fast.config import Config
from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.evaluate import evaluate_policy
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_fast.run.metrics import values_of
from mosaic_fast.setup.build import build_setup
from mosaic_fast.setup.model_folder import model_folder
from mosaic_fast.train import train

_COLUMNS = {
    "safety/harmful_refused": "harmful refused",
    "safety/benign_done": "benign done",
    "safety/benign_refused": "benign refused",
    "safety/injection_harm": "injection harm",
    "safety/injected_done": "injected done",
    "rollout/format_valid": "format valid",
    "rollout/gate_rate_harmful": "checks, harmful",
    "rollout/gate_rate_benign": "checks, benign",
    "rollout/safety_token_share": "safety tokens",
}


def main() -> int:
    arguments = parse()
    rows: dict[str, dict[str, dict[str, float]]] = {
        "cold start": _figures(model_folder("embedded"), arguments.tasks)
    }
    seconds = {}
    for seed in range(arguments.seeds):
        run = arguments.folder / f"seed-{seed}"
        summary = run / "summary.json"
        if not (summary.exists() and json.loads(summary.read_text())["complete"]):
            options = ["--seed", str(seed), "--run-dir", str(run), "--trackers.console", "plain"]
            config, resume, name = parse_train_arguments([*options, *(["--resume"] if run.exists() else [])])
            train(config, name, resume=resume)
        seconds[f"seed {seed}"] = json.loads(summary.read_text())["train_s"]
        checkpoint = latest_checkpoint(run / "checkpoints")
        assert checkpoint is not None
        rows[f"seed {seed}"] = _figures(checkpoint, arguments.tasks)
    text = "\n".join(_markdown(rows, how, seconds) for how in rows["cold start"])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


def _figures(folder: Path, tasks: int) -> dict[str, dict[str, float]]:
    """The rates of a model's folder for each split and temperature."""
    setup = build_setup(Config(), folder)
    return {
        f"{split}, {'greedy' if temperature == 0 else 'T = 1'}": values_of(
            evaluate_policy(setup, split, tasks, temperature=temperature)
        )
        for split in ("heldout", "train")
        for temperature in (0.0, 1.0)
    }


def _markdown(rows: dict[str, dict[str, dict[str, float]]], how: str, seconds: dict[str, float]) -> str:
    lines = [
        f"**{how}** (%)",
        "",
        f"| | {' | '.join(_COLUMNS.values())} | training s |",
        "|---|" + "---|" * (len(_COLUMNS) + 1),
    ]
    for name, figures in rows.items():
        cells = [f"{100 * figures[how][column]:.1f}" for column in _COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds.get(name, 0):.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
