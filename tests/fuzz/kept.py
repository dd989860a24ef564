"""Files that earlier commands wrote, or that came with a model: evaluations, cost models, checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np

from mosaic_fast.evaluate.results import as_json, suite_result
from mosaic_fast.evaluate.store import Finished, Key, Store
from mosaic_fast.learner.checkpoint import verify_checkpoint
from mosaic_fast.learner.execution.cost import default_cost_model, load_cost_model, save_cost_model
from mosaic_fast.policy.folder import read_config, weight_files
from mosaic_fast.policy.support import check_family
from mosaic_fast.preferences.episode_counts import EpisodeCounts
from mosaic_rollout.errors import UserError
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try

_OUTCOME = EpisodeCounts("benign", "answered", True, False, True, True, 2, 1, 9, 40, {"x": 1.0})
_SETTINGS = {"model": "m", "seed": 0, "suites": {"a": {"tasks": 2}}}


def _spoilt(random: Random, path: Path) -> None:
    """Damage a file: byte by byte, or one value of its JSON."""
    content = path.read_bytes()
    if path.suffix == ".toml" or random.random() < 0.5:
        path.write_bytes(hostile.damaged(random, content))
        return
    rows = [json.loads(line) for line in (content.splitlines() if path.suffix == ".jsonl" else [content])]
    rows[-1] = hostile.changed(random, rows[-1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[Try]:
    run, cost, evaluation = folder / "step-000001", folder / "cost.toml", folder / "evaluation"
    model = folder / "model"
    for place in (run / "trainer", model):
        place.mkdir(parents=True)

    def cost_model(random: Random) -> None:
        save_cost_model(default_cost_model(), cost, "what it was measured on")
        _spoilt(random, cost)
        found = load_cost_model(str(cost))
        assert np.isfinite(list(asdict(found).values())).all()

    def finished(random: Random) -> None:
        for name in ("settings.json", "outcomes.jsonl"):
            (evaluation / name).unlink(missing_ok=True)
        with Store(evaluation, _SETTINGS) as store:
            for index in range(2):
                store.add(Key("a", index, 0), Finished("t", _OUTCOME, {"messages": [], "steps": []}))
        _spoilt(random, evaluation / random.choice(("settings.json", "outcomes.jsonl")))
        with Store(evaluation, _SETTINGS) as store:
            result = suite_result("a", [[episode.outcome] for episode in store.finished.values()])
            json.dumps(as_json(result))

    def checkpoint(random: Random) -> None:
        names = ("progress.json", "trainer/state.safetensors", "model.safetensors")
        for name in names:
            (run / name).write_bytes(name.encode())
        sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
        (run / "manifest.json").write_text(json.dumps(sums))
        spoilt = run / random.choice((*names, "manifest.json"))
        spoilt.write_bytes(hostile.damaged(random, spoilt.read_bytes()))
        verify_checkpoint(run)
        assert all((run / name).read_bytes() == name.encode() for name in names[:2])  # what is resumed from

    def model_files(random: Random) -> None:
        config, index = model / "config.json", model / "model.safetensors.index.json"
        config.write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8, "layer_types": ["x"]}))
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "config.json"}}))
        _spoilt(random, random.choice((config, index)))
        check_family(read_config(model))
        weight_files(model)

    def attempt(random: Random) -> str:
        kind = random.choice((cost_model, finished, checkpoint, model_files))
        try:
            kind(random)
        except UserError as error:
            assert str(folder) in str(error) or "model family" in str(error), error
            return "refused"
        return "accepted"

    yield attempt


KEPT = Subject("kept files", 0.05, _kept)
