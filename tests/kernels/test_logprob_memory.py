"""What log-probs hold in memory, and that gradients of chunks are added inside their products."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mosaic_kernels import linear_logprob
from mosaic_kernels.logprob.chunked import memory_plan
from tests.setup.memory.small_models import peak_bytes

MIB = 2**20


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("rows", "vocab"), [(300, 60_000), (70, 262_144)])
def test_the_cpus_path_holds_at_most_96_mib_beside_its_gradients(
    rows: int, vocab: int, softcap: float | None
) -> None:
    """Where all logits would be 69 and 70 MiB, with entropies and gradients of both results."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (rows, vocab))
    targets = torch.randint(vocab, (rows,), generator=generator)

    def run() -> None:
        logprobs, entropy = linear_logprob(hidden, weight, targets, softcap=softcap, return_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()

    taken = peak_bytes(run) - hidden.nbytes - weight.nbytes
    assert taken <= 96 * MIB, taken / MIB


@pytest.mark.parametrize("itemsize", [4, 8])
def test_whatever_rows_and_vocabulary_there_are(itemsize: int) -> None:
    """The plan that is followed above, for sizes that are too large to be run here."""
    for rows in (1, 100, 8192, 2**20):
        for vocab in (2, 418, 8192, 151_936, 262_144, 2_000_000):
            for softcap in (False, True):
                size, kept = memory_plan(rows, vocab, itemsize, softcap=softcap)
                buffers = (3 if softcap else 2) * min(size, rows) * vocab
                assert size >= 1
                assert kept >= 0
                assert (buffers + kept) * itemsize <= 90 * MIB
    assert memory_plan(8192, 151_936, 4)[0] > 70  # rows a chunk, for a weight that is read once each


def test_a_gradient_of_fp32_gets_each_chunk_by_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU in 16 bits: added inside it, in fp32; where PyTorch refuses, a product and an addition."""
    from mosaic_kernels.logprob import triton

    products = []
    monkeypatch.setattr(torch, "addmm", lambda *x, **more: products.append((x[0].dtype, more["out_dtype"])))
    with FakeTensorMode():
        total = torch.zeros(8, 4, device="cuda")
        a, b = (torch.zeros(n, m, device="cuda", dtype=torch.bfloat16) for n, m in ((8, 6), (6, 4)))
        monkeypatch.setattr(triton, "_adds_in_fp32", lambda device: True)
        triton.add_product(total, a, b)
        assert products == [(torch.float32, torch.float32)]
        monkeypatch.setattr(triton, "_adds_in_fp32", lambda device: False)
        triton.add_product(total, a, b)
        assert len(products) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_a_product_is_adding_a_product(dtype: torch.dtype) -> None:
    from mosaic_kernels.logprob.triton import add_product

    generator = torch.Generator().manual_seed(0)
    total = torch.randn(8, 4, generator=generator)
    a, b = (torch.randn(n, m, generator=generator).to(dtype) for n, m in ((8, 6), (6, 4)))
    expected = total.double() + a.double() @ b.double()
    add_product(total, a, b)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
