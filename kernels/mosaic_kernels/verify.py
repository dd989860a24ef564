"""Check every op on this machine: `python -m mosaic_kernels.verify [--layer NAME]... [--forests N]`.

    references   every PyTorch backend against the fp64 oracle, on random forests
    device       every Triton op on the CUDA device against the same oracle: results, gradients, bounds

Without --layer: both, the second where there is a CUDA device. Exits with 1 if a layer fails.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Layer:
    """One way to check the kernels."""

    needs: Callable[[], str]  # what is missing to run it here, empty if nothing
    run: Callable[[argparse.Namespace], bool]  # prints what it finds; whether all is well


def main() -> None:
    """Run the chosen layers and say how each ended."""
    options = parse(argument_parser("python -m mosaic_kernels.verify", __doc__, LAYERS))
    finish(options, LAYERS, run_layers(runnable(options, LAYERS), LAYERS, options))


def argument_parser(prog: str, about: str, layers: Mapping[str, Layer]) -> argparse.ArgumentParser:
    """The options that every command of layers has."""
    parser = argparse.ArgumentParser(prog=prog, description=about.splitlines()[0])
    parser.add_argument(
        "--layer", action="append", choices=list(layers), help="run this layer; may be repeated"
    )
    parser.add_argument(
        "--forests",
        type=int,
        default=6,
        help="random forests of the layers references, device (default 6)",
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line. Exits, naming the option that may be meant, for one that there is not."""
    options, unknown = parser.parse_known_args()
    if unknown:
        known = [f"--{name}" for name in vars(options)]
        close = get_close_matches(unknown[0].partition("=")[0], known, n=1)
        parser.error(f"no such option {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    if options.forests < 1:
        parser.error(f"--forests must be at least 1, got {options.forests}")
    return options


def runnable(options: argparse.Namespace, layers: Mapping[str, Layer]) -> list[str]:
    """The chosen layers that this machine can run; prints what the others miss."""
    names = options.layer or list(layers)
    absent = {name: missing for name in names if (missing := layers[name].needs())}
    for name, missing in absent.items():
        print(f"== {name}: not run, {missing}", flush=True)
    return [name for name in names if name not in absent]


def run_layers(names: Sequence[str], layers: Mapping[str, Layer], options: argparse.Namespace) -> list[str]:
    """One layer after the other; returns those that failed."""
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        ok = layers[name].run(options)
        print(f"== {name}: {'ok' if ok else 'FAILED'}, {time.perf_counter() - start:.0f} s", flush=True)
        if not ok:
            failed.append(name)
    return failed


def finish(options: argparse.Namespace, layers: Mapping[str, Layer], failed: Sequence[str]) -> None:
    """Exit with 1 if a layer failed, or could not run though it was asked for by name."""
    if failed:
        raise SystemExit(f"verify: {', '.join(failed)} failed")
    absent = [name for name in options.layer or () if layers[name].needs()]
    if absent:
        raise SystemExit(f"verify: {', '.join(absent)} cannot run here")


def missing_packages(*names: str) -> str:
    """What to say of the packages that are not installed; empty if all are."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"needs the package {' and '.join(absent)}" if absent else ""


def _references(options: argparse.Namespace) -> bool:
    from mosaic_kernels.proof import check_references  # torch: not for --help

    return check_references(options.forests)


def _device(options: argparse.Namespace) -> bool:
    from mosaic_kernels.proof import check_device  # torch: not for --help

    return check_device(options.forests)


def _no_device() -> str:
    import torch  # not for --help

    return missing_packages("triton") if torch.cuda.is_available() else "needs a CUDA device"


LAYERS = {"references": Layer(lambda: "", _references), "device": Layer(_no_device, _device)}

if __name__ == "__main__":
    main()
