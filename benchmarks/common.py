"""What the benchmarks share: sides that take turns, a row per claim, the machine and the versions, one JSON line. No measuring of its own."""
import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")          # read when jax first meets a GPU, which it shares with torch here
RESULTS = pathlib.Path(__file__).parent / "results"


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds, help=f"timed turns per side; the figure is their median ({rounds})")
    found.add_argument("--smoke", action="store_true", help="a tiny size that only shows that the benchmark runs; its figures mean nothing and are not kept")
    found.add_argument("--save", action="store_true", help="keep the line in benchmarks/results/, where the README's table comes from")
    return found


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def turns(sides: dict[str, Callable[[], Any]], rounds: int, warm: int = 2) -> tuple[dict[str, float], dict[str, Any]]:
    """Every side is run `warm` times, then they alternate. -> (median seconds, last answer) by side."""
    answers: dict[str, Any] = {}
    for run in sides.values():
        for _ in range(warm):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            answers[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}, answers


def row(what: str, unit: str, sides: dict[str, float], more_is_better: bool) -> dict[str, Any]:
    """One claim. Sides whose names begin with "llmjax" are ours; the ratio is how many times better our best is than the others' best."""
    best = max if more_is_better else min
    ours = best(v for name, v in sides.items() if name.startswith("llmjax"))
    theirs = best(v for name, v in sides.items() if not name.startswith("llmjax"))
    return {"what": what, "unit": unit, "more_is_better": more_is_better, "sides": {k: float(f"{v:.4g}") for k, v in sides.items()},
            "ratio": round(ours / theirs if more_is_better else theirs / ours, 2)}


def compile_cases(name: str, description: str, cases: dict[str, Any], measure: Callable[[str], dict], table: Callable[[list[dict]], str]) -> None:
    """The command of a benchmark that compiles for TPUs: the cases that are named, or all; prints one JSON line and a table, keeps each case by its name where asked to."""
    arguments = parser(description, 1)
    arguments.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(cases)} (all)")
    args = arguments.parse_args()
    unknown = [case for case in args.cases if case not in cases]
    if unknown:
        sys.exit(f"{name}: there is no case {unknown[0]!r}; known: {', '.join(cases)}")
    rows = []
    for case in args.cases or cases:
        rows.append(measure(case))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    found = {"benchmark": name, "cases": rows, "hardware": hardware(), "versions": {p: version(p) for p in ("llmjax", "jax", "libtpu")}}
    print(json.dumps(found))
    print(table(rows), file=sys.stderr)
    if args.save:
        file = RESULTS / f"{name}.json"
        kept = {row["case"]: row for row in json.loads(file.read_text())["cases"]} if file.exists() else {}
        kept |= {row["case"]: row for row in rows}
        file.write_text(json.dumps({**found, "cases": [kept[case] for case in cases if case in kept]}, indent=1) + "\n")


def hardware(device: str | None = None) -> dict[str, Any]:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return {**({"device": device} if device else {}), "cpu": names[0] if names else platform.processor() or platform.machine(), "cores": cores()}


def emit(name: str, args: argparse.Namespace, rows: list[dict], packages: tuple[str, ...], device: str | None = None, **more: Any) -> None:
    """Prints the line; keeps it where asked to."""
    found = {"benchmark": name, "rows": rows, **more, "rounds": args.rounds, "hardware": hardware(device),
             "versions": {"python": platform.python_version(), **{p: version(p) for p in ("llmjax", *packages)}}}
    if args.smoke:
        found["smoke"] = True
    print(json.dumps(found, ensure_ascii=False))
    if args.save and not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{name}{'_gpu' if device else ''}.json"
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
