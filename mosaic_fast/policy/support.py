"""What Policy refuses, by name: anything it would compute wrongly."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError

SUPPORTED_FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "llama": "Llama"}
"""config.model_type -> prefix of the class names in transformers. Phi-4 has the Phi-3 architecture."""
DECODED_BY_LAYER = ("llama", "qwen2", "qwen3")
"""Those whose layers the local engine may run itself, a token at a time."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_STATIC_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}
_LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of a configuration, one of which every mixture of experts has."""


def check_family(config: Mapping[str, object]) -> None:
    """UserError unless the model of a config.json is one whose forward is known to be exact on a forest."""
    family = config.get("model_type")
    if any(config.get(key) for key in _EXPERTS):
        raise UserError(
            f"model family {family!r} is a mixture of experts, which is not supported yet: use a dense model "
            "of qwen2 (Qwen2, Qwen2.5), qwen3, phi3 (Phi-3, Phi-4) or llama"
        )
    if not isinstance(family, str) or family not in SUPPORTED_FAMILIES:
        raise UserError(
            f"model family {family!r:.80} is not supported: Policy is exact for "
            "qwen2 (Qwen2, Qwen2.5), qwen3, phi3 (Phi-3, Phi-4) and llama"
        )


def check_model(model: nn.Module) -> None:
    """UserError for models that a forest forward would get wrong. Called once."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"Policy needs a transformers causal LM, got {type(model).__name__}; "
            "of a wrapper (PEFT, DDP, torch.compile) pass the model inside, for PEFT get_base_model()"
        )
    config = model.config
    check_family(config.to_dict())
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no LM head: load it with AutoModelForCausalLM")
    for layer_type in getattr(config, "layer_types", None) or ():
        if layer_type not in _LAYER_TYPES:
            raise UserError(f"layer type {layer_type!r} is not supported, only {sorted(_LAYER_TYPES)}")
    rope = rope_type(model)
    if rope not in _STATIC_ROPE | _LENGTH_DEPENDENT_ROPE:
        raise UserError(
            f"RoPE type {rope!r} is not supported, only {sorted(_STATIC_ROPE | _LENGTH_DEPENDENT_ROPE)}"
        )


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
    """The kind of rotary embedding, as transformers names it."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


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
