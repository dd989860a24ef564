"""linear_logprob against one row at a time."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import linear_logprob, pack_forest
from mosaic_kernels.logprob.chunked import chunked_linear_logprob
from mosaic_kernels.magnitudes import logprob_magnitudes
from mosaic_kernels.oracle import logprobs_of_edges
from mosaic_kernels.rounding import weighting, worst_of
from tests.kernels.criterion import assert_right, relative_error
from tests.kernels.strategies import seeds


def problem(
    rows: int,
    edges: int,
    vocab: int,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[hidden, weight, bias] differentiable, targets and rows of the edges."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).to(dtype).requires_grad_()
        for shape, factor in (((rows, dim), size), ((vocab, dim), 1.0), ((vocab,), 1.0))
    ]
    targets = torch.randint(vocab, (edges,), generator=generator)
    return leaves, targets, torch.randint(max(rows, 1), (edges,), generator=generator)


def check(
    results: Sequence[torch.Tensor | None], leaves: list[torch.Tensor],
    targets: torch.Tensor, rows: torch.Tensor, temperature: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Log-probs, entropies where there are any, and every gradient are the oracle's but for rounding."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    bias = exact[2] if len(exact) == 3 else None
    kept = [x for x in results if x is not None]
    expected = logprobs_of_edges(
        exact[0], exact[1], targets.tolist(), rows.tolist(),
        bias=bias, temperature=temperature, softcap=softcap,
    )[: len(kept)]  # fmt: skip
    weights = weighting(expected, seed=1)
    magnitudes = logprob_magnitudes(
        exact[0], exact[1], targets, rows, weights[0], weights[1] if len(kept) == 2 else None,
        bias=bias, temperature=temperature, softcap=softcap, dtype=leaves[0].dtype,
    )  # fmt: skip
    of_results, of_leaves = magnitudes[: len(kept)], magnitudes[2 : 2 + len(leaves)]
    terms = max(*exact[1].shape, len(rows), len(exact[0]))
    off = worst_of(kept, leaves, expected, exact, weights, [*of_results, *of_leaves], terms)
    names = ("log-probs", "entropy")[: len(kept)] + ("dhidden", "dweight", "dbias")[: len(leaves)]
    assert_right(names, off)


@pytest.mark.parametrize("backend", ["reference", "chunked-1", "chunked-3", "chunked"])
@settings(max_examples=60)
@given(
    rows=st.integers(1, 11),
    edges=st.integers(0, 15),
    vocab=st.sampled_from([1, 2, 7, 33]),
    dim=st.sampled_from([1, 5, 8]),
    seed=seeds,
    temperature=st.sampled_from([1.0, 0.6, 3.0]),
    softcap=st.sampled_from([None, None, 2.5]),
    with_bias=st.booleans(),
    with_entropy=st.booleans(),
)
def test_equals_one_row_at_a_time(
    backend: str, rows: int, edges: int, vocab: int, dim: int, seed: int, temperature: float,
    softcap: float | None, with_bias: bool, with_entropy: bool,
) -> None:  # fmt: skip
    leaves, targets, row_index = problem(rows, edges, vocab, dim, seed)
    hidden, weight = leaves[:2]
    bias = leaves[2] if with_bias else None
    if "-" in backend:
        results: Sequence[torch.Tensor | None] = chunked_linear_logprob(
            hidden,
            weight,
            targets,
            row_index,
            bias,
            temperature,
            with_entropy,
            softcap,
            chunk_rows=int(backend[-1]),
            kept_logits=seed % 5 * vocab * int(backend[-1]),  # none, some or all chunks
        )
    elif with_entropy:
        results = linear_logprob(
            hidden, weight, targets,
            rows=row_index, bias=bias, temperature=temperature, softcap=softcap, return_entropy=True,
            backend=backend,
        )  # fmt: skip
    else:
        results = [
            linear_logprob(
                hidden,
                weight,
                targets,
                rows=row_index,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                backend=backend,
            )
        ]
    used = leaves if with_bias else leaves[:2]
    check(results, used, targets, row_index, temperature, softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_scale_multiplies_the_logits_before_the_softcap(softcap: float | None) -> None:
    (hidden, weight, bias), targets, rows = problem(6, 9, 9, 4, 0)
    options: dict[str, Any] = {"rows": rows, "softcap": softcap, "temperature": 0.7, "return_entropy": True}
    got = linear_logprob(hidden, weight, targets, bias=bias, scale=0.3, **options)
    expected = linear_logprob(hidden * 0.3, weight, targets, bias=bias * 0.3, **options)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_without_rows_each_row_has_one_target(backend: str) -> None:
    (hidden, weight, _), targets, _ = problem(6, 6, 9, 4, 0)
    found = linear_logprob(hidden, weight, targets, backend=backend)
    assert torch.equal(
        found, linear_logprob(hidden, weight, targets.numpy(), rows=torch.arange(6), backend=backend)
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_fp32(backend: str) -> None:
    leaves, targets, rows = problem(300, 400, 5000, 64, 0, torch.float32)
    hidden, weight, bias = leaves
    results = linear_logprob(
        hidden, weight, targets, rows=rows, bias=bias, return_entropy=True, backend=backend
    )
    check(results, leaves, targets, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_rows", [3, None])
def test_extreme_logits(dtype: torch.dtype, chunk_rows: int | None) -> None:
    """Logits of 1e4: probabilities of 0 and 1, an entropy of 0, no NaN."""
    leaves, targets, rows = problem(8, 10, 50, 16, 0, dtype, size=3000.0)
    hidden, weight, bias = leaves
    results = chunked_linear_logprob(hidden, weight, targets, rows, bias, 1.0, True, chunk_rows=chunk_rows)
    assert float(results[0].detach().abs().max()) > 1e4
    check(results, leaves, targets, rows)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_forbidden_tokens_have_no_probability_and_no_entropy(backend: str) -> None:
    (hidden, weight, _), targets, rows = problem(5, 7, 6, 4, 0)
    bias = torch.tensor([0.0, 0, 0, 0, 0, -torch.inf], dtype=torch.float64)
    targets = targets.clamp(max=4)
    found = linear_logprob(
        hidden, weight, targets, rows=rows, bias=bias, return_entropy=True, backend=backend
    )
    grads = torch.autograd.grad(found[0].sum() + found[1].sin().sum(), (hidden, weight))
    kept = weight.detach()[:5].requires_grad_()
    expected = linear_logprob(hidden, kept, targets, rows=rows, return_entropy=True, backend="reference")
    expected_grads = torch.autograd.grad(expected[0].sum() + expected[1].sin().sum(), (hidden, kept))
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-12
    assert relative_error(grads[0], expected_grads[0]) <= 1e-11
    assert relative_error(grads[1][:5], expected_grads[1]) <= 1e-11
    assert not grads[1][5].any()


@pytest.mark.parametrize("off", [0, 1, 2])
@pytest.mark.parametrize(
    "which", [(True, True), (True, False), (False, True)], ids=["both", "logprobs", "entropy"]
)
def test_each_gradient_and_each_result_switched_off(off: int, which: tuple[bool, bool]) -> None:
    leaves, targets, rows = problem(9, 12, 17, 5, 0)
    hidden, weight, bias = leaves

    def grads(backend: str) -> list[torch.Tensor]:
        logprobs, entropy = linear_logprob(
            hidden, weight, targets, rows=rows, bias=bias, return_entropy=True, backend=backend
        )
        loss = logprobs.sum() * which[0] if which[0] else torch.zeros(())
        loss = loss + entropy.sin().sum() if which[1] else loss
        return list(torch.autograd.grad(loss, [x for i, x in enumerate(leaves) if i != off]))

    expected = grads("reference")
    leaves[off].requires_grad_(False)
    assert max(relative_error(a, b) for a, b in zip(grads("chunked"), expected, strict=True)) <= 1e-11


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_targets_no_rows_non_contiguous(backend: str) -> None:
    (hidden, weight, _), targets, rows = problem(5, 8, 6, 4, 0)
    none = torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = linear_logprob(hidden, weight, none, rows=none, return_entropy=True, backend=backend)
    assert logprobs.shape == (0,)
    assert entropy.shape == (5,)
    (logprobs.sum() + entropy.sum()).backward()
    empty = linear_logprob(hidden[:0], weight, none, backend=backend)
    assert empty.shape == (0,)
    empty.sum().backward()

    strided = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    spaced = targets.repeat_interleave(2)[::2], rows.repeat_interleave(3)[::3]
    a = linear_logprob(strided[0], strided[1], spaced[0], rows=spaced[1], backend=backend)
    b = linear_logprob(hidden, weight, targets, rows=rows, backend=backend)
    assert relative_error(a, b) <= 1e-14
    for x, y in zip(
        torch.autograd.grad(a.sum(), strided), torch.autograd.grad(b.sum(), (hidden, weight)), strict=True
    ):
        assert relative_error(x, y) <= 1e-13


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_gradcheck(chunk_rows: int | None, softcap: float | None) -> None:
    leaves, targets, rows = problem(4, 5, 6, 3, 0)

    def chunked(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logprobs, entropy = chunked_linear_logprob(
            h, w, targets, rows, b, 0.8, True, softcap, chunk_rows=chunk_rows
        )
        assert entropy is not None
        return logprobs, entropy

    def reference(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear_logprob(
            h, w, targets,
            rows=rows, bias=b, temperature=0.8, softcap=softcap, return_entropy=True, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(chunked, leaves)
    assert torch.autograd.gradcheck(reference, leaves)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("with_entropy", [True, False])
def test_uninitialised_memory_never_shows(with_entropy: bool) -> None:
    leaves, targets, rows = problem(9, 3, 17, 5, 0)  # most rows have no target
    hidden, weight, bias = leaves
    results = chunked_linear_logprob(hidden, weight, targets, rows, bias, 1.0, with_entropy, chunk_rows=2)
    check(results, leaves, targets, rows)


def test_bf16_gives_fp32() -> None:
    (hidden, weight, _), targets, rows = problem(5, 6, 7, 8, 0, torch.bfloat16)
    found = linear_logprob(hidden, weight, targets, rows=rows)
    assert found.dtype == torch.float32
    exact, _ = logprobs_of_edges(hidden.double(), weight.double(), targets.tolist(), rows.tolist())
    assert relative_error(found, exact) <= 1e-6
    assert torch.autograd.grad(found.sum(), hidden)[0].dtype == torch.bfloat16


def test_a_fork_predicts_several_tokens_from_one_row() -> None:
    forest = pack_forest([[5, 6, 7], [5, 6, 8]])
    (hidden, weight, _), _, _ = problem(forest.num_nodes, 1, 9, 4, 0)
    nodes = forest.node_index[forest.trained]
    found = linear_logprob(hidden, weight, forest.tokens[nodes], rows=forest.parent[nodes])
    expected = torch.log_softmax(hidden @ weight.T, -1)
    assert relative_error(found, expected[[0, 1, 0, 1], [6, 7, 6, 8]]) <= 1e-14


def test_refusals() -> None:
    (hidden, weight, bias), targets, rows = problem(5, 5, 6, 4, 0)
    with pytest.raises(ValueError, match=r"'triton' does not run on cpu.*'chunked'"):
        linear_logprob(hidden, weight, targets, backend="triton")
    with pytest.raises(ValueError, match=r"targets holds 6, outside \[0, 6\)"):
        linear_logprob(hidden, weight, torch.full((5,), 6))
    with pytest.raises(ValueError, match=r"rows holds -1, outside \[0, 5\)"):
        linear_logprob(hidden, weight, targets, rows=rows * 0 - 1)
    with pytest.raises(ValueError, match="3 targets for 5 rows"):
        linear_logprob(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        linear_logprob(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="scale must be above 0"):
        linear_logprob(hidden, weight, targets, scale=0.0)
    with pytest.raises(ValueError, match="softcap must be above 0"):
        linear_logprob(hidden, weight, targets, softcap=-1.0)
    with pytest.raises(ValueError, match="bias has shape"):
        linear_logprob(hidden, weight, targets, bias=bias[:3])
    with pytest.raises(ValueError, match="weight has no rows"):
        linear_logprob(hidden, weight[:0], targets[:0], rows=rows[:0])
    with pytest.raises(ValueError, match="must hold integers"):
        linear_logprob(hidden, weight, targets.double())
