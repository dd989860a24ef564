"""Wrong log-prob kernels."""

from tests.mutants.mutant import INTERPRETER, TTSEM, Mutant

LOGPROB = "logprob/kernels.py"
ODD = "test_linear_logprob.py::test_odd_sizes_with_everything_on"
MEMORY = "test_work_memory.py::test_many_rows_do_not_read_their_hidden_states_again_for_every_tile"
RISING = "test_linear_logprob.py::test_the_largest_logit_comes_first_or_last"
FORBIDDEN = "test_linear_logprob.py::test_forbidden_tokens_fill_tiles_and_splits"

ROW_TILES = "tl.cdiv(num_rows, BLOCK_ROWS)"

LOG_PROBS = (
    Mutant(
        "the tail of the vocabulary counts as logits of 0",
        LOGPROB,
        (
            (
                'tl.where(columns[None, :] < vocab, logits * inverse_temperature, float("-inf"))',
                "logits * inverse_temperature",
            ),
        ),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "targets are looked for one vocabulary tile too late",
        "logprob/reference.py",
        (("targets // block_vocab", "(targets + block_vocab) // block_vocab"),),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "the target of the next column is taken",
        LOGPROB,
        (("columns == tl.load(targets_ptr + edge)", "columns == tl.load(targets_ptr + edge) + 1"),),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "a tile of forbidden tokens gives NaN",
        LOGPROB,
        (('tl.where(new_highest == float("-inf"), 0.0, new_highest)', "new_highest"),),
        INTERPRETER,
        FORBIDDEN,
    ),
    Mutant(
        "the first tile after forbidden ones spoils the entropy",
        LOGPROB,
        (('tl.where(highest == float("-inf"), 0.0, highest - finite)', "highest - finite"),),
        INTERPRETER,
        FORBIDDEN,
    ),
    Mutant(
        "a share of forbidden tokens spoils the merged entropy",
        LOGPROB,
        (('tl.where(own == float("-inf"), 0.0, own - highest)', "own - highest"),),
        INTERPRETER,
        FORBIDDEN,
    ),
    Mutant(
        "a forbidden token adds NaN to the entropy",
        LOGPROB,
        (("tl.where(weights == 0.0, 0.0, weights * shifted)", "weights * shifted"),),
        INTERPRETER,
        FORBIDDEN,
    ),
    Mutant(
        "the forward pass forgets the temperature",
        LOGPROB,
        (("logits * inverse_temperature, float", "logits, float"),),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "the backward pass forgets the temperature",
        LOGPROB,
        (("    grad *= inverse_temperature\n", ""),),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "the softcap has no derivative",
        LOGPROB,
        (("grad *= _cap_slope(logits, inverse_temperature, softcap)", "grad *= 1.0"),),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "the softcap has no derivative at the targets",
        LOGPROB,
        (
            (
                "incoming *= _cap_slope(tl.load(edge_logits_ptr + edge), inverse_temperature, softcap)",
                "incoming *= 1.0",
            ),
        ),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "the softcap's tanh cancels near zero",
        "tanh.py",
        (("tl.abs(x) < 0.25, series", "tl.abs(x) < 0.0, series"),),
        INTERPRETER,
        "test_linear_logprob.py::test_tanh_keeps_its_digits_near_zero",
    ),
    Mutant(
        "the maximum moves and the sum is not rescaled",
        LOGPROB,
        (("total = total * shrink +", "total = total +"),),
        INTERPRETER,
        RISING,
    ),
    Mutant(
        "the maximum moves and the entropy's sum is not shifted",
        LOGPROB,
        (("(weighted + shift * total) * shrink", "weighted * shrink"),),
        INTERPRETER,
        RISING,
    ),
    Mutant(
        "log-probs of large logits lose their digits",
        "logprob/triton.py",
        (
            (
                "(edge_logits - row_max[rows]) - row_log_sum[rows]",
                "edge_logits - (row_max + row_log_sum)[rows]",
            ),
        ),
        INTERPRETER,
        "test_linear_logprob.py::test_a_confident_log_prob_of_a_large_logit_keeps_its_digits",
    ),
    Mutant(
        "a row's gradient leaves out its last target",
        "gather_sum.py",
        (("range(tl.max(count, 0))", "range(tl.max(count, 0) - 1)"),),
        INTERPRETER,
        "test_linear_logprob.py::test_a_fork_of_many_targets_from_one_row",
    ),
    Mutant(
        "chunks of the vocabulary overwrite the gradient of hidden",
        "logprob/triton.py",
        (
            (
                "add_product(grad_hidden, chunk, weight[part])",
                "grad_hidden = torch.mm(chunk.float(), weight[part].float())",
            ),
        ),
        INTERPRETER,
        ODD,
    ),
    Mutant(
        "the second tile of a chunk writes over the first",
        LOGPROB,
        (("out_columns = columns - first_column", "out_columns = tl.arange(0, BLOCK_VOCAB)"),),
        TTSEM,
        ODD,
    ),
    Mutant(
        "the weight is loaded past the vocabulary",
        LOGPROB,
        (("columns[:, None] < vocab\n", "columns[:, None] < vocab + 1\n"),),
        TTSEM,
        ODD,
    ),
    Mutant(
        "hidden dimensions are loaded past the end",
        LOGPROB,
        (
            ("row_inside & (dims[None, :] < D)", "row_inside"),
            ("column_inside & (dims[None, :] < D)", "column_inside"),
        ),
        TTSEM,
        ODD,
    ),
    Mutant(
        "statistics are stored past the last row",
        LOGPROB,
        (("tl.store(sum_ptr + at, total, mask=inside)", "tl.store(sum_ptr + at, total)"),),
        TTSEM,
        ODD,
    ),
    Mutant(
        "shares of the vocabulary race for one place",
        LOGPROB,
        (("at = split.to(tl.int64) * num_rows + rows", "at = 0 * split.to(tl.int64) + rows"),),
        TTSEM,
        ODD,
    ),
    Mutant(
        "bf16 logits are added up in bf16",
        LOGPROB,
        (
            (
                "logits = tl.dot(hidden, tl.trans(weight), logits, input_precision=PRECISION)",
                "logits = (tl.dot(hidden, tl.trans(weight), logits)).to(hidden.dtype).to(tl.float32)",
            ),
        ),
        TTSEM,
        ODD,
    ),
    Mutant(
        "row tiles run side by side through the whole vocabulary",
        LOGPROB,
        (
            (
                "tl.program_id(0) // num_splits, tl.program_id(0) % num_splits",
                "tl.program_id(0) % ROW_TILES, tl.program_id(0) // ROW_TILES".replace("ROW_TILES", ROW_TILES),
            ),
        ),
        INTERPRETER,
        MEMORY,
    ),
    Mutant(
        "the backward pass takes all row tiles through the vocabulary together",
        LOGPROB,
        (("GROUP_ROWS = tl.constexpr(8)", "GROUP_ROWS = tl.constexpr(1024)"),),
        INTERPRETER,
        MEMORY,
    ),
    Mutant(
        "a target outside the vocabulary leaves what was in memory",
        "logprob/triton.py",
        (("torch.full((len(rows),), torch.nan, ", "torch.zeros((len(rows),), "),),
        INTERPRETER,
        "test_linear_logprob.py::test_a_target_outside_the_vocabulary_shows",
    ),
)
