"""TRL's trainers on forests: `share_prefixes(trainer)`, before `trainer.train()`.

    from mosaic_fast.integrations.trl import share_prefixes

    trainer = GRPOTrainer(...)
    share_prefixes(trainer)
    trainer.train()

TRL 1.16 asks its models at one seam: `model(..., labels=labels, fused_lm_head=True)` gives the log-prob of
each label, its entropy and more. Behind it the rows of the micro-batch become a forest, the decoder runs on
that, and TRL's own LM head, with its temperature and precision, on the hidden states that predict a label.
So losses, metrics, adapters, reference models and mixed precision stay TRL's, and the numbers differ from
TRL alone by the rounding of the decoder's sums only.
"""

from __future__ import annotations

import functools
import logging
import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import BaseModelOutput

from mosaic_fast.errors import UserError
from mosaic_fast.integrations.rows import IGNORED, RowForest, forest_of_rows
from mosaic_fast.integrations.siblings import keep_siblings
from mosaic_fast.policy import Policy
from mosaic_fast.policy.forest_tensors import forest_tensors
from mosaic_fast.policy.layout import has_known_decoder
from mosaic_fast.policy.policy import spread
from mosaic_fast.policy.support import check_modules

KNOWN = "1.16"
TRAINERS = ("GRPOTrainer", "RLOOTrainer", "DPOTrainer", "KTOTrainer", "SFTTrainer")

_READ = ("input_ids", "labels", "attention_mask", "position_ids")
_WITHOUT_EFFECT = {
    "fused_lm_head", "num_items_in_batch", "use_cache", "return_dict",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",  # the positions say the same
}  # fmt: skip
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

logger = logging.getLogger("mosaic_fast")


@dataclass
class Sharing:
    """What was shared so far, counted over all forwards of a trainer: `print` it after training."""

    forwards: int = 0  # on forests
    row_tokens: int = 0  # of the rows of these, without padding
    computed_tokens: int = 0  # of their forests
    left_to_trl: Counter[str] = field(default_factory=Counter)  # reason -> forwards that TRL did alone

    def leave(self, reason: str) -> None:
        """Count a forward that TRL does alone, and say why the first time."""
        if reason not in self.left_to_trl:
            logger.warning("a batch is left to TRL, which shares no prefixes: %s", reason)
        self.left_to_trl[reason] += 1


def share_prefixes(trainer: Trainer, *, siblings: bool = False) -> Sharing:
    """Let one of TRL's trainers compute what rows of a micro-batch have in common once.

    trainer: a GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer or SFTTrainer of TRL 1.16, with or without
        PEFT and a reference model, before `train()`. A second call changes nothing but `siblings`.
    siblings: put rows with a common beginning into the same micro-batch, where TRL would scatter them: rows
        of one prompt among those that GRPO and RLOO have generated, and rows of the dataset for the others.
        The order of rows, and for the others which rows a step sees together, is no longer TRL's.

    Same log-probs, losses and gradients as TRL alone, but for rounding. A batch that cannot be shared
    exactly is left to TRL, with a warning at the first of its kind. UserError names what makes every batch
    such: another version of TRL, a model that `Policy` does not admit, dropout, FSDP and DeepSpeed, ...
    """
    check_trainer(trainer)
    models = _models_of(trainer)
    for model in models:
        _check_model(model, trained=model is models[0])
    sharing = getattr(trainer, "mosaic_sharing", None)
    if sharing is None:
        sharing = Sharing()
        for model in models:
            _share(model, sharing)
        vars(trainer)["mosaic_sharing"] = sharing
    if siblings:
        keep_siblings(trainer)
    return sharing


def check_trainer(trainer: Trainer) -> None:
    """UserError for a trainer whose every batch would have to be left to TRL."""
    names = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")}
    if not names & set(TRAINERS):
        raise UserError(
            f"share_prefixes is for TRL's {', '.join(TRAINERS)}, not for {type(trainer).__name__}"
        )
    if not version("trl").startswith(f"{KNOWN}."):
        raise UserError(
            f"TRL {version('trl')} is installed, and share_prefixes knows {KNOWN}: pip install trl==1.16.0"
        )
    settings = trainer.args
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    refused = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "parallelism_config": parallel is not None and parallel.total_size > parallel.dp_replicate_size,
        "torch_compile": settings.torch_compile,
        "use_liger_kernel": settings.use_liger_kernel,
    }
    for name, found in refused.items():
        if found:
            raise UserError(
                f"share_prefixes cannot be used with {name}: switch it off in the trainer's arguments"
            )


def _models_of(trainer: Trainer) -> list[PreTrainedModel]:
    """The models that the trainer asks at the seam: the policy, then the reference where it has its own."""
    found: list[PreTrainedModel] = []
    models: list[Any] = [trainer.model, getattr(trainer, "ref_model", None)]
    for model in models:
        if model is None:
            continue
        for adapter in getattr(model, "peft_config", {}).values():
            if getattr(adapter, "is_prompt_learning", False):
                raise UserError(
                    f"{adapter.peft_type.value} gives rows virtual tokens: use LoRA with share_prefixes"
                )
        wrapped = hasattr(model, "get_base_model")  # by PEFT
        found.append(model.get_base_model() if wrapped else model)
    return found


def _check_model(model: PreTrainedModel, *, trained: bool) -> None:
    if not has_known_decoder(model) or Policy(model).admission.way not in ("parts", "layers"):
        decoder = type(model.get_decoder()).__name__
        raise UserError(
            f"{decoder} of {type(model).__name__} has hooks, or its layers cannot be called one by one"
        )
    try:
        check_modules(model, to_be_trained=trained)
    except UserError as error:
        raise UserError(f"{error}; set it in the model's configuration, lora_dropout in PEFT's") from None


def _share(model: PreTrainedModel, sharing: Sharing) -> None:
    """Put a forward before TRL's that answers what is asked at the seam from a forest."""
    before = model.forward
    policy = Policy(model)

    # The signature stays the class's, which generation and the Trainer read.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return before(*args, **inputs)
        try:
            rows = _rows_of(args, inputs)
            check_modules(self)
        except UserError as reason:
            sharing.leave(str(reason))
            return before(*args, **inputs)
        if not rows.forest.trained.any():
            return before(*args, **inputs)  # TRL's zeros hang on its graph
        sharing.forwards += 1
        sharing.row_tokens += rows.forest.num_tokens
        sharing.computed_tokens += rows.forest.num_nodes
        return _on_forest(policy, before, rows, inputs)

    vars(model)["forward"] = types.MethodType(forward, model)


def _rows_of(args: tuple[object, ...], inputs: Mapping[str, Any]) -> RowForest:
    """The forest of a batch. UserError where it is given more than rows of tokens."""
    given = {name: x for name, x in inputs.items() if x is not None and x is not False}
    rows: dict[str, Tensor] = {name: given[name] for name in _READ if isinstance(given.get(name), Tensor)}
    strange = sorted(set(given) - set(rows) - _WITHOUT_EFFECT)
    if args or strange:
        raise UserError(f"it has {', '.join(strange) or 'unnamed inputs'}")
    if missing := {"input_ids", "labels"} - set(rows):
        raise UserError(f"it has no {min(missing)}")
    return forest_of_rows(**rows)


def _on_forest(policy: Policy, before: Any, rows: RowForest, inputs: Mapping[str, Any]) -> Any:
    """What TRL's forward gives for the rows, from one pass of the decoder over their forest.

    TRL's forward calls the decoder, then its LM head on what comes back. The decoder is answered for by
    the hidden states that predict the E distinct labels, as one row of E; the labels come already shifted.
    Called inside, it is under whatever accelerate has put around TRL's forward.
    """
    model = policy.model
    tensors = forest_tensors(rows.forest, model.device)
    labels: Tensor = inputs["labels"]

    def decode(*_: object, **__: object) -> BaseModelOutput:
        # Some rotary frequencies depend on the longest row, for which TRL's is the padded one.
        hidden = policy.hidden(tensors, longest_alone=rows.shape[1])
        return BaseModelOutput(last_hidden_state=hidden.index_select(0, tensors.edge_rows)[None])

    decoder = model.get_decoder()
    vars(decoder)["forward"] = decode
    try:
        output = before(fused_lm_head=True, shift_labels=tensors.targets[None])
    finally:
        del vars(decoder)["forward"]
    for name in _PER_TOKEN:
        if (values := getattr(output, name)) is not None:
            output[name] = rows.in_rows(spread(values[0], tensors.token_edges, tensors))
    output.label_mask = labels[:, 1:] != IGNORED
    scored = inputs.get("num_items_in_batch")
    output.loss = -output.log_probs.sum() / (output.label_mask.sum() if scored is None else scored)
    return output
