"""Options that several commands have, and the text of options -> values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from photon_data.recipe import Policy, Recipe

# photon-data prepare and inspect
SourceAndOut = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE] [OUT]",
        help="A folder of scans, or one scan; then a folder or URL (s3://...) for stores, manifests and the report. "
        "With --manifest: OUT alone, or nothing.",
    ),
]
Manifest = Annotated[
    Path | None, typer.Option(help="Data sets as this data_manifest.yaml declares them, instead of SOURCE.")
]
Only = Annotated[list[str], typer.Option("--only", help="This data set of the manifest only. Repeatable.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="chest_ct, abdomen_ct or wide_ct.")]
Settings = Annotated[
    list[str], typer.Option("--set", help="Change the recipe: spacing_mm=1.5,1.5,1.5 (z, y, x). Repeatable.")
]
Modality = Annotated[str | None, typer.Option(help="ct refuses intensities that are no HU; other does not look.")]
Nan = Annotated[str | None, typer.Option(help="refuse scans with NaN or infinite voxels, or fill those voxels.")]
HuSource = Annotated[str, typer.Option(help="header, stored (no scaling) or a table: volume, slope, intercept.")]
Columns = Annotated[list[str], typer.Option(help="Column names of your tables: volume=VolumeName,question=Question.")]
IdFrom = Annotated[
    str, typer.Option(help="Volume ids from the relative path, the file name, or a hash: path, name, hash.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N scans.")]
WorkerCount = Annotated[int | None, typer.Option(min=1, help="Local workers; from cores and memory if not given.")]
Scheduler = Annotated[str | None, typer.Option(help="Address or scheduler file of a Dask cluster to use.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds after which a file has failed.")]
Memory = Annotated[float | None, typer.Option(min=0, help="GB of address space per worker, 0 for no limit.")]
MaxVoxels = Annotated[int, typer.Option(min=1, help="Refuse scans of more voxels than this.")]

# photon predict and eval
Choices = Annotated[bool, typer.Option(help="Score the choices of rows that have some, instead of generating.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
QuestionsPerBatch = Annotated[int, typer.Option(min=1, help="Questions on one volume answered together.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]

# A data_manifest.yaml says these for itself.
DECLARED = ("recipe", "settings", "questions", "columns", "split", "modality", "nan", "hu_source", "id_from")


def given_options(context: typer.Context, parameters: Iterable[str]) -> str:
    """Return those of a command's parameters that the user gave, as options: "--json, --set", or ""."""

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")

    names = set(parameters)
    return ", ".join(p.opts[0] for p in context.command.params if p.name in names and is_given(p.name))


def refuse_beside_manifest(context: typer.Context, *more: str) -> None:
    """UsageError if an option was given that a data_manifest.yaml says for itself, or one of `more`."""
    from photon_data.errors import UsageError

    given = given_options(context, (*DECLARED, *more))
    if given:
        raise UsageError(f"expected --manifest alone, found {given} beside it; say it in the manifest")


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Return {"a": "b", "c": "d"} for ["a=b,c=d"] or ["a=b", "c=d"]; UsageError otherwise."""
    from photon_data.errors import UsageError

    found = {}
    for text in (part for item in texts for part in item.split(",")):
        key, equals, value = text.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"{option}: expected name=value, found {text!r}")
        found[key.strip()] = value.strip()
    return found


def fractions(text: str) -> dict[str, float]:
    """Return {"train": 0.8, ...} for "train=0.8,val=0.1,test=0.1"; UsageError otherwise."""
    from photon_data.errors import UsageError

    shares = pairs([text], "--split")
    try:
        return {name: float(share) for name, share in shares.items()}
    except ValueError:
        raise UsageError(f"--split: expected numbers like train=0.8,val=0.2, found {text!r}") from None


def numbers(text: str, count: int, option: str) -> list[float]:
    """Return [1.0, 2.0] for "1,2" where `count` is 2; UsageError otherwise."""
    from photon_data.errors import UsageError

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


def make_recipe(
    name: str,
    settings: Sequence[str],
    modality: str | None = None,
    nan: str | None = None,
    max_voxels: int | None = None,
) -> tuple[Recipe, Policy]:
    """Return the named recipe and the policy, with --set and the options applied; UsageError for what neither knows."""
    from photon_data.recipe import named_recipe

    options = {"modality": modality, "non_finite": nan, "max_voxels": max_voxels}
    extra = [f"{key}={value}" for key, value in options.items() if value is not None]
    return named_recipe(name, [*settings, *extra])


def source_and_out(paths: Sequence[str] | None, manifest: Path | None, usage: str) -> tuple[Path, str]:
    """Return SOURCE and OUT for `usage` "SOURCE OUT" or "SOURCE"; with --manifest, the manifest in place of SOURCE.

    OUT is "" where it is not given. UsageError for too many or too few paths, and for a source that does not exist.
    """
    from photon_data.errors import UsageError

    given = [str(manifest), *(paths or ())] if manifest else list(paths or ())
    count = len(usage.split())
    if len(given) > (2 if manifest else count) or (not manifest and len(given) < count):
        found = " ".join([*(["--manifest"] if manifest else []), *given]) or "neither"
        raise UsageError(f"expected {usage}, or --manifest data_manifest.yaml [OUT], found {found}")
    source, out = (*given, "")[:2]
    if not manifest and not Path(source).exists():
        raise UsageError(f"expected a folder or a file, but {source} does not exist")
    return Path(source), out
