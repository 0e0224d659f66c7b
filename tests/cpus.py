"""Runs a few tests as CPUs that this machine is not: `make test-cpus`, on x86-64, with qemu's user mode.

Products of integers, sums in another order, FP16 and the way from a graph to labels are what differs between CPUs.
`make test-aarch64` runs more, as one of them.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time

from arm64_root import QEMU, REPOSITORY, make_root, packages

TESTS = [
    "tests/graph/test_integers.py",
    "tests/graph/test_int8_graph.py::test_signal_to_noise_is_numpys",
    "tests/graph/test_graph.py::test_it_computes_the_reference[20]",
    "tests/graph/test_half.py::test_agreement_is_that_of_the_tiles_and_of_nothing_else[1-3]",
    "tests/engines/test_cpu_engine.py::test_an_engine_labels_as_its_graph",
    "tests/precision/test_build_precisions.py::test_the_engine_computes_what_the_twin_computes",
]
CPUS = {
    "x86_64": {
        "Haswell": "AVX2, no VNNI",
        "EPYC-Milan": "Zen 3: AVX2, no VNNI",
        "Icelake-Server": "AVX-512 with VNNI",
    },
    "aarch64": {"cortex-a57": "no dot product", "max": "dot product"},
}
LIMIT = 900
"""Seconds for one CPU."""


def main() -> int:
    missing = [f"qemu-{machine}" for machine in CPUS if not shutil.which(f"qemu-{machine}")]
    if missing or platform.machine() != "x86_64" or sys.platform != "linux":
        why = f"no {missing[0]} here (apt-get install qemu-user)" if missing else "this is no x86-64 Linux"
        print(f"OTHER CPUS NOT TESTED: {why}")
        return 0
    with tempfile.TemporaryDirectory() as graphs:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CDKD_EDGE_GRAPHS": graphs}
        started = time.monotonic()
        subprocess.run(
            [sys.executable, *_pytest("tests/graph/test_integers.py")],
            cwd=REPOSITORY,
            env=environment,
            check=True,
            timeout=LIMIT,
        )
        print(f"this CPU: passed in {time.monotonic() - started:.0f} s", flush=True)
        jobs = {name: (["qemu-x86_64", "-cpu", name, sys.executable], environment) for name in CPUS["x86_64"]}
        if not _has_vnni(*jobs["Icelake-Server"]):
            del jobs["Icelake-Server"]
            print("as Icelake-Server: not run, this qemu has no AVX-512")
        try:
            root = make_root(REPOSITORY / "out" / "aarch64")
        except (OSError, subprocess.SubprocessError) as error:
            print(f"as aarch64: not run, its Python could not be had: {error}")
        else:
            there = {**environment, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{packages(root)}"}
            prefix = [QEMU, "-L", str(root), "-cpu"]
            jobs |= {name: ([*prefix, name, str(root / "usr/bin/python3")], there) for name in CPUS["aarch64"]}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            passed = list(pool.map(_test, jobs, jobs.values()))
    failed = [name for name, good in zip(jobs, passed, strict=True) if not good]
    if failed:
        print(f"FAILED as {', '.join(failed)}")
    return bool(failed)


def _pytest(*tests: str) -> list[str]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not last_digits", *tests]  # which is of no CPU


def _test(name: str, job: tuple[list[str], dict[str, str]]) -> bool:
    """Run the tests as a CPU; whether they passed. Prints what they said."""
    started = time.monotonic()
    try:
        run = subprocess.run(
            [*job[0], *_pytest(*TESTS)], cwd=REPOSITORY, env=job[1], capture_output=True, text=True, timeout=LIMIT
        )
        passed, output = run.returncode == 0, run.stdout + run.stderr
    except subprocess.TimeoutExpired as error:
        passed, output = False, f"{(error.stdout or b'').decode()}\nnot done after {LIMIT} s"
    lines = [line for line in output.splitlines() if "TCG doesn't support" not in line]
    what = {**CPUS["x86_64"], **CPUS["aarch64"]}[name]
    heading = f"as {name} ({what}): {'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s"
    print("\n".join([heading, *(lines[-3:] if passed else lines[-200:])]), flush=True)
    return passed


def _has_vnni(command: list[str], environment: dict[str, str]) -> bool:
    """Whether qemu really gives a CPU with VNNI: without it, signed weights are not exact on x86-64."""
    probe = "from cdkd_edge.graph.cpu import signed_weights_are_exact as exact; raise SystemExit(not exact())"
    return subprocess.run([*command, "-c", probe], env=environment, capture_output=True, timeout=LIMIT).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
