"""Prove the kernels, layer by layer: `python -m tools.verify_kernels [--layer NAME]...`.

    references   every PyTorch backend against the fp64 oracle, on random forests
    interpreter  the Triton kernels' tests under Triton's interpreter: fp32 and fp16
    ttsem        the same tests on the compiled kernels, executed on the CPU: also bf16, bounds, races
    compile      every tile of every kernel to machine code: no spills, shared memory, tensor cores
    work         the kernels' multiply-adds and bytes, counted, against the ideal
    device       the kernels on a CUDA device: against the oracle, the same tests, the benchmark's cases

Without --layer: all that this machine can run, compiling beside the tests where there are two CPUs. The
layers references and device begin with what users run, `python -m mosaic_kernels.verify`. Exits with 1 if a
layer fails.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mosaic_kernels import verify
from mosaic_kernels.verify import Layer, missing_packages

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernels" / "triton"


def main() -> None:
    """Run the chosen layers and say how each ended."""
    parser = verify.argument_parser("python -m tools.verify_kernels", __doc__, LAYERS)
    parser.add_argument("--arch", help="only this architecture in the layer compile, for example sm_90")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this, for example D128")
    parser.add_argument("--table", type=Path, help="write what was compiled into this table too")
    parser.add_argument(
        "--groups", action="store_true", help="compile attention's loops for every number of heads a group"
    )
    options = verify.parse(parser)
    if options.arch is not None and importlib.util.find_spec("triton") is not None:
        _check_arch(options.arch)
    names = verify.runnable(options, LAYERS)
    beside = not options.layer and (os.cpu_count() or 1) > 1 and "compile" in names
    failed = _run_beside(names, options) if beside else verify.run_layers(names, LAYERS, options)
    verify.finish(options, LAYERS, failed)


def _run_beside(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The layer compile in a process of its own, beside the others; its output follows theirs.

    The tests keep one CPU busy, the compiler two if it can. The layer device comes last, alone: timings.
    """
    command = [sys.executable, "-m", "tools.verify_kernels", "--layer", "compile"]
    for name in ("arch", "kernel", "table"):
        value = getattr(options, name)
        command += [f"--{name}", str(value)] if value else []
    command += ["--groups"] if options.groups else []
    print("== compile: started, its output follows", flush=True)
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiling = thread.submit(
            subprocess.run, command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        failed = verify.run_layers([x for x in names if x not in ("compile", "device")], LAYERS, options)
        done = compiling.result()
    print(done.stdout, end="", flush=True)
    failed += ["compile"] if done.returncode else []
    return failed + verify.run_layers([x for x in names if x == "device"], LAYERS, options)


def _environment() -> dict[str, str]:
    """Ours, without what says how Triton kernels are executed."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MOSAIC_EMULATED")}


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
        done = subprocess.run(command, cwd=ROOT, env={**_environment(), **environment}, check=False)
        return done.returncode == 0

    return run


def _check_arch(arch: str) -> None:
    from tools.verify_kernels.cases import ARCHITECTURES

    if arch not in ARCHITECTURES:
        raise SystemExit(f"--arch {arch} is unknown; there are {', '.join(ARCHITECTURES)}")


def _compile(options: argparse.Namespace) -> bool:
    from tools.verify_kernels.compile import print_compiled

    return print_compiled(options.arch, options.table, options.kernel, groups=options.groups)


def _device(options: argparse.Namespace) -> bool:
    # Nothing is timed before it has proved right in this run.
    return verify.LAYERS["device"].run(options) and _tests({})(options) and _timings()


def _timings() -> bool:
    """The benchmark's cases of the ops, beside other implementations; each is checked once more before."""
    command = [sys.executable, "bench/run.py", "attention", "logprob", "preference", "--device", "cuda"]
    return subprocess.run(command, cwd=ROOT, env=_environment(), check=False).returncode == 0


def _needs(*names: str) -> Callable[[], str]:
    return lambda: missing_packages(*names)


LAYERS = {
    "references": verify.LAYERS["references"],
    "interpreter": Layer(_needs("pytest", "hypothesis", "triton"), _tests({"TRITON_INTERPRET": "1"})),
    "ttsem": Layer(
        _needs("pytest", "hypothesis", "triton", "ttsem"),
        _tests({"MOSAIC_EMULATED": "1"}, module="ttsem.sanitize pytest"),
    ),
    "compile": Layer(_needs("triton"), _compile),
    "work": Layer(
        _needs("pytest", "hypothesis", "triton"), _tests({"TRITON_INTERPRET": "1"}, only_work=True)
    ),
    "device": Layer(
        lambda: verify.LAYERS["device"].needs() or missing_packages("pytest", "hypothesis"), _device
    ),
}

if __name__ == "__main__":
    main()
