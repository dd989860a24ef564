"""A real SGLang server of the embedded model, on the CPU, for the time of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mosaic_fast.config import Config, EngineConfig
from mosaic_fast.setup.engine import build_engine
from mosaic_fast.setup.model_folder import load_policy, model_folder
from mosaic_rollout.engine.sglang import SGLangEngine

_PYTHON = Path(__file__).parents[1] / ".venv-sglang" / "bin" / "python"


def sglang_installed() -> bool:
    return _PYTHON.is_file()


@contextmanager
def sglang_engine() -> Iterator[SGLangEngine | str]:
    """The engine, whose server starts at the first update_weights; or why there is none."""
    if not sglang_installed():
        yield "not run: SGLang is not installed; make sglang puts it into .venv-sglang"
        return
    config = Config(engine=EngineConfig(kind="sglang", device="cpu", python=str(_PYTHON)))
    engine = build_engine(config, load_policy(config, model_folder("embedded")))
    assert isinstance(engine, SGLangEngine)
    try:
        yield engine
    finally:
        engine.close()
