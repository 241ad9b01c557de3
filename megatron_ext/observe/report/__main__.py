"""python -m megatron_ext.observe.report RUN [--compare RUN2] [--out FILE]"""

from __future__ import annotations

from pathlib import Path

from megatron_ext.command import CommandLine
from megatron_ext.errors import DiskError, exit_on_fatal
from megatron_ext.observe.report.compose import compose
from megatron_ext.observe.report.gather import gather


def write(text: str, path: Path) -> None:
    """Write the page. Raises DiskError (74)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(
            f"the page cannot be written: {error.strerror}",
            do="name a file that you may write with --out",
            path=path,
        ) from None


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = CommandLine(
        "python -m megatron_ext.observe.report",
        "One HTML page of a run: curves, experts, time, memory, flags, events.",
    )
    parser.add_argument("run", type=Path, help="the run directory, such as runs/quickstart")
    parser.add_argument("--compare", type=Path, help="another run, shown beside it")
    parser.add_argument("--out", type=Path, help="the page; default: RUN/report.html")
    with exit_on_fatal():
        args = parser.parse_args(argv)
        runs = [gather(run) for run in (args.run, args.compare) if run is not None]
        out = args.out or args.run / "report.html"
        text = compose(runs)
        write(text, out)
        print(f"{out}  {len(text.encode()) / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
