"""Whether a model is run on forests, and in which way: shown once by the model in small, not by its name.

A small random forest (several trees, forks at every depth, longer than every window) is run as Policy runs
it, and its rollouts through the model's own forward with transformers' own attention. Log-probs and the
gradient of every weight have to agree. Of the ways to run a model the first one that agrees is taken. Where
none does, the model is refused, with the first layer that differs and why.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy.attention import TreeForward
from mosaic_fast.policy.forest_tensors import forest_tensors
from mosaic_fast.policy.forward import WAYS, Way, run_model, way_of
from mosaic_fast.policy.selected import forest_selected
from mosaic_fast.policy.small_copy import WINDOW, layers_of, small_copy
from mosaic_kernels import PackedForest, pack_forest

LOGPROB_LIMIT = 1e-4
"""Largest difference of a log-prob in fp32; what is wrong is off by 0.01 and more."""
GRADIENT_LIMIT = 1e-3
"""Largest difference of a gradient in fp32, relative to its norm or a hundredth of the largest norm."""
HALF_FACTOR, HALF_FLOOR = 3.0, 0.02
"""In half precision: so many times what the model's own forward loses against fp32, and a floor."""

_WITHIN_A_TOKEN = ("mlp", "moe")
"""Kinds of layers, as configurations call them, that mix no positions."""

logger = logging.getLogger("mosaic_fast")


@dataclass(frozen=True)
class Trial:
    """A row of the table in the run folder: what was compared with the model's forward, and the result."""

    what: str
    dtype: str
    logprobs: float  # largest difference; in half precision the mean one
    gradients: float  # relative; 0 where none are compared
    logprob_limit: float
    gradient_limit: float
    reason: str = ""  # why it could not be run

    @property
    def passed(self) -> bool:
        """Whether the differences are numbers within their limits."""
        within = self.logprobs <= self.logprob_limit and self.gradients <= self.gradient_limit
        return within and not self.reason

    def row(self) -> dict[str, object]:
        """For proof.json, in which a figure that is not finite is null."""
        values = {k: None if v in (np.inf, -np.inf) or v != v else v for k, v in asdict(self).items()}
        return {"passed": self.passed, **values}


@dataclass(frozen=True)
class Admission:
    """The way in which a model is run, and the trials that showed it."""

    way: Way
    trials: tuple[Trial, ...]
    layers: int  # of the model in small
    seconds: float

    def in_words(self) -> str:
        """A line for the user."""
        shown = self.trials[-1]
        return (
            f"proved on a model in small ({self.layers} layers, {self.seconds:.2f} s): on a forest as each "
            f"rollout alone, log-probs to {shown.logprobs:.0e}, gradients to {shown.gradients:.0e} "
            f"({shown.dtype}, called by {self.way})"
        )


_ADMITTED: dict[tuple[object, ...], Admission] = {}


def kind_of(model: PreTrainedModel) -> tuple[object, ...]:
    """What a proof depends on: models of one kind are proved once a process."""
    described = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):
        described.pop(name, None)
    return type(model), json.dumps(described, sort_keys=True, default=str), model.dtype, model.device.type


def admit(model: PreTrainedModel) -> Admission:
    """Try a model in small. UserError where it cannot be run on a forest exactly."""
    key = kind_of(model)
    if key not in _ADMITTED:
        _ADMITTED[key] = _admit(model)
    return _ADMITTED[key]


def _admit(model: PreTrainedModel) -> Admission:
    start = time.perf_counter()
    trials: list[Trial] = []
    proof = _Proof(small_copy(model))
    for way in _ways(proof.model):
        trials += proof.tried(way, model.dtype)
        if trials[-1].passed:
            break
    else:
        again = _Proof(small_copy(model, seed=1))
        if proof.seldom_off:  # two experts may tie on one draw, and a rounding then chooses between them
            trials += again.tried(way, model.dtype)
    if not trials[-1].passed:
        raise UserError(
            f"{type(model).__name__} cannot be trained on a forest exactly: {_why(proof, trials[-1])}; take "
            "another model"
        )
    layers = len(layers_of(proof.model))
    found = Admission(way, tuple(trials), layers, time.perf_counter() - start)
    logger.info("%s: %s", type(model).__name__, found.in_words())
    return found


def _ways(model: PreTrainedModel) -> list[Way]:
    return [way for way in WAYS if way_of(model, way) == way]


def proof_rollouts(model: PreTrainedModel) -> list[NDArray[np.int64]]:
    """Three trees: one left at every second token, one whose forks fork again, one rollout alone.

    They have two lengths, both more than two windows of the model in small.
    """
    vocab: int = model.config.vocab_size
    rng = np.random.default_rng(0)
    length, short = 3 * WINDOW, 2 * WINDOW + 1

    def leave(stem: NDArray[np.int64], at: int, whole: int) -> NDArray[np.int64]:
        return np.concatenate([stem[:at], rng.integers(0, vocab, whole - at)])

    trunk, other = rng.integers(0, vocab, length), rng.integers(0, vocab, length)
    found = [trunk, *(leave(trunk, at, length) for at in range(1, length, 2))]
    for at in (3, 7, 11):
        found.append(other)
        other = leave(other, at, length)
    return [*found, other, leave(trunk, 4, short), leave(other, 8, short), rng.integers(0, vocab, short)]


class _Proof:
    """The rollouts' own log-probs and gradients, which each way is compared with."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sequences = proof_rollouts(model)
        self.forest: PackedForest = pack_forest(self.sequences)
        self.seldom_off = False  # whether most log-probs of the last way agree, and some do not
        generator = torch.Generator().manual_seed(0)
        self._weights = torch.randn(self.forest.num_tokens, generator=generator).to(model.device)

    @cached_property
    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """Log-probs [T] and gradients."""
        try:
            return self._with_gradients(lambda: alone(self.model, self.sequences))
        except Exception as error:
            raise UserError(f"its own forward without a cache fails ({_one_line(error)})") from error

    def tried(self, way: Way, dtype: torch.dtype) -> list[Trial]:
        """The trials of a way: in fp32, and in half precision where the model is of it."""
        trial = self._compared(way)
        half = trial.passed and dtype in (torch.bfloat16, torch.float16)
        return [trial, self.in_half(way, dtype)] if half else [trial]

    def _compared(self, way: Way) -> Trial:
        limits = (LOGPROB_LIMIT, GRADIENT_LIMIT)
        try:
            logprobs, gradients = self._with_gradients(lambda: on_forest(self.model, way, self.forest)[0])
            apart = (logprobs - self.expected[0]).abs()
        except Exception as error:  # noqa: BLE001  any line of a family's code
            return Trial(way, "float32", np.inf, np.inf, *limits, reason=_one_line(error))
        self.seldom_off = float(apart.median()) <= LOGPROB_LIMIT < float(apart.max())
        return Trial(way, "float32", float(apart.max()), _furthest(gradients, self.expected[1]), *limits)

    def in_half(self, way: Way, dtype: torch.dtype) -> Trial:
        """A way in half precision, against what the model's own forward loses there. Rounds the weights."""
        module: nn.Module = self.model
        module.to(dtype)
        own = self._with_gradients(lambda: alone(self.model, self.sequences))
        ours = self._with_gradients(lambda: on_forest(self.model, way, self.forest)[0])
        logprobs, gradients = (
            [float((one[0] - self.expected[0]).abs().mean()) for one in (own, ours)],
            [_distance(one[1], self.expected[1]) for one in (own, ours)],
        )
        limits = [HALF_FACTOR * lost[0] + HALF_FLOOR for lost in (logprobs, gradients)]
        name = str(dtype).removeprefix("torch.")
        return Trial(way, name, logprobs[1], gradients[1], limits[0], limits[1])

    def _with_gradients(self, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Log-probs [T], and a gradient of each weight, of a sum in which every token has its own part."""
        weights = list(self.model.parameters())
        with torch.enable_grad():
            logprobs = run()
            found = torch.autograd.grad((self._weights * logprobs).sum(), weights, allow_unused=True)
        given = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        return logprobs.detach(), [one.float() for one in given]


def alone(model: PreTrainedModel, sequences: list[NDArray[np.int64]]) -> Tensor:  # [T]
    """Log-probs of rollouts by the model's own forward; those of one length are a batch, without padding."""
    found: dict[int, Tensor] = {}
    for length in sorted({len(one) for one in sequences}):
        numbers = [number for number, one in enumerate(sequences) if len(one) == length]
        ids = torch.from_numpy(np.stack([sequences[number] for number in numbers])).to(model.device)
        table = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        values = table.gather(2, ids[:, 1:, None])[..., 0]
        values = torch.cat([values.new_zeros(len(numbers), 1), values], dim=1)
        found |= dict(zip(numbers, values, strict=True))
    return torch.cat([found[number] for number in range(len(sequences))])


def on_forest(model: PreTrainedModel, way: Way, forest: PackedForest) -> tuple[Tensor, TreeForward]:
    """Log-probs [T] of all tokens but each rollout's first, run as Policy runs them."""
    tensors = forest_tensors(forest, model.device)
    tree = TreeForward(tensors)
    with forest_selected(model):
        edges, _ = run_model(model, way, tree, tensors.longest, 1.0, False)
    check_attended(model, tree)
    spread = edges.new_zeros(forest.num_tokens)
    return spread.index_copy(0, tensors.trained_tokens, edges.index_select(0, tensors.token_edges)), tree


def check_attended(model: PreTrainedModel, tree: TreeForward) -> None:
    """UserError where a layer neither called transformers' attention nor ran its recurrence on the forest."""
    layers = layers_of(model) or [model] * model.config.num_hidden_layers
    kinds = getattr(model.config, "layer_types", None) or [""] * len(layers)
    for number, layer in enumerate(layers[: model.config.num_hidden_layers]):
        if number not in tree.attended and kinds[number] not in _WITHIN_A_TOKEN:
            parts = ", ".join(f"{name} ({type(part).__name__})" for name, part in layer.named_children())
            raise UserError(
                f"layer {number} mixes positions outside attention: none of its parts, {parts:.160}, calls "
                "the attention that transformers lets one choose, or a recurrence that is known"
            )


def _furthest(gradients: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of a weight's gradient, relative to its norm or a hundredth of the largest."""
    norms = [float(one.norm()) for one in expected]
    floor = 0.01 * max(norms) or 1.0
    pairs = zip(gradients, expected, norms, strict=True)
    return max(float((one - other).norm()) / max(norm, floor) for one, other, norm in pairs)


def _distance(gradients: list[Tensor], expected: list[Tensor]) -> float:
    """Of all weights together, relative."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(gradients, expected, strict=True))
    return float(np.sqrt(apart / max(1e-30, sum(float(b.square().sum()) for b in expected))))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _why(proof: _Proof, trial: Trial) -> str:
    """Where the last way that was tried, the model's own forward, begins to differ on a forest, and why."""
    model = proof.model
    if trial.dtype != "float32":
        return (
            f"in {trial.dtype} it is off by more than its own forward is there: log-probs by "
            f"{trial.logprobs:.1e} (limit {trial.logprob_limit:.1e}), gradients by {trial.gradients:.1e} "
            f"({trial.gradient_limit:.1e})"
        )
    if not trial.reason and not torch.equal(*(alone(model, proof.sequences) for _ in range(2))):
        return "it draws random numbers in training mode, so that no two forwards are the same"
    forest, entered = proof.forest, [""]
    index = torch.from_numpy(forest.node_index).to(model.device)
    with _recorded(model, entered) as shared:
        try:
            _, tree = on_forest(model, "model", forest)
        except Exception:  # noqa: BLE001  it was said by the trial
            return f"{entered[0]}: {trial.reason}" if entered[0] else trial.reason
    if trial.reason:
        return trial.reason
    with _recorded(model, entered) as own:
        for one in proof.sequences:
            alone(model, [one])
    classes = dict(model.named_modules())
    for name, outputs in shared.items():
        expected = torch.cat(own[name], dim=1) if name in own else None
        if expected is None or outputs[0].shape[1] != forest.num_nodes:
            continue
        found = outputs[0].index_select(1, index)
        if float((found - expected).abs().max()) <= LOGPROB_LIMIT * float(1.0 + expected.abs().max()):
            continue
        part = f"{name} ({type(classes[name]).__name__})"
        return f"the first part that differs is {part}{_reason(name, model, tree)}"
    return f"log-probs differ by {trial.logprobs:.1e}, gradients by {trial.gradients:.1e}, behind its layers"


def _reason(name: str, model: PreTrainedModel, tree: TreeForward) -> str:
    """What sets a part of a layer apart, as far as it can be seen from outside."""
    numbers = [number for number, layer in enumerate(layers_of(model)) if _is_in(name, layer, model)]
    if numbers and numbers[0] not in tree.attended:
        return ", which mixes positions outside attention"
    if tree.keywords:
        named = ", ".join(sorted(tree.keywords))
        return f", whose attention is given {named}, which tree attention does not read"
    return ": a token sees there something else than itself and the tokens before it, or not all of a window"


def _is_in(name: str, layer: nn.Module, model: PreTrainedModel) -> bool:
    path = next(path for path, part in model.named_modules() if part is layer)
    return f"{name}.".startswith(f"{path}.")


@contextmanager
def _recorded(model: PreTrainedModel, entered: list[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """What each layer and each of its parts gives in the forwards inside, in the order in which they end.

    entered: its first place holds the layer or part that was entered and not left.
    """
    watched = {id(part) for layer in layers_of(model) for part in (layer, *layer.children())}
    found: dict[str, list[Tensor]] = {}
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, inputs: entered.__setitem__(0, f"{name} ({type(module).__name__})")

    def leave(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            entered[0] = ""
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.ndim == 3:
                found.setdefault(name, []).append(first.detach())

        return keep

    for name, part in model.named_modules():
        if id(part) in watched:
            handles += [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(leave(name))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
