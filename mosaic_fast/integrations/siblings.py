"""Rows with a common beginning in the same micro-batch, where TRL would scatter them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer

from mosaic_fast.errors import UserError

Batch = dict[str, Any]  # of TRL: name -> [B, ...], a list of B, a number of the whole, or None

_COLUMNS = (
    "input_ids",
    "prompt_ids",
)  # of a prepared dataset: what the rows of SFT, or DPO and KTO, begin with


class SiblingSampler(Sampler[int]):
    """Indices of a dataset in batches of rows that are neighbours in the order of their tokens.

    Each epoch has the batches in another order. Rows that do not fill the last one come at the end.

    >>> list(SiblingSampler([[7, 1], [5, 2], [7, 3], [5, 4]], 2, seed=0))  # 5s together, and 7s
    [1, 3, 0, 2]
    """

    def __init__(self, rows: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
        self._batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self._seed, self._epoch, self._size = seed, 0, batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, so that a resumed run sees the order that the epoch had."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def __iter__(self) -> Iterator[int]:
        whole = len(self) // self._size
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        for index in torch.randperm(whole, generator=generator).tolist():
            yield from self._batches[index]
        for rest in self._batches[whole:]:
            yield from rest


def keep_siblings(trainer: Trainer) -> None:
    """Change which rows the trainer's micro-batches hold. UserError where it does not draw them at random."""
    if hasattr(trainer, "_buffered_inputs"):  # GRPO, RLOO
        _regroup_generated(trainer)
        return
    strategy = trainer.args.train_sampling_strategy
    if strategy != "random":
        raise UserError(
            f"siblings=True orders rows itself, and train_sampling_strategy is {strategy!r}: leave it out"
        )
    data: Any = trainer.train_dataset
    column = next((one for one in _COLUMNS if one in (getattr(data, "column_names", None) or ())), None)
    if column is None or not hasattr(data, "__len__"):
        raise UserError("siblings=True needs a training dataset of known length that TRL has tokenized")
    size = trainer.args.train_batch_size * trainer.accelerator.num_processes
    sampler = SiblingSampler(list(data[column]), size, trainer.args.data_seed or trainer.args.seed)
    vars(trainer)["_get_train_sampler"] = lambda *_: sampler


def _regroup_generated(trainer: Any) -> None:
    """After each generation the rows of a prompt, which TRL has shuffled, are put side by side again."""
    before = trainer._prepare_inputs

    def prepare(generation_batch: object) -> object:
        known = trainer._buffered_inputs
        inputs = before(generation_batch)
        if not trainer.model.training or trainer._buffered_inputs is known:
            return inputs
        batches = trainer._buffered_inputs = regrouped(trainer._buffered_inputs)
        return batches[trainer._step % len(batches)]

    vars(trainer)["_prepare_inputs"] = prepare


def regrouped(batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """The same rows in as many micro-batches of the same size, those of one prompt next to each other.

    Prompts come in the order of their first row, so that it is still a random one.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])  # [B, P]
    _, prompt = torch.unique(prompts, dim=0, return_inverse=True)
    first = torch.full_like(prompt, len(prompt))
    first.scatter_reduce_(0, prompt, torch.arange(len(prompt), device=prompt.device), "amin")
    order = torch.argsort(first[prompt], stable=True)
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    found: list[Batch] = [{} for _ in batches]
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        for batch, value in zip(found, _reordered(values, order, sizes), strict=True):
            batch[name] = value
    return found


def _reordered(values: list[Any], order: Tensor, sizes: list[int]) -> Sequence[object]:
    if isinstance(values[0], Tensor) and values[0].ndim:
        return torch.cat(values)[order].split(sizes)
    if isinstance(values[0], list):
        rows = [row for value in values for row in value]
        picked = iter([rows[index] for index in order.tolist()])
        return [[next(picked) for _ in range(size)] for size in sizes]
    return values  # of the whole: a number, or None
