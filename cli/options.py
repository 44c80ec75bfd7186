"""Options that several commands have, and the text of options -> values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from photon_data.errors import UsageError

# photon-data prepare and inspect
SourceAndOut = Annotated[
    list[str] | None,
    Argument(
        metavar="[SOURCE] [OUT]",
        help="Folder of scans, or one scan; then a folder or URL (s3://...) to write to. With --manifest: [OUT] alone.",
    ),
]
Manifest = Annotated[Path | None, Option(help="A data_manifest.yaml that declares data sets, instead of SOURCE.")]
Only = Annotated[list[str], Option("--only", help="This data set of the manifest only. Repeatable.")]
RecipeName = Annotated[str, Option("--recipe", help="How raw scans are prepared: chest_ct, abdomen_ct or wide_ct.")]
Settings = Annotated[list[str], Option("--set", help="Change the recipe: spacing_mm=2,1,1 (z, y, x). Repeatable.")]
Modality = Annotated[str | None, Option(help="ct refuses intensities that are no HU; other does not look.")]
Nan = Annotated[str | None, Option(help="refuse scans with NaN or infinite voxels, or fill those voxels.")]
HuSource = Annotated[str, Option(help="header, stored (no scaling) or a table: volume, slope, intercept.")]
Columns = Annotated[list[str], Option(help="Column names of your tables: volume=VolumeName,question=Question.")]
IdFrom = Annotated[str, Option(help="Volume ids from the relative path, the file name, or a hash: path, name, hash.")]
Limit = Annotated[int | None, Option(min=1, help="Only the first N scans.")]
WorkerCount = Annotated[int | None, Option(min=1, help="Local workers; from cores and memory if not given.")]
Scheduler = Annotated[str | None, Option(help="Address or scheduler file of a Dask cluster to use.")]
Timeout = Annotated[float, Option(min=1, help="Seconds after which a file has failed.")]
Memory = Annotated[float | None, Option(min=0, help="GB of address space per worker, 0 for no limit.")]
MaxVoxels = Annotated[int, Option(min=1, help="Refuse scans of more voxels than this.")]

# photon predict and eval; photon-data show has the first two
Window = Annotated[str, Option(help="Of pictures: full, lung, mediastinum, soft, bone, or low,high in HU.")]
At = Annotated[str | None, Option(help="World point x,y,z in LPS mm; else the most salient kept token, or the centre.")]
Choices = Annotated[bool, Option(help="Score the choices of rows that have some, instead of generating.")]
MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer, in tokens.")]
QuestionsPerBatch = Annotated[int, Option(min=1, help="Questions on one volume answered together.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")]

# A data_manifest.yaml says these for itself.
DECLARED = ("recipe", "settings", "questions", "columns", "split", "modality", "nan", "hu_source", "id_from")


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
    """Return SOURCE and OUT for `usage` "SOURCE OUT" or "SOURCE"; with --manifest, the manifest in place of SOURCE.

    OUT is "" where it is not given. UsageError for too many or too few paths, and for a source that does not exist.
    """
    given = [*([str(manifest)] if manifest else []), *(paths or [])]
    count = len(usage.split())
    if not (1 <= len(given) <= 2 if manifest else len(given) == count):
        found = " ".join(["--manifest", *given] if manifest else given) or "neither"
        raise UsageError(f"expected {usage}, or --manifest data_manifest.yaml [OUT], found {found}")
    source, out = (*given, "")[:2]
    if not manifest and not Path(source).exists():
        raise UsageError(f"expected a folder or a file, but {source} does not exist")
    return Path(source), out
