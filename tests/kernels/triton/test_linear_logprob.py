"""The log-prob kernels against one row at a time."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import linear_logprob
from mosaic_kernels.attention.tiles import architecture_of
from mosaic_kernels.logprob.reference import reference_linear_logprob
from mosaic_kernels.logprob.tiles import EMULATED, tiles_for
from mosaic_kernels.logprob.triton import Variant, deviations, tiled_linear_logprob
from mosaic_kernels.magnitudes import logprob_magnitudes
from mosaic_kernels.oracle import logprobs_of_edges
from mosaic_kernels.rounding import gradients_of, weighting, worst
from mosaic_kernels.selfcheck import KernelMismatch, run_check
from tests.kernels.criterion import assert_right
from tests.kernels.strategies import seeds
from tests.kernels.triton.machine import machine, on_machine

dtypes = st.sampled_from(machine().dtypes)


@dataclass(frozen=True)
class Problem:
    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    targets: torch.Tensor  # [E]
    rows: torch.Tensor  # [E]
    temperature: float = 1.0
    softcap: float | None = None
    entropy: bool = True


def draw(
    rows: int, edges: int, vocab: int, dim: int, seed: int, dtype: torch.dtype, size: float = 1.0
) -> Problem:
    """Rows with no target, with several, and with the same target twice."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(s, generator=generator) for s in ((rows, dim), (vocab, dim), (vocab,))
    )
    targets = torch.randint(vocab, (edges,), generator=generator)
    row_index = torch.randint(max(rows, 1), (edges,), generator=generator)
    repeated = torch.arange(edges) % max(1, edges - edges // 4)  # the last quarter repeats the first edges
    targets, row_index = targets[repeated], row_index[repeated]
    return Problem((hidden * size).to(dtype), weight.to(dtype), bias, targets, row_index)


def results(
    problem: Problem, how: str, dtype: torch.dtype, splits: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Results and gradients by the Triton kernels, or by the oracle."""
    names = ["hidden", "weight", *([] if problem.bias is None else ["bias"])]
    inputs = [getattr(problem, name) for name in names]
    if how == "oracle":
        leaves = [x.detach().to(dtype, copy=True) for x in inputs]
    else:  # the bias keeps its fp32
        leaves = [
            x.to(dtype if dtype == torch.float64 or x.ndim == 2 else x.dtype) for x in on_machine(*inputs)
        ]
    hidden, weight, *rest = leaves = [x.requires_grad_() for x in leaves]
    bias = rest[0] if rest else None
    targets, rows = on_machine(problem.targets, problem.rows)
    options = (problem.temperature, problem.softcap)
    entropy: torch.Tensor | None
    if how == "oracle":
        logprobs, entropy = logprobs_of_edges(
            hidden, weight, problem.targets.tolist(), problem.rows.tolist(),
            bias=bias, temperature=options[0], softcap=options[1],
        )  # fmt: skip
    else:
        tiles = tiles_for(architecture_of(machine().device), dtype, len(hidden))
        logprobs, entropy = tiled_linear_logprob(
            hidden, weight, targets, rows, bias, options[0], problem.entropy, options[1],
            tiles=tiles, splits=splits, chunk_logits=len(hidden) * tiles.backward.vocab * 3,
        )  # fmt: skip
    found = {"logprobs": logprobs}
    if problem.entropy and entropy is not None:
        found["entropy"] = entropy
    weights = weighting(list(found.values()), seed)
    gradients = gradients_of(list(found.values()), leaves, weights)
    return found | {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def check(problem: Problem, splits: int = 3, seed: int = 0) -> None:
    """Results and gradients are the fp64 oracle's, as far as rounding leaves them."""
    compare(results(problem, "triton", problem.hidden.dtype, splits, seed), problem, seed)


def compare(ours: dict[str, torch.Tensor], problem: Problem, seed: int = 0) -> None:
    exact = results(problem, "oracle", torch.float64, seed=seed)
    hidden, weight = (x.double() for x in (problem.hidden, problem.weight))
    of_logprobs, *of_entropy = weighting([exact[x] for x in ("logprobs", "entropy") if x in exact], seed)
    magnitudes = logprob_magnitudes(
        hidden, weight, problem.targets, problem.rows, of_logprobs, of_entropy[0] if of_entropy else None,
        bias=None if problem.bias is None else problem.bias.double(),
        temperature=problem.temperature, softcap=problem.softcap, dtype=problem.hidden.dtype,
    )  # fmt: skip
    of_result = dict(zip(("logprobs", "entropy", "dhidden", "dweight", "dbias"), magnitudes, strict=True))
    terms = max(*weight.shape, len(problem.targets), len(hidden))
    assert set(ours) == set(exact)
    assert_right(ours, (worst(ours[x], exact[x], of_result[x], problem.hidden.dtype, terms) for x in ours))


@settings(max_examples=machine().examples)
@given(
    rows=st.integers(1, 40),
    edges=st.integers(0, 60),
    vocab=st.sampled_from([1, 31, 32, 33, 100, 161]),
    dim=st.sampled_from([16, 20, 40]),
    seed=seeds,
    dtype=dtypes,
    temperature=st.sampled_from([1.0, 0.6]),
    softcap=st.sampled_from([None, None, 2.5]),
    with_bias=st.booleans(),
    with_entropy=st.booleans(),
    splits=st.sampled_from([1, 2, 4, 100]),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_one_row_at_a_time(
    rows: int, edges: int, vocab: int, dim: int, seed: int, dtype: torch.dtype, temperature: float,
    softcap: float | None, with_bias: bool, with_entropy: bool, splits: int,
) -> None:  # fmt: skip
    p = draw(rows, edges, vocab, dim, seed, dtype)
    bias = p.bias if with_bias else None
    p = Problem(p.hidden, p.weight, bias, p.targets, p.rows, temperature, softcap, with_entropy)
    check(p, splits, seed)


@pytest.mark.parametrize("dtype", machine().dtypes, ids=str)
def test_odd_sizes_with_everything_on(dtype: torch.dtype) -> None:
    """Several row tiles, vocabulary tiles, splits and chunks, none of them full at the end."""
    p = draw(37, 80, 150, 36, 0, dtype)
    check(Problem(p.hidden, p.weight, p.bias, p.targets, p.rows, 0.7, 3.0, True))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_temperature_and_softcap_are_told_apart(softcap: float | None) -> None:
    """The temperature divides the capped logits, and both reach the gradient."""
    p = draw(20, 30, 70, 16, 1, torch.float32, size=2.0)
    check(Problem(p.hidden, p.weight, None, p.targets, p.rows, 0.3, softcap, True))


def test_a_fork_of_many_targets_from_one_row() -> None:
    p = draw(18, 3, 120, 16, 2, torch.float32)
    targets, rows = torch.arange(100), torch.full((100,), 17)
    check(Problem(p.hidden, p.weight, p.bias, targets, rows))


def test_the_largest_logit_comes_first_or_last() -> None:
    """The running maximum rises at every tile, or never again."""
    p = draw(17, 20, 130, 16, 3, torch.float32)
    for slope in (0.3, -0.3):
        bias = slope * torch.arange(130.0)
        check(Problem(p.hidden, p.weight, bias, p.targets, p.rows), splits=2)


def test_forbidden_tokens_fill_tiles_and_splits() -> None:
    """A bias of -inf: whole tiles, and a whole split, have no maximum and no probability."""
    tile = EMULATED.forward.vocab
    p = draw(17, 20, 5 * tile, 16, 4, torch.float32)
    for first, last in ((3 * tile, 4 * tile), (tile + 3, tile + 9), (0, 2 * tile)):
        bias = torch.full((5 * tile,), -torch.inf)
        bias[first:last] = 0.5
        targets = p.targets % (last - first)
        for entropy in (True, False):
            ours = results(
                Problem(p.hidden, p.weight, bias, first + targets, p.rows, entropy=entropy),
                "triton", torch.float32,
            )  # fmt: skip
            rest = torch.cat([ours["dweight"][:first], ours["dweight"][last:]])
            assert not rest.any()
            ours |= {name: ours[name][first:last] for name in ("dweight", "dbias")}
            smaller = Problem(
                p.hidden, p.weight[first:last], bias[first:last], targets, p.rows, entropy=entropy
            )
            compare(ours, smaller)


def test_extreme_logits() -> None:
    """Logits of thousands: probabilities of 0 and 1, and log-probs that keep their digits."""
    check(draw(20, 30, 100, 16, 5, torch.float32, size=500.0))


def test_a_confident_log_prob_of_a_large_logit_keeps_its_digits() -> None:
    """log p = -log(1 + 99 exp(-12)) beside logits of 1,000, whose spacing is a hundredth of it."""
    bias = torch.full((100,), 988.0)
    bias[7] = 1000.0
    hidden, weight, bias = on_machine(torch.zeros(3, 16), torch.zeros(100, 16), bias)
    found = linear_logprob(hidden, weight, torch.full((3,), 7), bias=bias, backend="triton")
    exact = -math.log1p(99 * math.exp(-12))
    assert all(abs(value / exact - 1) < 1e-3 for value in found.tolist())


def test_tanh_keeps_its_digits_near_zero() -> None:
    """Logits far below the cap: the closed form of tanh alone would leave noise of an epsilon."""
    p = draw(20, 30, 64, 16, 6, torch.float32, size=1e-3)
    problem = Problem(p.hidden, p.weight, None, p.targets, p.rows, 1e-3, 50.0, True)
    check(problem)


def test_rows_without_a_target_are_not_touched() -> None:
    p = draw(9, 1, 40, 16, 7, torch.float32)
    hidden, weight, rows, targets = on_machine(
        p.hidden, p.weight, torch.tensor([2, 5, 2]), torch.tensor([1, 0, 3])
    )
    hidden[[0, 1, 3, 4, 6, 7, 8]] = torch.nan
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs = linear_logprob(hidden, weight, targets, rows=rows, backend="triton")
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert logprobs.isfinite().all()
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0][[0, 1, 3, 4, 6, 7, 8]].any()


@pytest.mark.parametrize("which", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("off", [0, 1, 2])
def test_each_gradient_and_each_result_switched_off(off: int, which: str) -> None:
    p = draw(20, 30, 50, 16, 8, torch.float32)
    assert p.bias is not None

    def grads(wanted: set[int]) -> list[torch.Tensor | None]:
        leaves = on_machine(p.hidden, p.weight, p.bias)
        leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(leaves)]
        targets, rows = on_machine(p.targets, p.rows)
        logprobs, entropy = linear_logprob(
            leaves[0], leaves[1], targets, rows=rows, bias=leaves[2], return_entropy=True, backend="triton"
        )
        loss = {"both": logprobs.sum() + entropy.sin().sum(), "logprobs": logprobs.sum()}
        loss.get(which, entropy.sin().sum()).backward()
        return [x.grad for x in leaves]

    full, part = grads({0, 1, 2}), grads({0, 1, 2} - {off})
    for index, (a, b) in enumerate(zip(full, part, strict=True)):
        assert a is not None
        assert b is None if index == off else b is not None and torch.equal(a, b)


def test_nothing_to_compute() -> None:
    hidden, weight = on_machine(torch.randn(5, 16), torch.randn(40, 16))
    hidden.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = linear_logprob(hidden, weight, none, rows=none, return_entropy=True, backend="triton")
    assert logprobs.shape == (0,)
    assert entropy.shape == (5,)
    (logprobs.sum() + entropy.sum()).backward()
    empty = linear_logprob(hidden[:0], weight, none, backend="triton")
    assert empty.shape == (0,)
    assert not torch.autograd.grad(empty.sum(), hidden)[0].any()


def test_a_target_outside_the_vocabulary_shows() -> None:
    """On an accelerator targets are not checked: the log-prob is then not a number, whatever memory held."""
    p = draw(20, 4, 40, 16, 12, torch.float32)
    hidden, weight, rows = on_machine(p.hidden, p.weight, torch.tensor([0, 5, 19, 7]))
    targets = torch.tensor([-1, 40, 64, 39]).to(rows)
    tiles = tiles_for(architecture_of(machine().device), torch.float32, 20)
    found, _ = tiled_linear_logprob(hidden, weight, targets, rows, None, 1.0, False, None, tiles=tiles)
    assert not found[:3].isfinite().any()
    assert found[3].isfinite()


def test_any_layout() -> None:
    p = draw(20, 30, 50, 16, 9, torch.float32)
    hidden, weight, targets, rows = on_machine(p.hidden, p.weight, p.targets, p.rows)
    strided = [x.T.contiguous().T for x in (hidden, weight)]
    spaced = [x.repeat_interleave(2)[::2] for x in (targets, rows)]
    a = linear_logprob(hidden, weight, targets, rows=rows, backend="triton")
    b = linear_logprob(strided[0], strided[1], spaced[0], rows=spaced[1], backend="triton")
    assert torch.equal(a, b)


def test_the_same_call_gives_the_same_bits() -> None:
    p = draw(37, 80, 150, 36, 10, torch.float16)
    first, second = results(p, "triton", torch.float16), results(p, "triton", torch.float16)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_cut_of_the_vocabulary_changes_rounding_only() -> None:
    p = draw(20, 30, 300, 16, 11, torch.float32)
    results_of = [results(p, "triton", torch.float32, splits) for splits in (1, 5)]
    for name, x in results_of[0].items():
        assert torch.allclose(x, results_of[1][name], rtol=1e-5, atol=1e-5), name


def test_fp64_is_refused_by_name_and_avoided_by_default() -> None:
    hidden, weight = on_machine(torch.randn(5, 16).double(), torch.randn(40, 16).double())
    targets = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="for fp64 use backend='chunked' or 'reference'"):
        linear_logprob(hidden, weight, targets, backend="triton")
    assert linear_logprob(hidden, weight, targets).dtype == torch.float64


def test_an_architecture_without_tiles_is_named() -> None:
    with pytest.raises(ValueError, match=r"no tile for torch.bfloat16 on sm_70 .*'chunked'"):
        tiles_for("sm_70", torch.bfloat16, 1000)


@pytest.mark.parametrize("entropy", [True, False])
def test_tile_and_self_check_are_those_of_the_rows_that_are_computed(
    entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that no target needs are dropped first; what is checked is what runs: its D, bias or none."""
    asked, checked = [], []
    monkeypatch.setattr(
        "mosaic_kernels.logprob.triton.tiles_for", lambda *args: asked.append(args[2]) or tiles_for(*args)
    )
    monkeypatch.setattr("mosaic_kernels.logprob.triton.check_once", lambda *args: checked.append(args[2]))
    hidden, weight, rows, targets = on_machine(
        torch.randn(100, 20), torch.randn(40, 20), torch.tensor([7, 90]), torch.tensor([1, 2])
    )
    linear_logprob(hidden, weight, targets, rows=rows, return_entropy=entropy, backend="triton")  # pyrefly: ignore [no-matching-overload]
    few = not entropy
    assert asked == [2 if few else 100]
    assert checked == [
        Variant(torch.float32, "ieee", 20, few_rows=few, entropy=entropy, bias=False, softcap=False)
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_the_self_check_passes_and_sees_a_kernel_that_is_off(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(torch.float32, "ieee", 20, few_rows=True, entropy=True, bias=bias, softcap=bias)
    device = machine().device
    found = deviations(device, variant)
    gradients = {f"d{name}{of}" for name in ("hidden", "weight") for of in ("", " of log-probs")}
    assert set(found) == {"logprobs", "entropy", *gradients}
    assert all(x.error <= x.limit for x in found.values())

    def off(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain PyTorch, which is quicker than an emulated kernel, and log-probs that are off."""
        hidden, weight, targets, rows, given, temperature, _, softcap = args
        assert (given is not None) == bias
        logprobs, entropy = reference_linear_logprob(
            hidden, weight, targets, rows, given, temperature, softcap
        )
        return logprobs * (1 + 1e-4), entropy

    monkeypatch.setattr("mosaic_kernels.logprob.triton.tiled_linear_logprob", off)
    with pytest.raises(KernelMismatch, match=r"linear_logprob: .*: logprobs, dhidden, dweight, .* off;"):
        run_check("linear_logprob", device, variant, deviations)
