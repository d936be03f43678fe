"""`spectral-router`: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .comparison import Comparison, compare_checkpoints, drift
from .inspection import CheckpointReport, inspect_checkpoint
from .table import console, show_comparison, show_data, show_inspection, show_over_time
from .writing import as_json, check_target, write_whole

Progress = Callable[[str], Callable[[int, int], None]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 2 after one sentence on what was wrong, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"spectral-router: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spectral-router: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # into `head`
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-router", description="How the routers of a mixture-of-experts checkpoint are, from its file alone."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    path = "a folder, a file (safetensors, torch.save, GGUF), or the name of a model in the local cache of the hub"
    inspect = commands.add_parser("inspect", help="the numbers of each gate, and a verdict; of several checkpoints, over time")
    inspect.add_argument("paths", nargs="+", metavar="PATH", help=path)
    inspect.add_argument(
        "--data",
        metavar="FILE",
        help="load the whole model (transformers) and run this: a text, or tensors such as input_ids in a .pt or .safetensors",
    )
    compare = commands.add_parser("compare", help="how far each router is from the same router of another checkpoint")
    compare.add_argument("paths", nargs=2, metavar=("BEFORE", "AFTER"), help=path)
    for command in (inspect, compare):
        command.add_argument("--json", metavar="FILE", help="all numbers as JSON; - for the terminal, in place of the table")
        command.add_argument("--html", metavar="FILE", help="one page with pictures, which needs no network")
        command.add_argument("--svg", metavar="FILE", help="its charts alone, as one picture")
    return parser


def _run(options: argparse.Namespace) -> None:
    targets = {
        name: check_target(path) for name in ("json", "html", "svg") if (path := getattr(options, name)) not in (None, "-")
    }
    data: dict[str, Any] | None = None
    quiet = options.json == "-"
    out = None if quiet else console()
    with _progress(quiet) as progress:
        if options.command == "compare":
            before, after = options.paths
            comparison = compare_checkpoints(before, after, progress=progress("gates"))
            reports, drifts = [comparison.before, comparison.after], [comparison]
            content = comparison.to_dict()
        else:
            reports = [inspect_checkpoint(path, progress=progress(path)) for path in options.paths]
            drifts = [drift(reports[0], report) for report in reports] if len(reports) > 1 else []
            content = _inspected(reports, drifts)
            if options.data is not None:
                from .with_data import examine_checkpoint

                data = content["data"] = examine_checkpoint(options.paths[-1], options.data)
    if "html" in targets:
        from .page import page

        write_whole(targets["html"], page(reports, drifts, over_time=options.command == "inspect", data=data))
    if "svg" in targets:
        from .sheet import sheet

        write_whole(targets["svg"], sheet(reports, drifts, over_time=options.command == "inspect"))
    if "json" in targets:
        write_whole(targets["json"], as_json(content))
    if quiet:
        print(as_json(content), end="")
    elif options.command == "compare":
        show_comparison(out, drifts[0])
    elif drifts:
        show_over_time(out, reports, drifts)
    else:
        show_inspection(out, reports[0])
    if data and not quiet:
        show_data(out, data)
    for target in targets.values():
        print(f"wrote {target}", file=sys.stderr)


def _inspected(reports: list[CheckpointReport], drifts: list[Comparison]) -> dict[str, Any]:
    if not drifts:
        return reports[0].to_dict()
    return {"checkpoints": [report.to_dict() for report in reports], "drift": [one.to_dict() for one in drifts]}


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on stderr while it lasts, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _name: lambda _done, _all: None
        return
    from rich.progress import Progress as Bars

    with Bars(console=console(stderr=True), transient=True) as bars:

        def start(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name[-40:], total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield start
