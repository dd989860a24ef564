"""A user's own loss: made with its options, called, and looked at before a gradient is taken of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast, get_args

import torch
from torch import Tensor

from mosaic_fast.config import LossConfig
from mosaic_fast.errors import UserError
from mosaic_fast.losses.batch import Couples, Loss, LossBatch, Normalisation, SumCount
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import finite_float, shown, yes_or_no
from mosaic_rollout.foreign.code import get_member, import_named

_ROUNDING = 1e-3  # by which the gradient of the parts may differ from the whole's, of its largest element


def load_loss(config: LossConfig) -> Loss:
    """An instance of the class that `module:Class` names, made with `loss.options` as keyword arguments.

    The working directory is searched first. UserError names what is wrong with the class or an option, and
    later with what the loss gives.
    """
    what = f"loss.name {config.name!r}"
    factory = import_named(config.name, "loss.name")
    name = str(getattr(factory, "__name__", config.name))
    _check_call(f"loss.options: {name}", factory, **config.options)
    made = ForeignCode(what).demand(f"{what}: {name}()", factory, **config.options)
    if not callable(made):
        raise UserError(f"{what}: it has no method __call__(policy_logprobs, batch, entropy)")
    _check_call(f"{what}: __call__(policy_logprobs, batch, entropy)", made, None, None, None)
    return _OwnLoss(made, config)


def _check_call(what: str, function: Callable[..., object], /, *args: object, **kwargs: object) -> None:
    """UserError where a function does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of compiled code have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{what} {error}") from None


class _OwnLoss(Loss):
    """A user's loss, with the KL and entropy terms that the configuration adds to any loss.

    What its class says of itself: `token_wise` (default False), `needs_reference` (False), `pairwise`
    (False), `normalisation` ("token"). One that is not token-wise is coupled: it is given the whole step, so
    that it may read whatever it likes and a forest still gives the flat batch's gradient.
    """

    def __init__(self, made: Callable[..., object], config: LossConfig) -> None:
        self._made, self._config = made, config
        self._what = f"loss.name {config.name!r}"
        self._code = ForeignCode(self._what)
        self._token_wise = self._says("token_wise")
        self._reads_reference = self._says("needs_reference")
        self.pairwise = self._says("pairwise")  # type: ignore[misc]  # of a user's class, known now
        found = config.normalisation or get_member(made, "normalisation", self._what) or "token"
        if found not in get_args(Normalisation):
            raise UserError(f"{self._what}: normalisation is none of {', '.join(get_args(Normalisation))}")
        self._normalisation = cast(Normalisation, found)
        self._checked = not self._token_wise

    def _says(self, name: str) -> bool:
        found = get_member(self._made, name, self._what)
        return False if found is None else yes_or_no(found, f"{self._what}: {name}")

    @property
    def normalisation(self) -> Normalisation:
        return self._normalisation

    @property
    def couples(self) -> Couples:
        return "token" if self._token_wise else "step"

    @property
    def needs_reference(self) -> bool:
        return self._reads_reference or bool(self._config.kl_weight)

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """See `Loss`. What does not count is 0 in all that the user's code is given."""
        given, zeroed = _zeroed(policy_logprobs, batch), _zeroed_batch(batch)
        bits = None if entropy is None else _zeroed(entropy, batch)
        if not self._checked and int(batch.counted.sum()) > 1:
            self._checked = True
            self._check_parts(given.detach(), zeroed, None if bits is None else bits.detach())
        value, metrics = self._value(given, zeroed, bits)
        value = (
            value
            + batch.kl_term(policy_logprobs, self._config.kl_weight or 0.0)
            + batch.entropy_term(entropy, self._config.entropy_weight)
        )
        own = batch.token_metrics(policy_logprobs, entropy)
        return value, {**own, **metrics, "policy/loss": SumCount(value.detach().double(), 0.0)}

    def _value(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """The loss as a term linear in both inputs: the user's own backward has been run by then."""
        name, inputs = self._config.name, [policy_logprobs, *([] if entropy is None else [entropy])]
        own = [one.detach().requires_grad_(policy_logprobs.requires_grad) for one in inputs]
        given = [one.clone() for one in own]  # which may be written to
        bits = given[1] if given[1:] else None
        found = self._code.demand(f"{name}: the loss", self._made, given[0], batch, bits)
        value, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise UserError(
                f"{name}: the loss must be a scalar tensor, or such a tensor and a dict of metrics, it is "
                f"{_described(value)}"
            )
        if not torch.isfinite(value):
            raise UserError(f"{name}: the loss must be finite, it is {float(value.detach())}")
        if policy_logprobs.requires_grad and not value.requires_grad:
            raise UserError(f"{name}: the loss does not depend on policy_logprobs, so it trains nothing")
        if not isinstance(metrics, Mapping):
            raise UserError(f"{name}: the metrics must be numbers by name, they are {shown(metrics)}")
        leaves = [one for one in own if one.requires_grad]
        if leaves:
            what = f"{name}: the loss's backward"
            found = self._code.demand(what, torch.autograd.grad, value, leaves, materialize_grads=True)
            value = value.detach()
            for one, gradient in zip(inputs, cast(tuple[Tensor, ...], found), strict=False):
                gradient = _zeroed(gradient, batch)
                if not gradient.isfinite().all():
                    raise UserError(f"{name}: the loss's gradient must be finite, it is not for some token")
                value = value + (gradient * (one - one.detach())).sum()
        return value, {
            f"loss/{key}": _metric(metric, f'"{key}" of {name}') for key, metric in metrics.items()
        }

    def _check_parts(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> None:
        """UserError where a loss that says it is token-wise is not the sum of two parts of its tokens."""
        counted = batch.counted.nonzero()[:, 0]
        middle = int(counted[len(counted) // 2])
        tokens = torch.arange(len(policy_logprobs), device=policy_logprobs.device)

        def gradient(source: Tensor) -> Tensor:
            leaf = policy_logprobs[source].clone().requires_grad_()
            value, _ = self._value(leaf, batch.part(source), None if entropy is None else entropy[source])
            return torch.autograd.grad(value, leaf)[0]

        whole = gradient(tokens)
        difference = whole - torch.cat([gradient(tokens[:middle]), gradient(tokens[middle:])])
        if not float(difference.abs().max()) <= _ROUNDING * float(whole.abs().max()):
            raise UserError(
                f"{self._config.name}: the loss says that it is token_wise, but its gradient on halves "
                "of a batch is not that on the whole; sum terms times batch.weights, or leave token_wise out"
            )


def _zeroed(values: Tensor, batch: LossBatch) -> Tensor:
    return values.where(batch.counted, 0.0)


def _zeroed_batch(batch: LossBatch) -> LossBatch:
    reference = batch.reference_logprobs
    return replace(
        batch,
        old_logprobs=_zeroed(batch.old_logprobs, batch),
        reference_logprobs=None if reference is None else _zeroed(reference, batch),
        advantages=_zeroed(batch.advantages, batch),
    )


def _metric(value: object, what: str) -> SumCount:
    """A metric of a user's: a plain number is one thing's, whatever it was computed of."""
    if isinstance(value, SumCount):
        return SumCount(finite_float(value.sum, what), finite_float(value.count, what))
    number = value.detach() if isinstance(value, Tensor) else value
    return SumCount(finite_float(number, what), 1.0)


def _described(value: object) -> str:
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else shown(value)
