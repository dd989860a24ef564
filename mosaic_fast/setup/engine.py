"""The engine that `[engine]` describes, and how it gets the policy's weights."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.learner.lora import Lora
from mosaic_fast.policy import Policy
from mosaic_fast.policy.checkpoint import in_one_line, is_tied
from mosaic_fast.policy.support import depends_on_length, longest_exact, rope_type
from mosaic_fast.setup.engine_proof import prove_engine
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.types import ManagedEngine

_SPARE_TOKENS = 8  # SGLang keeps a few positions of the context to itself


def build_engine(
    config: Config,
    policy: Policy,
    lora: Lora | None = None,
    scratch: Path | None = None,
    *,
    gpus: Sequence[str] = (),
) -> ManagedEngine:
    """The engine of `engine.kind`. An SGLang server starts with the first update_weights, not here.

    lora: the policy's adapter; servers get the merged weights.
    scratch: where servers' weights and logs are put; without one, a temporary folder.
    gpus: of each server to launch, as `server_gpus` gives them.
    """
    engine = config.engine
    if engine.kind == "local":
        decoder_of, _ = prove_engine(policy.model)
        try:
            return LocalEngine(
                policy.model,
                max_batch=engine.max_batch,
                max_cached_tokens=engine.max_cached_tokens,
                decoder_of=decoder_of,
            )
        except Exception as error:  # it tries the model on a token: a wrong value of config.json shows there
            raise UserError(f"model.path: the model cannot be sampled from: {in_one_line(error)}") from error
    from mosaic_rollout.engine.sglang import LaneOptions, ServerOptions, SGLangEngine, SGLangOptions

    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    servers = ServerOptions(
        python=Path(engine.python),
        device=device,
        dtype=config.model.dtype,
        context_tokens=min(longest_exact(policy.model), config.rollout.max_rollout_tokens + _SPARE_TOKENS),
        max_running_requests=engine.max_batch,
        max_cached_tokens=engine.max_cached_tokens,
        deterministic=engine.deterministic,
        colocated=engine.colocated,
        seed=config.seed,
        startup_timeout_s=engine.startup_timeout_s,
        hang_timeout_s=engine.hang_timeout_s,
        more=engine.args,
        gpus=tuple(gpus),
    )
    return SGLangEngine(
        _PolicyWeights(policy, lora),
        list(engine.urls) or servers,
        SGLangOptions(
            vocab_size=int(policy.model.config.vocab_size),
            max_tokens=longest_rollout(config, policy),
            deterministic=engine.deterministic,
            transport=engine.weights,
            changing=config.rollout.max_staleness > 0,
            colocated=engine.colocated,
            verify=engine.verify_weights,
        ),
        LaneOptions(
            request_timeout_s=engine.request_timeout_s,
            hang_timeout_s=engine.hang_timeout_s,
            startup_timeout_s=engine.startup_timeout_s,
            max_inflight_tokens=engine.max_inflight_tokens,
        ),
        folder=scratch or _temporary(),
        count=engine.servers,
    )


def longest_rollout(config: Config, policy: Policy) -> int:
    """Tokens of the longest rollout that limits, model and engine allow. UserError where that is none."""
    spare = _SPARE_TOKENS if config.engine.kind == "sglang" else 0
    longest = min(config.rollout.max_rollout_tokens, longest_exact(policy.model) - spare)
    if longest < 2:
        raise UserError(
            f"model.path: the model has {longest_exact(policy.model)} positions, too few for a run"
        )
    return longest


def why_shorter(config: Config, policy: Policy) -> str | None:
    """A note for the user where rollouts end before rollout.max_rollout_tokens, and why; else None."""
    longest, wanted = longest_rollout(config, policy), config.rollout.max_rollout_tokens
    if longest >= wanted:
        return None
    reason = "its positions end there"
    if depends_on_length(policy.model):
        reason = f"beyond, its positions ({rope_type(policy.model)}) depend on what is in the batch"
    return (
        f"rollouts have at most {longest} tokens with this model, not rollout.max_rollout_tokens = {wanted}: "
        f"{reason}"
    )


class _PolicyWeights:
    """The policy's weights as an engine fetches them: with LoRA, the adapter merged in."""

    def __init__(self, policy: Policy, lora: Lora | None) -> None:
        self._policy, self._lora = policy, lora

    def save(self, folder: Path) -> None:
        if self._lora is None:
            self._policy.save_pretrained(folder)
        else:
            self._lora.save(folder)

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        if self._lora is None:
            return self._policy.model.named_parameters()
        merged = self._lora.merged_weights()
        if is_tied(self._policy.model):
            merged.pop("lm_head.weight", None)  # the embedding by another name
        return merged.items()


def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mosaic-sglang-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
