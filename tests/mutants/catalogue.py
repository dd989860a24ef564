"""The mutants: wrong kernels, each with the layer and the test that must notice."""

from tests.mutants.log_probs import LOG_PROBS
from tests.mutants.losses import LOSSES
from tests.mutants.mutant import INTERPRETER, TTSEM, Mutant

PARTS, FORWARD, BACKWARD = (f"attention/kernels/{part}.py" for part in ("parts", "forward", "backward"))
TREE = "test_tree_attention.py"
SMALL_HEADS = f"{TREE}::test_every_head_size[torch.float32-32]"
EQUALS = f"{TREE}::test_equals_each_rollout_alone"
DKV_DOC = 'one key head, over the query blocks of all heads of its group."""'
HEAD_AND_WORK = (
    "    head = tl.program_id(0) % num_heads\n    work = work_ptr + tl.program_id(0) // num_heads * 4\n"
)
HEAD_AND_WORK_OF_QUERY_HEAD = (
    "    head = tl.program_id(0) // GROUP % num_heads\n"
    "    work = work_ptr + tl.program_id(0) // GROUP // num_heads * 4\n"
)
PART = "load_tile({0}_ptr + head * {1}, keys, {2}, num_heads * {1}, num_keys, {1})"
CAUSAL_T = "(keys[:, None] <= q_at[None, :])"
MASK = "(q_at[:, None] < end[None, :])"
CAUSAL = "(keys[None, :] <= q_at[:, None])"
TREE_MASK = f"{CAUSAL} & {MASK}"
NARROW = "(q_depth[:, None] < limit[None, :])"
LOAD_END = "tl.load(end_ptr + keys, mask=keys < num_keys, other=0)"

SLOPE = "    if SOFTCAP:\n        weights *= score_slope(scores, softcap)\n"
SLOPE_T = SLOPE.replace("    if", "        if").replace("        weights", "            weights")
BENT = f"{TREE}::test_all_that_bends_attention_at_once"

ATTENTION = (
    Mutant(
        "forward and dQ forget the tree, causal only",
        FORWARD,
        ((TREE_MASK, CAUSAL),),
        INTERPRETER,
        EQUALS,
        also=((BACKWARD, TREE_MASK, CAUSAL),),
    ),
    Mutant(
        "a key is seen by one query past its subtree",
        FORWARD,
        ((MASK, MASK.replace("<", "<=")),),
        INTERPRETER,
        EQUALS,
        also=((BACKWARD, MASK, MASK.replace("<", "<=")),),
    ),
    Mutant(
        "a query does not see itself",
        FORWARD,
        ((CAUSAL, CAUSAL.replace("<=", "<")),),
        INTERPRETER,
        EQUALS,
        also=((BACKWARD, CAUSAL, CAUSAL.replace("<=", "<")),),
    ),
    Mutant(
        "dK and dV forget the tree",
        BACKWARD,
        ((f"{CAUSAL_T} & (q_at[None, :] < end[:, None])", CAUSAL_T),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "the window is one too wide",
        FORWARD,
        ((NARROW, NARROW.replace("<", "<=")),),
        INTERPRETER,
        SMALL_HEADS,
        also=((BACKWARD, NARROW, NARROW.replace("<", "<=")),),
    ),
    Mutant(
        "a block of hidden keys before the first visible one gives NaN",
        FORWARD,
        (('tl.where(new_highest == float("-inf"), 0.0, new_highest)', "new_highest"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "a partial block is taken for a full one",
        "attention/blocks.py",
        (("(last_q < lowest_end)", "(first_q < lowest_end)"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "a block of keys that ends in the block of queries is skipped",
        "attention/blocks.py",
        (("(first_q < highest_end)", "(last_q < highest_end)"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "the maximum moves and the sum is not rescaled",
        FORWARD,
        (("total = total * shrink +", "total = total +"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "the gradient of the scores lacks delta",
        BACKWARD,
        (("(d_weights - delta[:, None])", "d_weights"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "dK lacks the scale",
        BACKWARD,
        (("dk * scale, keys", "dk, keys"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "only the first head of a group reaches dK and dV",
        BACKWARD,
        (("head * GROUP + step % GROUP", "head * GROUP"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "K and V are loaded past the end",
        PARTS,
        (("inside = rows[:, None] < count", "inside = rows[:, None] < count + 1"),),
        TTSEM,
        SMALL_HEADS,
    ),
    Mutant(
        "subtree_end is loaded past the end",
        FORWARD,
        ((LOAD_END, "tl.load(end_ptr + keys)"),),
        TTSEM,
        SMALL_HEADS,
        also=((BACKWARD, LOAD_END, "tl.load(end_ptr + keys)"),),
    ),
    Mutant(
        "the logsumexp is stored past the end",
        FORWARD,
        (("tl.log2(total), mask=rows < num_queries)", "tl.log2(total))"),),
        TTSEM,
        SMALL_HEADS,
    ),
    Mutant(
        "the heads of a group race for dK and dV",
        BACKWARD,
        (
            # A program a query head, each adding its part to the key head's gradient: right one by one.
            (f"{DKV_DOC}\n{HEAD_AND_WORK}", f"{DKV_DOC}\n{HEAD_AND_WORK_OF_QUERY_HEAD}"),
            ("range((masked - first) * GROUP)", "range(masked - first)"),
            ("range((stop - masked) * GROUP)", "range(stop - masked)"),
            ("first + (step + 1) // GROUP", "first + step + 1"),
            ("masked + (step + 1) // GROUP", "masked + step + 1"),
            ("head * GROUP + step % GROUP", "head * GROUP + tl.program_id(0) % GROUP"),
            ("dk * scale, keys", f"dk * scale + {PART.format('dk', 'D', 'columns')}, keys"),
            ("dv, keys, value", f"dv + {PART.format('dv', 'V', 'value_columns')}, keys, value"),
        ),
        TTSEM,
        SMALL_HEADS,
        also=(
            ("attention/triton.py", "len(lists.work) * k.shape[1],", "len(lists.work) * q.shape[1],"),
            ("attention/triton.py", "torch.empty(x.shape", "torch.zeros(x.shape"),
        ),
    ),
    Mutant(
        "the last block of queries is not launched",
        "attention/triton.py",
        (("forward_kernel, len(lists.work)", "forward_kernel, (len(lists.work) - 1)"),),
        INTERPRETER,
        EQUALS,
    ),
    Mutant(
        "dK and dV see one position past the window or the chunk",
        BACKWARD,
        (("q_depth[None, :] < limit[:, None]", "q_depth[None, :] <= limit[:, None]"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "a chunk is taken for a window of its size",
        "attention/blocks.py",
        (("return (positions // chunk + 1) * chunk", "return positions + chunk"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "a block of keys whose chunks end within the block of queries is taken for a full one",
        "attention/blocks.py",
        (("full &= deepest_q < lowest_limit", "full &= shallowest_q < lowest_limit"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "the softcap of scores has no derivative in dQ",
        BACKWARD,
        ((f"0.0)\n{SLOPE}", "0.0)\n"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "the softcap of scores has no derivative in dK",
        BACKWARD,
        ((SLOPE_T, ""),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "the softcap bends scores before they are scaled",
        PARTS,
        (("tanh(products * (scale / softcap))", "tanh(products / softcap)"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "a sink is not counted in the softmax",
        FORWARD,
        (("total += 1.0", "total += 0.0"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "sinks are taken for logits in base 2",
        FORWARD,
        (("tl.load(sinks_ptr + head) * LOG2_E", "tl.load(sinks_ptr + head)"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "the gradient of a sink has the other sign",
        "attention/triton.py",
        (("d_sinks = -(torch.exp2", "d_sinks = (torch.exp2"),),
        INTERPRETER,
        BENT,
    ),
    Mutant(
        "values are as wide as keys",
        FORWARD,
        (("v_row_stride, num_keys, V)", "v_row_stride, num_keys, D)"),),
        TTSEM,
        BENT,
    ),
)  # fmt: skip

MUTANTS = ATTENTION + LOG_PROBS + LOSSES
