"""Times denoising steps of published video models with random weights: `python -m benchmarks.video`.

Random weights attend nearly uniformly, so masks keep a given share of the keys of every row (top-k): the work of a mask
of that density is real, its quality is not looked at. Steps of each kind are timed; a video is their sum over 50 steps
with new masks every 15 (the paper's setting), mean queries make masks at every step. Text encoder and VAE are left out.

Each kind of attention runs in a process of its own, which compiles for every density. With `--layers N`, where time is
short, models of N and of 2 N layers are timed, and all layers are extrapolated; the row says so.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.video.worker import StepTimes, measure
from fgattn_jax.cli._generate_families import RANDOM_MODELS, random_config
from fgattn_jax.evaluation import tables

ROWS = Path("benchmarks/results/video.json")
STEPS, REFRESH_EVERY = 50, 15
ATTENTIONS = ("dense", "none", "cached", "mean-query")
Asked = Sequence[tuple[str, float]]
"""Attentions and the share of the keys that rows keep."""
Found = dict[tuple[str, float], tuple[StepTimes, tuple[int, ...]]]
_MARK = "video-row "


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 1 if a process failed."""
    args = _parser().parse_args(argv)
    if args.worker:
        asked = [(name, float(density)) for name, density in (each.split("=") for each in args.worker[1:])]
        _report(args.worker[0], asked, args)
        return 0
    if args.summary:
        print(summary(tables.read_rows(args.results or ROWS)))
        return 0
    start, failed = time.perf_counter(), []
    command = "python -m benchmarks.video " + " ".join(sys.argv[1:] if argv is None else argv)
    for shape in args.shapes:
        found: Found = {}
        source: dict[str, Any] = {}
        for asked in _processes(args.attention, args.density):
            if time.perf_counter() - start > args.budget_s:
                failed += [f"{shape} {name} {density:g}: no time left" for name, density in asked]
                continue
            result = _all_layers(args, shape, asked)
            if result is None:
                failed += [f"{shape} {name} {density:g}: its process failed" for name, density in asked]
                continue
            times, counts, source = result
            found |= {each: (one, counts) for each, one in zip(asked, times, strict=True)}
        rows = _rows(shape, found, source | {"command": command}, args)
        print(summary(rows), flush=True)
        if args.results:
            tables.write_rows(args.results, [*_others(args.results, rows), *rows])
    if not args.results:
        print(f"no rows were written; --results {ROWS} adds them there", file=sys.stderr)
    for line in failed:
        print(f"not measured: {line}", file=sys.stderr)
    return 1 if failed else 0


def _processes(names: Sequence[str], densities: Sequence[float]) -> list[list[tuple[str, float]]]:
    """What each process measures: "none" behind "dense", whose peak of memory is not its own; all densities of one."""
    plain = [(name, 1.0) for name in ("dense", "none") if name in names]
    masked = [[(name, density) for density in densities] for name in ("cached", "mean-query") if name in names]
    return [each for each in (plain, *masked) if each]


def _report(shape: str, asked: Sequence[tuple[str, float]], args: Any) -> None:
    """Measures in this process, and prints a line that the parent reads: it must not take the device itself."""
    times = measure(shape, asked, layers=args.layers, frames=args.frames, repeats=args.repeats, on_host=args.on_host)
    source = dict(tables.provenance(""))
    if args.commit:
        source["commit"] = args.commit
    print(_MARK + json.dumps({"times": [dataclasses.asdict(each) for each in times], "source": source}))


def video_seconds(name: str, seconds: dict[str, float]) -> float:
    """Seconds of all denoising steps of a video."""
    if name in ("dense", "none"):
        return STEPS * seconds["dense"]
    if name == "mean-query":
        return STEPS * seconds["refresh"]
    refreshes = -(-STEPS // REFRESH_EVERY)
    return refreshes * seconds["refresh"] + (STEPS - refreshes) * seconds["cached"]


def extrapolated(few: StepTimes, many: StepTimes, layers: int, all_layers: int) -> StepTimes:
    """Times and masks of all layers from models of `layers` and twice as many; the peak is that of the larger one."""
    seconds = {
        kind: few.seconds[kind] + (all_layers - layers) / layers * (many.seconds[kind] - few.seconds[kind])
        for kind in few.seconds
    }
    return dataclasses.replace(many, seconds=seconds, mask_bytes=few.mask_bytes * all_layers // layers)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table: seconds of a step that makes masks and of one that does not, then of a video."""
    header = ("model, frames", "attention", "density", "making masks, s", "step, s", "video, s", "speed",
              "attention speed", "attention share", "GiB", "of masks")  # fmt: skip
    lines = []
    for row in rows:
        step = row["dense_s"] if row["cached_s"] is None else row["cached_s"]
        memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        name = row["attention"] + (", masks on host" if row["masks_on_host"] else "")
        share = row["attention_share"] if row["attention"] == "dense" else None
        lines.append(
            (f"{row['model']}, {row['frames']}", name, row["density"], row["refresh_s"], step, row["video_s"],
             row["speed"], row["attention_speed"], share, memory, row["mask_bytes"] / 2**30)
        )  # fmt: skip
    return tables.format_text(header, lines)


def _all_layers(args: Any, shape: str, asked: Asked) -> tuple[list[StepTimes], tuple[int, ...], dict] | None:
    if args.layers is None:
        found = _in_process(args, shape, asked, None)
        return None if found is None else (found[0], (), found[1])
    counts = (args.layers, 2 * args.layers)
    few, many = (_in_process(args, shape, asked, count) for count in counts)
    if few is None or many is None:
        return None
    all_layers = random_config(RANDOM_MODELS[shape]).num_attentions
    times = [extrapolated(*pair, args.layers, all_layers) for pair in zip(few[0], many[0], strict=True)]
    return times, counts, many[1]


def _in_process(args: Any, shape: str, asked: Asked, layers: int | None) -> tuple[list[StepTimes], dict] | None:
    command = [sys.executable, "-m", "benchmarks.video", "--repeats", str(args.repeats)]
    command += ["--layers", str(layers)] if layers is not None else []
    command += ["--frames", str(args.frames)] if args.frames is not None else []
    command += ["--commit", args.commit] if args.commit else []
    command += ["--on-host"] if args.on_host else []
    command += ["--worker", shape, *(f"{name}={density}" for name, density in asked)]
    names = ", ".join(f"{name} {density:g}" for name, density in asked)
    print(f"{shape}: {names}{'' if layers is None else f', {layers} layers'} ...", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"  ended after {args.timeout_s} s", file=sys.stderr)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode != 0 or not lines:
        print("\n".join(done.stderr.splitlines()[-15:]), file=sys.stderr)
        return None
    said = json.loads(lines[-1].removeprefix(_MARK))
    times = [StepTimes(**each) for each in said["times"]]
    firsts = " and ".join(f"{each.first_step_s:.0f} s" for each in times)
    print(
        f"  {time.perf_counter() - start:.0f} s, of these {firsts} for first steps with their compilation", flush=True
    )
    return times, said["source"]


def _rows(shape: str, found: Found, source: dict[str, Any], args: Any) -> list[dict[str, Any]]:
    rows = []
    dense = found.get(("dense", 1.0))
    none = found.get(("none", 1.0))
    for (name, density), (times, counts) in found.items():
        video = video_seconds(name, times.seconds)
        dense_video = None if dense is None else video_seconds("dense", dense[0].seconds)
        bare = None if none is None else video_seconds("none", none[0].seconds)
        attention_speed = None
        if dense_video is not None and bare is not None and name in ("cached", "mean-query"):
            steady = STEPS * times.seconds["cached" if name == "cached" else "refresh"]
            attention_speed = (dense_video - bare) / (steady - bare)
        rows.append(
            {
                "model": shape,
                "frames": args.frames or RANDOM_MODELS[shape].frames,
                "attention": name,
                "asked_density": density,
                "density": times.density,
                "dense_s": times.seconds.get("dense"),
                "refresh_s": times.seconds.get("refresh"),
                "cached_s": times.seconds.get("cached"),
                "video_s": video,
                "speed": None if dense_video is None else dense_video / video,
                "attention_speed": attention_speed,
                "attention_share": None if dense_video is None or bare is None else 1 - bare / dense_video,
                "peak_bytes": times.peak_bytes,
                "mask_bytes": times.mask_bytes,
                "masks_on_host": args.on_host,
                "layers": list(counts) or None,
                "weights": "random",
                **source,
            }
        )
    return rows


def _others(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the file that are not measured anew."""
    names = ("model", "frames", "attention", "asked_density", "masks_on_host", "device")
    new = {tuple(row[name] for name in names) for row in rows}
    return [row for row in tables.read_rows(path) if tuple(row.get(name) for name in names) not in new]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.video", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(RANDOM_MODELS), default=["wan-1.3b-480p"], metavar="NAME",
                        help=f"models: {', '.join(RANDOM_MODELS)} (default: wan-1.3b-480p)")  # fmt: skip
    parser.add_argument("--density", nargs="+", type=float, default=[0.35], metavar="D",
                        help="shares of the keys that rows keep (default: 0.35)")  # fmt: skip
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS, metavar="NAME",
                        help=f"of {', '.join(ATTENTIONS)}; speeds need dense and none (default: all)")  # fmt: skip
    parser.add_argument("--frames", type=int, metavar="N", help="of the clip (default: as published for the model)")
    parser.add_argument("--layers", type=int, metavar="N", help="time N and 2 N layers, extrapolate to all")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="timed steps of each kind (default: 2)")
    parser.add_argument("--on-host", action="store_true", help="keep masks in host memory")
    parser.add_argument("--budget-s", type=float, default=1e9, metavar="S", help="start nothing after so many seconds")
    parser.add_argument("--timeout-s", type=float, default=600, metavar="S", help="per process (default: 600)")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help=f"write rows there, such as {ROWS} (default: nowhere)"
    )
    parser.add_argument("--summary", action="store_true", help=f"print the table of --results ({ROWS}), and stop")
    parser.add_argument("--commit", metavar="ID", help="of the sources; asked of git by default")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
