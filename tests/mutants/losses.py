"""Wrong preference and surrogate kernels."""

from tests.mutants.mutant import INTERPRETER, TTSEM, Mutant

PREFERENCE = "preference/kernels.py"
PAIRS = "test_preference_losses.py::test_pairwise_of_an_awkward_group_equals_one_pair_at_a_time"
FOREST = "test_preference_losses.py::test_forest_of_an_awkward_group_equals_one_rollout_at_a_time"
SURROGATE = "surrogate/triton.py"
TOKENS = "test_clipped_surrogate.py::test_equals_one_token_at_a_time"

LOSSES = (
    Mutant(
        "masked log-probs are summed",
        PREFERENCE,
        (
            (
                "tl.load(logprobs_ptr + tokens, mask=counted",
                "tl.load(logprobs_ptr + tokens, mask=tokens < stop",
            ),
        ),
        INTERPRETER,
        PAIRS,
    ),
    Mutant(
        "the reference is added",
        PREFERENCE,
        (("total -= tl.load(reference_ptr", "total += tl.load(reference_ptr"),),
        INTERPRETER,
        PAIRS,
    ),
    Mutant(
        "the second of a pair gets the gradient of the first",
        PREFERENCE,
        (("tl.where(side % 2 == 0, grad, -grad)", "grad"),),
        INTERPRETER,
        PAIRS,
    ),
    Mutant(
        "masked tokens get a gradient",
        PREFERENCE,
        (("tl.where(counted, gradient, 0.0)", "gradient"),),
        INTERPRETER,
        PAIRS,
    ),
    Mutant(
        "the gradient takes the label for certain",
        PREFERENCE,
        (("beta * ((1 - p) * rising - p * falling)", "beta * (rising - 1)"),),
        INTERPRETER,
        PAIRS,
    ),
    Mutant(
        "a small loss loses its digits",
        PREFERENCE,
        (("tl.where(decay < 1 / 32, series, tl.log(1 + decay))", "tl.log(1 + decay)"),),
        INTERPRETER,
        "test_preference_losses.py::test_a_small_loss_and_its_gradient_keep_their_digits",
    ),
    Mutant(
        "an edge's gradient leaves out a rollout",
        "gather_sum.py",
        (("range(tl.max(count, 0))", "range(tl.max(count, 0) - 1)"),),
        INTERPRETER,
        FOREST,
    ),
    Mutant(
        "edges that cancel in one pair are dropped from all",
        "preference/reference.py",
        (("count < size[of]", "count < size[of] - 1"),),
        INTERPRETER,
        "test_preference_losses.py::test_the_shared_trunk_never_reaches_the_lm_head",
    ),
    Mutant(
        "the mask is loaded past the last token",
        PREFERENCE,
        (("tl.load(mask_ptr + tokens, mask=tokens < stop, other=0)", "tl.load(mask_ptr + tokens)"),),
        TTSEM,
        PAIRS,
    ),
    Mutant(
        "pairs race for the first loss",
        PREFERENCE,
        (
            (
                "tl.store(loss_ptr + pair, loss, mask=inside)",
                "tl.store(loss_ptr + pair % 2, loss, mask=inside)",
            ),
        ),
        TTSEM,
        "test_preference_losses.py::test_64_long_rollouts_of_one_group_all_judged",
    ),
    Mutant(
        "the ratio is never clipped from below",
        SURROGATE,
        (("below = (advantage <= 0.0) &", "below = (advantage != advantage) &"),),
        INTERPRETER,
        TOKENS,
    ),
    Mutant(
        "a clipped ratio keeps its gradient",
        SURROGATE,
        (("tl.where(above | below, 0.0, -advantage * ratio)", "-advantage * ratio"),),
        INTERPRETER,
        TOKENS,
    ),
    Mutant(
        "the KL's derivative has the wrong sign",
        SURROGATE,
        (("slope -= kl_weight", "slope += kl_weight"),),
        INTERPRETER,
        TOKENS,
    ),
    Mutant(
        "the KL of nearly equal policies is rounding",
        SURROGATE,
        (("near = tl.abs(d) < 0.5", "near = tl.abs(d) < 0.0"),),
        INTERPRETER,
        "test_clipped_surrogate.py::test_the_kl_of_nearly_equal_policies_keeps_its_digits",
    ),
    Mutant(
        "a token without weight shows its NaN",
        SURROGATE,
        (
            ("counted = weight != 0.0", "counted = tokens < count"),
            ("tl.where(counted, weight * loss, 0.0)", "weight * loss"),
        ),
        INTERPRETER,
        TOKENS,
    ),
    Mutant(
        "losses are stored past the last token",
        SURROGATE,
        (
            (
                "tl.where(counted, weight * loss, 0.0), mask=tokens < count)",
                "tl.where(counted, weight * loss, 0.0))",
            ),
        ),
        TTSEM,
        TOKENS,
    ),
)
