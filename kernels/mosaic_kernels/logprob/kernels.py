"""linear_logprob in Triton: logits one tile of rows x vocabulary at a time, never a row of them in memory.

A tile's logits live in registers only. The forward pass folds them into a running maximum, sum and weighted
sum a row (the online softmax) and picks the target logits out of the same registers. The backward pass
computes a tile again, adding up in the same order, and turns it into a tile of dL/dlogits for two matrix
products.

Edges, that is (row, target) pairs, are listed by the tile their logit falls into: a tile looks at its own
edges only, however many targets a row has. No program writes what another one reads or writes.

Programs that run side by side share what they read, so that it comes from L2: the order of programs, in both
passes, keeps the rows and the columns in flight few (docs/kernels.md).
"""

import triton
import triton.language as tl

from mosaic_kernels.tanh import tanh

GROUP_ROWS = tl.constexpr(8)  # row tiles that the backward pass takes through the vocabulary together
SIZES = ["num_rows", "vocab", "num_splits", "tiles_per_split", "first_column", "num_columns"]


@triton.jit
def _cap_slope(logits, inverse_temperature, softcap):
    """The softcap's derivative 1 - tanh^2, from capped logits over temperature."""
    bent = logits / (softcap * inverse_temperature)
    return 1 - bent * bent


@triton.jit
def _logits(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V] fp32, read with BIAS
    rows,  # [BLOCK_ROWS] int32
    columns,  # [BLOCK_VOCAB] int32
    num_rows,
    vocab,
    inverse_temperature,
    softcap,
    D: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BLOCK_ROWS, BLOCK_VOCAB] fp32 of logits, capped and divided by the temperature.

    Columns past the vocabulary are -inf; rows past the end hold numbers that nothing may use.
    """
    hidden_rows = hidden_ptr + rows[:, None].to(tl.int64) * D
    weight_rows = weight_ptr + columns[:, None].to(tl.int64) * D
    row_inside, column_inside = rows[:, None] < num_rows, columns[:, None] < vocab
    logits = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_DIM):
        dims = start + tl.arange(0, BLOCK_DIM)
        if D % BLOCK_DIM == 0:
            hidden = tl.load(hidden_rows + dims[None, :], mask=row_inside, other=0.0)
            weight = tl.load(weight_rows + dims[None, :], mask=column_inside, other=0.0)
        else:
            hidden = tl.load(hidden_rows + dims[None, :], mask=row_inside & (dims[None, :] < D), other=0.0)
            weight = tl.load(weight_rows + dims[None, :], mask=column_inside & (dims[None, :] < D), other=0.0)
        logits = tl.dot(hidden, tl.trans(weight), logits, input_precision=PRECISION)
    if BIAS:
        logits += tl.load(bias_ptr + columns, mask=columns < vocab, other=0.0)[None, :]
    if SOFTCAP:
        logits = tanh(logits / softcap) * softcap
    return tl.where(columns[None, :] < vocab, logits * inverse_temperature, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    hidden_ptr,  # [N, D] contiguous
    weight_ptr,  # [V, D] contiguous
    bias_ptr,  # [V] fp32, read with BIAS
    rows_ptr,  # [E] int32
    targets_ptr,  # [E] int32
    tile_edges_ptr,  # [E] int32: edges ordered by the tile of their logit
    tile_starts_ptr,  # [row tiles * vocabulary tiles + 1] int32: where each tile's edges begin
    max_ptr,  # [splits, N] fp32: largest logit of the split
    sum_ptr,  # [splits, N] fp32: sum of exp(z - max)
    weighted_ptr,  # [splits, N] fp32: sum of exp(z - max) (z - max), written with ENTROPY
    edge_logits_ptr,  # [E] fp32
    num_rows,
    vocab,
    tiles_per_split,
    inverse_temperature,
    softcap,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ENTROPY: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a tile of rows and a share of the vocabulary. The shares of a row tile are neighbours."""
    vocab_tiles = tl.cdiv(vocab, BLOCK_VOCAB)
    num_splits = tl.cdiv(vocab_tiles, tiles_per_split)
    row_tile, split = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, vocab_tiles)):
        columns = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        logits = _logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, vocab, inverse_temperature, softcap,
            D, BLOCK_DIM, BIAS, SOFTCAP, PRECISION,
        )  # fmt: skip
        starts = tile_starts_ptr + row_tile * vocab_tiles + tile
        for entry in range(tl.load(starts), tl.load(starts + 1)):
            edge = tl.load(tile_edges_ptr + entry)
            at_row, at_column = rows == tl.load(rows_ptr + edge), columns == tl.load(targets_ptr + edge)
            picked = tl.sum(tl.where(at_row[:, None] & at_column[None, :], logits, 0.0), 1)
            tl.store(edge_logits_ptr + edge + 0 * rows, picked, mask=at_row)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        # Where all logits so far are -inf (forbidden tokens) there is no maximum: any finite one gives 0.
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shift = tl.where(highest == float("-inf"), 0.0, highest - finite)
        shrink = tl.exp(shift)
        shifted = logits - finite[:, None]
        weights = tl.exp(shifted)
        if ENTROPY:
            # A logit of -inf has probability 0 and adds 0.
            terms = tl.where(weights == 0.0, 0.0, weights * shifted)
            weighted = (weighted + shift * total) * shrink + tl.sum(terms, 1)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
    inside = rows < num_rows
    at = split.to(tl.int64) * num_rows + rows
    tl.store(max_ptr + at, highest, mask=inside)
    tl.store(sum_ptr + at, total, mask=inside)
    if ENTROPY:
        tl.store(weighted_ptr + at, weighted, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    max_ptr,  # [splits, N] fp32
    sum_ptr,  # [splits, N] fp32
    weighted_ptr,  # [splits, N] fp32, read with ENTROPY
    row_max_ptr,  # [N] fp32
    row_log_sum_ptr,  # [N] fp32: log of the sum of exp(z - row_max)
    entropy_ptr,  # [N] fp32, written with ENTROPY
    num_rows,
    num_splits,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Put the vocabulary's shares together. Maximum and log-sum stay apart: added, they would lose digits."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(num_splits):
        at = tl.cast(split, tl.int64) * num_rows + rows
        highest = tl.maximum(highest, tl.load(max_ptr + at, mask=inside, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        at = tl.cast(split, tl.int64) * num_rows + rows
        own = tl.load(max_ptr + at, mask=inside, other=0.0)
        shift = tl.where(own == float("-inf"), 0.0, own - highest)
        part = tl.load(sum_ptr + at, mask=inside, other=1.0)
        total += part * tl.exp(shift)
        if ENTROPY:
            weighted += (tl.load(weighted_ptr + at, mask=inside, other=0.0) + shift * part) * tl.exp(shift)
    tl.store(row_max_ptr + rows, highest, mask=inside)
    tl.store(row_log_sum_ptr + rows, tl.log(total), mask=inside)
    if ENTROPY:
        tl.store(entropy_ptr + rows, tl.log(total) - weighted / total, mask=inside)


@triton.jit
def _backward_tile(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr):
    """The tile of this program: GROUP_ROWS row tiles at a time, one column of tiles after the other."""
    column_tiles = tl.cdiv(num_columns, BLOCK_VOCAB)
    programs = GROUP_ROWS * column_tiles  # of a group
    first, member = tl.program_id(0) // programs * GROUP_ROWS, tl.program_id(0) % programs
    height = tl.minimum(tl.cdiv(num_rows, BLOCK_ROWS) - first, GROUP_ROWS)
    return first + member % height, member // height


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    hidden_ptr,  # [N, D] contiguous
    weight_ptr,  # [V, D] contiguous
    bias_ptr,  # [V] fp32, read with BIAS
    rows_ptr,  # [E] int32
    targets_ptr,  # [E] int32
    tile_edges_ptr,  # [E] int32
    tile_starts_ptr,  # [row tiles * vocabulary tiles + 1] int32
    row_max_ptr,  # [N] fp32
    row_log_sum_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32, read with ENTROPY
    edge_logits_ptr,  # [E] fp32, read with SOFTCAP
    grad_edges_ptr,  # [E] fp32, read with EDGES
    grad_rows_ptr,  # [N] fp32: their sum for each row, read with EDGES
    grad_entropy_ptr,  # [N] fp32, read with ENTROPY
    out_ptr,  # [N, row_stride]: dL/dlogits of columns [first_column, first_column + num_columns)
    num_rows,
    vocab,
    first_column,  # a multiple of BLOCK_VOCAB
    num_columns,
    out_row_stride,
    inverse_temperature,
    softcap,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    EDGES: tl.constexpr,
    ENTROPY: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of dL/dlogits.

    With p the softmax, G a row's sum of edge gradients g_e, h the gradient of its entropy H:
        dL/dz = sum_e g_e onehot(target_e) - p G - h p (log p + H)
    """
    row_tile, column_tile = _backward_tile(num_rows, num_columns, BLOCK_ROWS, BLOCK_VOCAB)
    tile = first_column // BLOCK_VOCAB + column_tile
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    logits = _logits(
        hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, vocab, inverse_temperature, softcap,
        D, BLOCK_DIM, BIAS, SOFTCAP, PRECISION,
    )  # fmt: skip
    inside = rows < num_rows
    highest = tl.load(row_max_ptr + rows, mask=inside, other=0.0)
    log_sum = tl.load(row_log_sum_ptr + rows, mask=inside, other=0.0)
    logp = (logits - highest[:, None]) - log_sum[:, None]
    probability = tl.exp(logp)
    factor = tl.zeros([BLOCK_ROWS], tl.float32)
    if EDGES:
        factor = tl.load(grad_rows_ptr + rows, mask=inside, other=0.0)
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=inside, other=0.0)
        factor += grad_entropy * tl.load(entropy_ptr + rows, mask=inside, other=0.0)
        grad = -probability * (factor[:, None] + grad_entropy[:, None] * logp)
        grad = tl.where(probability == 0.0, 0.0, grad)  # where log p = -inf
    else:
        grad = -probability * factor[:, None]
    if SOFTCAP:
        grad *= _cap_slope(logits, inverse_temperature, softcap)
    if EDGES:
        starts = tile_starts_ptr + row_tile * tl.cdiv(vocab, BLOCK_VOCAB) + tile
        for entry in range(tl.load(starts), tl.load(starts + 1)):
            edge = tl.load(tile_edges_ptr + entry)
            at_row, at_column = rows == tl.load(rows_ptr + edge), columns == tl.load(targets_ptr + edge)
            incoming = tl.load(grad_edges_ptr + edge)
            if SOFTCAP:  # from the stored logit, so that the tile of logits need not stay in registers
                incoming *= _cap_slope(tl.load(edge_logits_ptr + edge), inverse_temperature, softcap)
            grad += tl.where(at_row[:, None] & at_column[None, :], incoming, 0.0)
    grad *= inverse_temperature
    out_columns = columns - first_column
    out = out_ptr + rows[:, None].to(tl.int64) * out_row_stride + out_columns[None, :]
    mask = inside[:, None] & (out_columns < num_columns)[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=mask)
