"""Check every op on this machine, layer by layer: `python -m mosaic_kernels.verify [--layer NAME]...`.

    references   every PyTorch backend against the fp64 oracle, on random forests
    interpreter  the Triton kernels' tests under Triton's interpreter: fp32 and fp16
    ttsem        the same tests on the compiled kernels, executed on the CPU: also bf16, bounds, races
    compile      every tile of every kernel to machine code: no spills, shared memory, tensor cores
    work         the kernels' multiply-adds and bytes, counted, against the ideal
    device       the same tests on a CUDA device, and the benchmark's cases of the ops

Without --layer: all that this machine can run, compiling beside the tests where there are two CPUs. The tests
are in the repository, so the layers that run them need a checkout. Exits with 1 if a layer fails.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests" / "kernels" / "triton"

_OPTIONS = ("--layer", "--forests", "--arch", "--table")


@dataclass(frozen=True)
class Layer:
    """One way to check the kernels."""

    needs: Callable[[], str]  # what is missing to run it here, empty if nothing
    run: Callable[[argparse.Namespace], bool]  # prints what it finds; whether all is well


def main() -> None:
    """Run the chosen layers and say how each ended."""
    parser = argparse.ArgumentParser(
        prog="python -m mosaic_kernels.verify", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--layer", action="append", choices=list(LAYERS), help="run this layer; may be repeated"
    )
    parser.add_argument(
        "--forests", type=int, default=6, help="random forests for the layer references (default 6)"
    )
    parser.add_argument("--arch", help="only this architecture in the layer compile, for example sm_90")
    parser.add_argument("--table", type=Path, help="write the layer compile's table to this file too")
    options, unknown = parser.parse_known_args()
    if unknown:
        close = get_close_matches(unknown[0].partition("=")[0], _OPTIONS, n=1)
        parser.error(f"no such option {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    if options.forests < 1:
        parser.error(f"--forests must be at least 1, got {options.forests}")
    names = options.layer or list(LAYERS)
    if options.arch is not None and importlib.util.find_spec("triton") is not None:
        _check_arch(options.arch)
    absent = {name: missing for name in names if (missing := LAYERS[name].needs())}
    for name, missing in absent.items():
        print(f"== {name}: not run, {missing}", flush=True)
    present = [name for name in names if name not in absent]
    beside = not options.layer and (os.cpu_count() or 1) > 1 and "compile" in present
    failed = _run_beside(present, options) if beside else _run(present, options)
    if failed:
        raise SystemExit(f"verify: {', '.join(failed)} failed")
    if options.layer and absent:  # only what was asked for by name is missed
        raise SystemExit(f"verify: {', '.join(absent)} cannot run here")


def _run(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """One layer after the other, here; those that failed."""
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        ok = LAYERS[name].run(options)
        print(f"== {name}: {'ok' if ok else 'FAILED'}, {time.perf_counter() - start:.0f} s", flush=True)
        if not ok:
            failed.append(name)
    return failed


def _run_beside(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The layer compile in a process of its own, beside the others; its output follows theirs.

    The tests keep one CPU busy, the compiler two if it can. The layer device comes last, alone: timings.
    """
    command = [sys.executable, "-m", "mosaic_kernels.verify", "--layer", "compile"]
    for name in ("arch", "table"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    print("== compile: started, its output follows", flush=True)
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiling = thread.submit(
            subprocess.run, command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        failed = _run([name for name in names if name not in ("compile", "device")], options)
        done = compiling.result()
    print(done.stdout, end="", flush=True)
    failed += ["compile"] if done.returncode else []
    return failed + _run([name for name in names if name == "device"], options)


def _environment() -> dict[str, str]:
    """Ours, without what says how Triton kernels are executed."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MOSAIC_EMULATED")}


def _references(options: argparse.Namespace) -> bool:
    from mosaic_kernels.proof.references import check_references  # torch: not for --help

    return check_references(options.forests)


def _tests(
    environment: dict[str, str], *, module: str = "pytest", only_work: bool = False
) -> Callable[[argparse.Namespace], bool]:
    """The kernels' tests in a process of their own, in which Triton is imported with this environment."""

    def run(options: argparse.Namespace) -> bool:
        command = [sys.executable, "-m", *module.split()]
        if only_work:
            command += ["-s", *map(str, sorted(TESTS.glob("test_work*.py")))]
        else:
            command += [str(TESTS), "--ignore-glob=*test_work*"]
        done = subprocess.run(
            command, cwd=TESTS.parents[2], env={**_environment(), **environment}, check=False
        )
        return done.returncode == 0

    return run


def _check_arch(arch: str) -> None:
    from mosaic_kernels.dispatch import ARCHITECTURES

    if arch not in ARCHITECTURES:
        raise SystemExit(f"--arch {arch} is unknown; there are {', '.join(ARCHITECTURES)}")


def _compile(options: argparse.Namespace) -> bool:
    from mosaic_kernels.proof.table import print_compiled

    return print_compiled(options.arch, options.table)


def _device(options: argparse.Namespace) -> bool:
    # Nothing is timed before it has proved right in this run.
    return _tests({})(options) and _timings()


def _timings() -> bool:
    """The benchmark's cases of the ops, beside other implementations; each is checked once more before."""
    bench = TESTS.parents[2] / "bench" / "run.py"
    command = [sys.executable, str(bench), "attention", "logprob", "preference", "--device", "cuda"]
    return subprocess.run(command, env=_environment(), check=False).returncode == 0


def _package(*names: str) -> Callable[[], str]:
    def missing() -> str:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        if absent:
            return f"needs the package {' and '.join(absent)}"
        return ""

    return missing


def _checkout(*names: str) -> Callable[[], str]:
    def missing() -> str:
        if not TESTS.is_dir():
            return "needs a checkout of the repository: the tests are not installed"
        return _package("pytest", "hypothesis", *names)()

    return missing


def _cuda() -> str:
    import torch  # not for --help

    return _checkout("triton")() if torch.cuda.is_available() else "needs a CUDA device"


LAYERS = {
    "references": Layer(lambda: "", _references),
    "interpreter": Layer(_checkout("triton"), _tests({"TRITON_INTERPRET": "1"})),
    "ttsem": Layer(
        _checkout("triton", "ttsem"), _tests({"MOSAIC_EMULATED": "1"}, module="ttsem.sanitize pytest")
    ),
    "compile": Layer(_package("triton"), _compile),
    "work": Layer(_checkout("triton"), _tests({"TRITON_INTERPRET": "1"}, only_work=True)),
    "device": Layer(_cuda, _device),
}

if __name__ == "__main__":
    main()
