"""What the reports of all benchmarks share: where and how it was measured, options, files and tables."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Deadline",
    "UsageError",
    "add_compile_options",
    "add_options",
    "command",
    "finish",
    "measured_on",
    "positive",
    "provenance",
    "rendered",
    "save_figure",
    "seconds_to_compile",
    "survives",
    "table",
    "write",
]

#: options that do not say what was measured
_LEFT_OUT = ("--json", "--markdown", "--plot", "--commit")


class UsageError(Exception):
    """The options can't be followed here; the message says why, and what can be done."""


def provenance(packages: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """Date, Python, the versions of what is installed, and the commit (told, or else asked of git)."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
        "commit": commit or _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            clean = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, check=False)
            return found.stdout.strip() + ("" if clean.returncode == 0 else " with uncommitted changes")
    return "unknown"


def measured_on(about: dict[str, Any]) -> str:
    """The sentence of a GPU report that says where it was measured, without its full stop."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['date']}, {about['device']}, CUDA {about['cuda']}, Python {about['python']}, {versions}; commit "
        f"{about['commit']}"
    )


def positive(text: str) -> int:
    """An option's integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a report: how long it may take, where it is written and what it is rendered from."""
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no row later than this after the start")
    parser.add_argument("--commit", help="what the report says it measured, where git cannot say")
    parser.add_argument("--json", type=Path, help="write the report here, after every row")
    parser.add_argument("--markdown", type=Path, help="write the tables here, after every row")
    parser.add_argument("--plot", type=Path, help="draw a figure here at the end (GPU reports; needs matplotlib)")
    parser.add_argument("--from-json", type=Path, help="render an earlier report instead of measuring")


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that can compile in processes side by side before it measures."""
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead; 0 compiles when met")
    parser.add_argument("--compile-only", action="store_true", help="fill the caches on disk, measure nothing")


def seconds_to_compile(arguments: argparse.Namespace) -> float:
    """What compiling ahead may take of ``--seconds``: half, or all where nothing is measured."""
    return float(arguments.seconds if arguments.compile_only else arguments.seconds / 2)


class Deadline:
    """The end of ``--seconds``, counted from when this was made."""

    def __init__(self, seconds: float) -> None:
        self._stop, self.reason = time.monotonic() + seconds, f"not reached in {seconds:g} s"

    @property
    def passed(self) -> bool:
        """Whether no row may begin any more; ``reason`` is what it says instead of a time."""
        return time.monotonic() > self._stop


def command(subject: str, arguments: Sequence[str]) -> str:
    """Return the command that a report names: without where it was written and which commit it was told."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not skip and name not in _LEFT_OUT:
            kept.append(argument)
        skip = not skip and argument in _LEFT_OUT
    return shlex.join(["python", "-m", "benchmarks", subject, *kept])


def write(arguments: argparse.Namespace, report: dict[str, Any], markdown: Callable[[dict[str, Any]], str]) -> None:
    """Write the files that were asked for, but for the figure."""
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(report))


def finish(
    arguments: argparse.Namespace,
    report: dict[str, Any],
    markdown: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None] | None,
) -> None:
    """Write every file that was asked for, and print the page."""
    write(arguments, report, markdown)
    print(markdown(report))
    if arguments.plot is not None and plot is not None:
        plot(report, arguments.plot)


def rendered(
    arguments: argparse.Namespace,
    markdown: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None] | None,
) -> bool:
    """Render the earlier report that ``--from-json`` names; False if it names none."""
    if arguments.from_json is None:
        return False
    try:
        report = json.loads(arguments.from_json.read_text())
        markdown(report)
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{arguments.from_json} holds no report of this benchmark on this kind of device "
            f"({type(error).__name__}: {error}); give a file that its --json has written"
        ) from error
    finish(arguments, report, markdown, plot)
    return True


@contextlib.contextmanager
def survives(row: dict[str, Any]) -> Iterator[None]:
    """Turn an implementation's failure into its row, so that the run goes on."""
    try:
        yield
    except Exception as error:
        row["skipped"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure so that the same numbers give the same file, and close it."""
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "birkhoff"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
