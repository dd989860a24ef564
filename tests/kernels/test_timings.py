"""The timing table's arithmetic and layout, with a timer that does not time."""

import pytest
import torch

from mosaic_kernels import pack_forest
from mosaic_kernels.oracle import relative_error
from mosaic_kernels.proof import timings
from mosaic_kernels.proof.timings import Row, Spread, attention_flops, peak_tflops, table


def test_attention_counts_visible_pairs() -> None:
    """Against the dense mask: 2 products forward and 5 backward, of D multiply-adds a pair and head."""
    forest = pack_forest([[1, 2, 3], [1, 2, 4, 5], [6]])
    node = torch.arange(forest.num_nodes)
    end = torch.from_numpy(forest.subtree_end)
    pairs = int(((node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])).sum())
    assert attention_flops(forest, 4, 64, backward=False) == 4 * 64 * 4 * pairs
    assert attention_flops(forest, 4, 64, backward=True) == 10 * 64 * 4 * pairs


def test_a_row_shows_rate_share_and_ratio() -> None:
    rows = [
        Row("forward", "ours", Spread(2.0, 1.5, 2.5), 1e12),
        Row("forward", "other", Spread(5.0, 4.0, 6.0), 1e12),
        Row("forward", "absent", None, 1e12, "not installed"),
        Row("both", "ours", Spread(4.0, 4.0, 4.0), 2e12),
    ]
    lines = [line.split() for line in table(rows, peak=1000.0)][1:]
    assert lines[0] == ["forward", "ours", "2.000", "1.500-2.500", "500.0", "50.0%", "1.00x"]
    assert lines[1][-3:] == ["200.0", "20.0%", "2.50x"]
    assert lines[2][-2:] == ["not", "installed"]
    assert lines[3][-1] == "1.00x", "a ratio is to ours in the same work"
    assert "%" not in "".join(table(rows, peak=None))


def test_log_probs_are_summed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run here give the same gradients; missing packages are rows with the reason."""
    exact = timings.linear_logprob

    def as_chunked(*args: torch.Tensor, backend: str) -> torch.Tensor:
        return exact(*args, backend="chunked")

    monkeypatch.setattr(timings, "linear_logprob", as_chunked)
    seen: list[object] = []

    def timer(run: timings.Run) -> Spread:
        seen.append(run())
        return Spread(1.0, 1.0, 1.0)

    rows = list(timings.logprob_rows(timer, device="cpu", rows=5, size=16, vocabulary=11))
    assert [row.implementation for row in rows if row.spread is not None] == [
        "triton (ours)", "chunked", "torch, all logits",
    ]  # fmt: skip
    assert {row.flops for row in rows} == {3 * 2 * 5 * 16 * 11}
    for a, b in zip(seen[0], seen[2], strict=True):  # pyrefly: ignore [bad-argument-type]
        assert relative_error(a, b) < 2e-2


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 PCIe", 756.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA GeForce RTX 4090", None)],
)
def test_the_peak_of_a_device(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_every_implementation_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small forest on CPU, each backend replaced by the reference: same inputs, same gradients."""
    forest = pack_forest([[1, 2, 3], [1, 2, 4, 5], [6]])
    exact = timings.tree_attention

    def as_reference(*args: torch.Tensor, backend: str, **options: object) -> torch.Tensor:
        return exact(*args, backend="reference", **options)  # pyrefly: ignore [bad-argument-type]

    monkeypatch.setattr(timings, "tree_attention", as_reference)
    monkeypatch.setattr(timings, "timed_forests", lambda: iter([("small", forest)]))
    seen: list[object] = []

    def timer(run: timings.Run) -> Spread:
        seen.append(run())
        return Spread(1.0, 1.0, 1.0)

    rows = list(timings.attention_rows(timer, device="cpu"))
    timed = [row.implementation for row in rows if row.spread is not None]
    assert timed == ["triton (ours)", "flex", "SDPA, dense mask"] * 2
    assert [row.note for row in rows if row.spread is None] == ["flash-attn is not installed"] * 2
    ours, _, dense = seen[:3]
    assert isinstance(ours, torch.Tensor)
    assert isinstance(dense, torch.Tensor)
    assert relative_error(ours, dense) < 1e-2
    for a, b in zip(seen[3], seen[5], strict=True):  # pyrefly: ignore [bad-argument-type]
        assert relative_error(a, b) < 2e-2
