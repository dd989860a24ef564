"""What Policy refuses by name, before a model proves itself and at every forward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from mosaic_fast.errors import UserError

_LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}
_SEEING = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
_ENCODING = tuple(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def check_family(config: Mapping[str, object]) -> None:
    """UserError for a config.json that is not of a causal LM which transformers itself can make.

    Whether such a model is run is not decided by its name: it has to prove itself (`admission.py`).
    """
    family = config.get("model_type")
    shown = f"model family {family!r:.80}"
    known = isinstance(family, str) and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if isinstance(config.get("text_config"), Mapping) or (not known and family in _SEEING):
        raise UserError(
            f"{shown} sees or hears as well, which is not trained: load its language model alone (the class "
            "that transformers has for its text_config), save_pretrained that, and name its folder"
        )
    if config.get("is_encoder_decoder") or (not known and family in _ENCODING):
        raise UserError(
            f"{shown} is an encoder-decoder, whose prompt is no prefix: take a decoder-only model "
            "(a causal LM, such as Qwen3, Llama or Mistral)"
        )
    if not known:
        mend = "take a model that AutoModelForCausalLM makes"
        if config.get("auto_map"):
            mend = (
                "its folder brings code of its own (auto_map), which is never run: convert the weights to a "
                "family that transformers has, or wait for a version that has this one"
            )
        raise UserError(
            f"{shown} is not supported: transformers {transformers_version} has no causal LM of that name; "
            f"{mend}"
        )


def check_model(model: nn.Module) -> None:
    """UserError for what is no causal LM of transformers. Called once."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"Policy needs a transformers causal LM, got {type(model).__name__}; "
            "of a wrapper (PEFT, DDP, torch.compile) pass the model inside, for PEFT get_base_model()"
        )
    check_family(model.config.to_dict())
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no LM head: load it with AutoModelForCausalLM")


def check_modules(model: PreTrainedModel, *, to_be_trained: bool = False) -> None:
    """UserError for what may have been switched on since the model was made. Called every forward.

    to_be_trained: whether what eval mode forgives is refused as well.
    Dropout: a shared token would be dropped once for all its rollouts. Checkpointing other than
    transformers' own: it would run a layer again when the model's own attention is back.
    """
    if (model.training or to_be_trained) and getattr(model.config, "attention_dropout", 0.0):
        raise UserError(
            f"config.attention_dropout is {model.config.attention_dropout}: an exact forest forward needs 0 "
            "(or model.eval())"
        )
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0 and (module.training or to_be_trained):
            raise UserError(
                f"{name} drops out with p={module.p}: an exact forest forward needs 0 (or model.eval())"
            )
        if type(module).__name__ == "CheckpointWrapper":
            raise UserError(
                f"{name} is checkpointed by a wrapper: use model.gradient_checkpointing_enable() instead"
            )


def rope_type(model: PreTrainedModel) -> str:
    """The kind of rotary embedding, as transformers names it; of several, one that depends on the length."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    nested = [one for one in parameters.values() if isinstance(one, Mapping)]  # one for each kind of layer
    types = [str(one.get("rope_type", "default")) for one in nested or [parameters]]
    return next((one for one in types if one in _LENGTH_DEPENDENT_ROPE), types[0])


def depends_on_length(model: PreTrainedModel) -> bool:
    """True if the rotary frequencies depend on the longest position of the batch."""
    return rope_type(model) in _LENGTH_DEPENDENT_ROPE


def longest_exact(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence whose positions the model knows and whose RoPE is one in any batch.

    UserError where its configuration names no such length.
    """
    config = model.config
    length = getattr(config, "max_position_embeddings", None)
    rope = rope_type(model)
    if rope == "longrope":  # beyond its original length it changes to other factors
        length = config.rope_parameters.get("original_max_position_embeddings") or length
    elif rope == "dynamic" and isinstance(length, int):
        length -= 1  # see check_rope_lengths
    if not isinstance(length, int) or length < 2:
        raise UserError(
            f"the model's config.json gives no length that it can be run at: max_position_embeddings is "
            f"{getattr(config, 'max_position_embeddings', None)!r}"
        )
    return length


def check_rope_lengths(model: PreTrainedModel, shortest: int, longest: int, *, lengths_known: bool) -> None:
    """UserError where a rollout alone would see other RoPE frequencies than in the pack.

    longrope switches from its short to its long factors, and dynamic grows its base, by the longest position
    of the batch. The pack is right if every rollout lies on the same side of the switch: up to the limit both
    types are static, and beyond it longrope is again; dynamic depends on each length there and is refused.

    shortest, longest: lengths of the non-empty rollouts. lengths_known: False for a part of a cut forest, in
    which a rollout may appear without its end.
    """
    rope = rope_type(model)
    if not depends_on_length(model):
        return
    if rope == "dynamic":
        # The model resets the base only below this length, so at the limit itself it may still be grown.
        limit = model.config.max_position_embeddings - 1
        fits = longest <= limit
        allowed = f"They must all be of at most {limit} tokens (max_position_embeddings - 1)"
    else:
        limit = model.config.rope_parameters["original_max_position_embeddings"]
        fits = longest <= limit or shortest > limit
        allowed = (
            f"They must be all of at most {limit} tokens (original_max_position_embeddings) or all longer"
        )
    if shortest <= limit and not lengths_known:
        raise UserError(
            f"RoPE type {rope!r} depends on the length of the sequence, and a part of a cut forest may hold "
            "a rollout without its end: pass uncut=, the forest that was cut"
        )
    if not fits:
        raise UserError(
            f"RoPE type {rope!r} depends on the length of the sequence: rollouts of {shortest} to {longest} "
            f"tokens would not see the frequencies they see alone. {allowed}"
        )
