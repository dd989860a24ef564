"""Named presets: what a run on a machine of some size needs, on top of the defaults by the kind of model.

A value that is given, in a file or on the command line, always wins. None of the presets was ever run on a
GPU: what fits there is what the estimate of `--dry-run` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosaic_fast.config.nearest import nearest

if TYPE_CHECKING:
    from mosaic_fast.config.config import Config

Value = bool | int | str


@dataclass(frozen=True)
class Preset:
    """A machine, and key -> (value, the reason for it)."""

    words: str
    reasons: Mapping[str, tuple[Value, str]]

    @property
    def values(self) -> dict[str, Value]:
        return {key: value for key, (value, _) in self.reasons.items()}


_ROLLOUT = "a prompt with schemas, and turns; the memory of keys and values grows with it"

PRESETS: Mapping[str, Preset] = {
    "laptop": Preset(
        "a CPU with a few cores and 16 GB, models up to about 0.6 B",
        {
            "model.dtype": ("float32", "CPUs compute bfloat16 much more slowly"),
            "model.lora_rank": (16, "no moments, fp32 copies or reference model of every weight"),
            "rollout.prompts_per_step": (
                4,
                "steps of minutes: a CPU samples tens to hundreds of tokens a second",
            ),
            "rollout.group_size": (4, "the paper's; fewer are often all alike"),
            "rollout.max_step_tokens": (256, "a plan, a check and a call in words, not at length"),
            "rollout.max_rollout_tokens": (2048, "a prompt with a few tools and a few turns"),
            "forest.tokens_per_microbatch": (2048, "what is held for a backward pass grows with it"),
            "env.eval_tasks": (40, "an evaluation that takes no longer than some steps"),
        },
    ),
    "lora-24gb": Preset(
        "adapters on one GPU of 24 GB, models up to about 4 B",
        {
            "model.dtype": ("bfloat16", "the frozen weights take two bytes each; adapters are fp32"),
            "model.lora_rank": (32, "moments of the adapter only, and the model without it is the reference"),
            "model.activation_checkpointing": (True, "a layer's input is kept, not all that it computes"),
            "rollout.max_step_tokens": (1024, "plan, check and call in words"),
            "rollout.max_rollout_tokens": (4096, _ROLLOUT),
            "forest.tokens_per_microbatch": (4096, "the longest rollout, and no more"),
            "engine.max_batch": (8, "keys and values of sampled rows lie beside the weights"),
            "engine.max_cached_tokens": (8192, "and so do those of prefixes kept for later rows"),
        },
    ),
    "full-80gb": Preset(
        "every weight on one GPU of 80 GB, models up to about 3 B",
        {
            "model.dtype": ("bfloat16", "the weights that sample and are trained take two bytes each"),
            "model.lora_rank": (0, "every weight is trained"),
            "model.activation_checkpointing": (True, "weights, fp32 copies and moments take most memory"),
            "optim.master_weights": (True, "in bfloat16 alone updates of 1e-6 are rounded away"),
            "rollout.max_rollout_tokens": (4096, _ROLLOUT),
            "forest.tokens_per_microbatch": (4096, "the longest rollout, and no more"),
            "engine.max_batch": (16, "keys and values of sampled rows lie beside 50 GB of training"),
            "engine.max_cached_tokens": (32768, "and so do those of prefixes kept for later rows"),
        },
    ),
}
PRESET_KEYS = tuple(sorted({key for preset in PRESETS.values() for key in preset.reasons}))


def check_preset(name: str) -> str:
    """The name of a preset. ValueError for another one, with the one that may be meant."""
    if name not in PRESETS:
        close = nearest(name, PRESETS)
        raise ValueError(
            f"preset {name!r}: there is none of that name; "
            + (f"did you mean {close!r}?" if close else f"there are {', '.join(PRESETS)}")
        )
    return name


def preset_in_words(config: Config) -> str | None:
    """One line on the values of a run's preset, and those that were given instead; None without one."""
    if config.preset is None:
        return None
    told = []
    for key, value in PRESETS[config.preset].values.items():
        section, _, name = key.partition(".")
        chosen = getattr(getattr(config, section), name)
        told.append(f"{key} {chosen}" + (f" (not its {value})" if chosen != value else ""))
    return f"preset {config.preset}, {PRESETS[config.preset].words}: {', '.join(told)}"


def presets_table() -> list[str]:
    """The lines of a table for each preset for docs/configuration.md; a value in JSON is one in TOML."""
    lines = []
    for name, preset in PRESETS.items():
        lines += ["", f"`{name}`: {preset.words}.", "", "| key | value | why |", "|---|---|---|"]
        lines += [
            f"| `{key}` | `{json.dumps(value)}` | {why} |" for key, (value, why) in preset.reasons.items()
        ]
    return lines
