"""What both commands share on a terminal: exit codes, errors as sentences, tables, the progress bar, options."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

import typer
from rich.console import Console
from rich.segment import Segment
from rich.text import Text
from typer import Argument, Context, Option

from photon_data.errors import Refused, UsageError, is_out_of_memory

# Exit codes.
OK = 0  # everything that was requested is there
PARTIAL = 1  # some inputs were refused or failed (verify: problems were found); the rest is there
MISUSE = 2  # the command cannot be followed; nothing was written
STOPPED = 3  # the run could not go on (no space, no workers); what is done is kept
INTERRUPTED = 130  # Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP; what is done is kept

# What `pip install photon-ct` leaves out -> the extra that has it.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "accelerate", "safetensors", "tokenizers", "matplotlib"), "train"),
    **dict.fromkeys(("sacrebleu", "rouge_score", "nltk"), "eval"),
    "peft": "lora",
    **dict.fromkeys(("fastapi", "uvicorn", "multipart", "python_multipart", "prometheus_client", "starlette"), "serve"),
}

LINE_S = 10  # without a terminal, a progress line is printed at most this often
WIDTH = None if sys.stdout.isatty() else 160  # a log file has room for a table


# What a terminal obeys (it may rename windows, clear screens) or shows in another order; not tabs and line ends.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return a text of a file, a model or a library with its control characters written as JSON has them."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _SafeConsole(Console):
    """A console for texts from anywhere: only rich itself sends control characters.

    It falls silent when its reader is gone: `| head` neither ends the work nor changes the exit code.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def render_str(self, text: str, **options: Any) -> Text:
        """Return rich's text of a plain one: before it is measured and wrapped."""
        return super().render_str(plain(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Yield the pieces of anything printed: here pass texts that rich made by itself, as of a progress bar."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(plain(piece.text), piece.style)


class _PlainRecord(logging.LogRecord):
    """A line of a log, of ours or of a library."""

    def getMessage(self) -> str:
        return plain(super().getMessage())


# No markup: file names hold brackets.
console = _SafeConsole(highlight=False, markup=False, width=WIDTH)
errors = _SafeConsole(stderr=True, highlight=False, markup=False)


def fail(message: str, code: int = MISUSE) -> NoReturn:
    """Print a message on stderr and end the command with an exit code."""
    errors.print(message, style="red", soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Turn whatever ends a command early into a sentence and an exit code.

    SIGTERM, SIGUSR1 (by which SLURM warns a job of its end) and SIGHUP (a terminal that is closed) end a command as
    Ctrl-C does; under nohup, SIGHUP stays ignored.

    Python drops an exception that is raised while it destroys an object. An interrupt that is lost so comes again, as
    an alarm.
    """
    from photon_data.files import NO_SPACE

    def unraisable(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            previous_hook(lost)

    def hang_up(sign: int, frame: Any) -> NoReturn:
        for one in (console, errors):
            if one.is_terminal:
                one.on_broken_pipe()  # a terminal that is gone takes no more text
        raise KeyboardInterrupt

    # Dask leaves a time-out behind when it closes; asyncio reports it
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    ending = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    previous = {sign: signal.signal(sign, signal.default_int_handler) for sign in ending}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    previous_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except (UsageError, Refused) as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        if (name := str(error.name).partition(".")[0]) not in EXTRAS:
            raise
        extra = EXTRAS[name]
        fail(f"expected the extra `{extra}`, found that {name} is not installed; pip install 'photon-ct[{extra}]'")
    except KeyboardInterrupt:
        fail("Interrupted. What is done is kept; the same command goes on from here.", INTERRUPTED)
    except (MemoryError, RuntimeError, SystemError) as error:
        if not is_out_of_memory(error):
            raise
        fail("Stopped: memory did not suffice. What is done is kept; free some, or ask for less at a time.", STOPPED)
    except OSError as error:
        if error.errno in NO_SPACE:
            fail(f"Stopped: {error.strerror}. What is done is kept.", STOPPED)
        fail(f"Stopped: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), STOPPED)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for sign, handler in previous.items():
            signal.signal(sign, handler)
        sys.unraisablehook = previous_hook


def run_app(app: typer.Typer) -> None:
    """Run a command line. What the terminal's encoding lacks in file names and answers is printed as escapes.

    So are control characters, whoever prints: the console, logs, warnings, and a traceback that should not be.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.setLogRecordFactory(_PlainRecord)
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *parts, **more: plain(format_warning(*parts, **more))
    sys.excepthook = lambda *error: sys.stderr.write(plain("".join(traceback.format_exception(*error))))
    app()


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of any length, which the terminal wraps."""
    for line in lines:
        console.print(line, soft_wrap=True)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None) -> None:
    """Print a table whose first `texts` columns are text (None: all of them), the others numbers."""
    from rich.table import Table

    table = Table(title=title, show_header=any(headings))
    for number, name in enumerate(headings):
        is_text = texts is None or number < texts
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


class ProgressBar:
    """A context manager: a live bar on a terminal, elsewhere a plain line now and then."""

    def __init__(self, description: str, total: int | None = None) -> None:
        from rich import progress as rich

        named, detail = (
            rich.TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[detail]}")
        )
        columns = (named, rich.BarColumn(), rich.MofNCompleteColumn(), detail)
        times = (rich.TimeElapsedColumn(), "left", rich.TimeRemainingColumn())
        self._progress = rich.Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(description, total=total, detail="")
        self.start_s = self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, **changes: Any) -> None:
        """Change what the bar shows: description, total, completed, advance, detail."""
        self._progress.update(self._task, **changes)

    def count(self, done: int, total: int) -> None:
        """Show that so many of all are done."""
        self.update(completed=done, total=total)
        self.line(f"{done:,} of {total:,}")

    def line(self, text: str) -> None:
        """Print a line where there is no terminal, unless another one was printed in the last LINE_S seconds."""
        if not console.is_terminal and time.monotonic() - self._last_line_s > LINE_S:
            self._last_line_s = time.monotonic()
            console.print(text)


# Options that several commands have, and the text of options -> values.

# photon-data prepare and inspect
SourceAndOut = Annotated[
    list[str] | None,
    Argument(
        metavar="[SOURCE] [OUT]",
        help="Folder of scans, or one scan; then a folder to write to. Each may be a URL (s3://...). "
        "With --manifest: [OUT] alone.",
    ),
]
Manifest = Annotated[Path | None, Option(help="A data_manifest.yaml that declares data sets, instead of SOURCE.")]
Only = Annotated[list[str], Option("--only", help="This data set of the manifest only. Repeatable.")]
RecipeName = Annotated[str, Option("--recipe", help="How raw scans are prepared: chest_ct, abdomen_ct or wide_ct.")]
Settings = Annotated[list[str], Option("--set", help="Change the recipe: spacing_mm=2,1,1 (z, y, x). Repeatable.")]
Modality = Annotated[str | None, Option(help="ct refuses intensities that are no HU; other does not look.")]
Nan = Annotated[str | None, Option(help="refuse scans with NaN or infinite voxels, or fill those voxels.")]
HuSource = Annotated[str, Option(help="header, stored (no scaling) or a table: volume, slope, intercept.")]
Accept = Annotated[
    list[str], Option("--accept", help="Code of a refusal to take back: non-finite, affine-conflict=sform. Repeatable.")
]
Repair = Annotated[
    list[str], Option(help="slices[=N]: DICOM of uneven distances, with up to N (3) missing slices in a row.")
]
Overrides = Annotated[Path | None, Option(help="A table about single scans: volume, affine, slope, crop, skip, ...")]
Columns = Annotated[list[str], Option(help="Column names of your tables: volume=VolumeName,question=Question.")]
IdFrom = Annotated[
    str, Option(help="Ids from path, name, hash (of the path) or key (a secret); auto: key for DICOM, else path.")
]
IdPrefix = Annotated[str, Option(help="What the ids of this source begin with: siteB_.")]
Include = Annotated[
    list[str], Option("--include", help="Glob of paths below SOURCE: only these are looked at. Repeatable.")
]
Exclude = Annotated[
    list[str], Option("--exclude", help="Glob of paths below SOURCE: labelsTr, '*_seg.nii.gz', 'old/*'. Repeatable.")
]
FollowLinks = Annotated[bool, Option("--follow-links/--no-follow-links", help="Read what symbolic links lead to.")]
Limit = Annotated[int | None, Option(min=1, help="Only the first N scans.")]
WorkerCount = Annotated[int | None, Option(min=1, help="Local workers; from cores and memory if not given.")]
Scheduler = Annotated[str | None, Option(help="Address or scheduler file of a Dask cluster to use.")]
Timeout = Annotated[float, Option(min=1, help="Seconds after which a file has failed.")]
Memory = Annotated[float | None, Option(min=0, help="GB of address space per worker, 0 for no limit.")]
MaxVoxels = Annotated[int, Option(min=1, help="Refuse scans of more voxels than this.")]

# photon predict and eval; photon-data show has the first three
SeriesName = Annotated[
    str | None,
    Option("--series", help="Of a folder with several scans: one by its name, number from 1, or UID."),
]
Window = Annotated[str, Option(help="Of pictures: full, lung, mediastinum, soft, bone, or low,high in HU.")]
At = Annotated[str | None, Option(help="World point x,y,z in LPS mm; else the most salient kept token, or the centre.")]
Choices = Annotated[bool, Option(help="Score the choices of rows that have some, instead of generating.")]
MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer, in tokens.")]
QuestionsPerBatch = Annotated[int, Option(min=1, help="Questions on one volume answered together.")]
Batch = Annotated[
    str, Option("--batch", "--questions-per-batch", help="Questions answered together: a number, or auto (by memory).")
]
Adapter = Annotated[str | None, Option(help="A checkpoint of a LoRA run; --model is what it was trained on.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")]
Compile = Annotated[bool, Option("--compile", help="Have torch compile decoding; it does not pay on a CPU.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")]
SchedulerName = Annotated[str | None, Option(help="its, none, random, fastv, ... (docs/model.md); else the model's.")]
KeepRatio = Annotated[float | None, Option(help="Share of tokens kept, for all but its, none, nucleus.")]
Bootstrap = Annotated[int, Option(min=0, help="Resamplings of the patients.")]
BootstrapSeed = Annotated[int, Option("--seed", help="Seed of the resamplings.")]

# A data_manifest.yaml says these for itself.
DECLARED = (
    "recipe",
    "settings",
    "questions",
    "columns",
    "split",
    "modality",
    "nan",
    "hu_source",
    "id_from",
    "id_prefix",
    "include",
    "exclude",
    "follow_links",
    "masks",
    "mask_labels",
)


def given_options(context: Context, parameters: Iterable[str]) -> str:
    """Return those of a command's parameters that the user gave, as options: "--json, --set", or ""."""

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")

    return ", ".join(p.opts[0] for p in context.command.params if p.name in parameters and is_given(p.name))


def refuse_beside_manifest(context: Context, *more: str) -> None:
    """UsageError if an option was given that a data_manifest.yaml says for itself, or one of `more`."""
    if given := given_options(context, (*DECLARED, *more)):
        raise UsageError(f"expected --manifest alone, found {given} beside it; say it in the manifest")


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Return {"a": "b", "c": "d"} for ["a=b,c=d"] or ["a=b", "c=d"]; UsageError otherwise."""
    found = {}
    for text in ",".join(texts).split(",") if texts else ():
        key, _, value = (part.strip() for part in text.partition("="))
        if not (key and value):
            raise UsageError(f"{option}: expected name=value, found {text!r}")
        found[key] = value
    return found


def fractions(text: str) -> dict[str, float]:
    """Return {"train": 0.8, ...} for "train=0.8,val=0.1,test=0.1"; UsageError otherwise."""
    try:
        return {name: float(share) for name, share in pairs([text], "--split").items()}
    except ValueError:
        raise UsageError(f"--split: expected numbers like train=0.8,val=0.2, found {text!r}") from None


def numbers(text: str, count: int, option: str) -> list[float]:
    """Return [1.0, 2.0] for "1,2" where `count` is 2; UsageError otherwise."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise UsageError(f"{option}: expected {count} numbers with commas between them, found {text!r}")
    return found


def window_of(text: str) -> str | tuple[float, float]:
    """Return what --window says: a name as it is, or the two numbers of "low,high" in HU."""
    if "," not in text:
        return text
    low, high = numbers(text, 2, "--window")
    return low, high


def source_and_out(paths: Sequence[str] | None, manifest: Path | None, usage: str) -> tuple[Path, str]:
    """Return SOURCE and OUT for `usage` "SOURCE OUT" or "SOURCE [OUT]"; with --manifest, that in place of SOURCE.

    OUT is "" where it is not given. UsageError for too many or too few paths, and for a source that does not exist.
    """
    given = [*([str(manifest)] if manifest else []), *(paths or [])]
    least = 1 if manifest or "[" in usage else 2
    if not least <= len(given) <= 2:
        found = " ".join(["--manifest", *given] if manifest else given) or "neither"
        raise UsageError(f"expected {usage}, or --manifest data_manifest.yaml [OUT], found {found}")
    source, out = (*given, "")[:2]
    if manifest:
        return Path(source), out
    from photon_data.readers.object_path import ObjectPath, source_path
    from photon_data.scan import is_url

    path = source_path(source) if is_url(source) else Path(source)
    if not isinstance(path, ObjectPath) and not path.exists():
        raise UsageError(f"expected a folder or a file, but {source} does not exist")
    return path, out
