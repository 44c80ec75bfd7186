"""The bodies of `photon-data prepare` and `status`: what the options request, progress, the result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer import Context

from photon_cli.terminal import (
    STOPPED,
    ProgressBar,
    console,
    fail,
    fractions,
    given_options,
    pairs,
    print_lines,
    print_table,
    refuse_beside_manifest,
)
from photon_data.dataset_lock import read_lock
from photon_data.errors import UsageError, first_few
from photon_data.files import Location
from photon_data.mask_store import is_stale, problems_of, read_rows
from photon_data.questions.kept import kept_questions
from photon_data.questions.splits import Count
from photon_data.readers.find import left_alone
from photon_data.readers.mask_pattern import read_label_names
from photon_data.recipe import Policy, Recipe, accepted, named_recipe
from photon_data.records import UNCHANGED, VolumeRecord, records_of
from photon_data.scan import MaskPattern
from photon_pipelines import collection
from photon_pipelines import plan as planning
from photon_pipelines.cluster import Stopped
from photon_pipelines.collection import Result
from photon_pipelines.plan import Plan
from photon_pipelines.request import (
    Request,
    request_of_manifest,
)

SHOWN_QUESTIONS = 10
# What --repair knows: the code of the refusal that it takes back.
REPAIRS = {"slices": "dicom-missing-slices"}
ANSWER_LENGTH = 40


def request_of(context: Context, source: Path, out: str) -> Request:
    """Return the request that the options of `prepare` or `inspect` make; UsageError where they cannot be followed."""
    given = context.params
    fields = ["limit", "overwrite", "pictures", "allow_leaks", "overrides"]
    if given["manifest"]:
        refuse_beside_manifest(context)
        fields += ["seed"] if given_options(context, ["seed"]) else []
        run: dict[str, Any] = {name: given[name] for name in fields}
        run |= {"prompt": given["prompt_style"], "policy": Policy(max_voxels=given["max_voxels"])}
        run |= _run_options(given)
        request = request_of_manifest(source, given["only"], out, **run)
    else:
        policy_options = {"modality": "modality", "non_finite": "nan", "max_voxels": "max_voxels"}
        settings = [f"{key}={given[name]}" for key, name in policy_options.items() if given[name] is not None]
        recipe, policy = named_recipe(given["recipe"], [*given["settings"], *settings])
        if given.get("lock") and not given_options(context, ["recipe", "settings"]):
            recipe = Recipe.from_json(read_lock(given["lock"])["recipe"])
        fields += ["seed", "questions", "hu_source", "id_from", "id_prefix", "include", "exclude", "follow_links"]
        run = {name: given[name] for name in fields if name in given} | _run_options(given)
        if "split" in given:  # inspect asks no questions
            run["masks"] = _mask_pattern(given["masks"], given["mask_labels"])
            run |= {"prompt": given["prompt_style"], "fractions": fractions(given["split"])}
        columns = pairs(given["columns"], "--columns")
        request = Request(source, Location(out), recipe, policy=policy, columns=columns, **run)
    if request.lock and request.recipe.digest != Recipe.from_json(dict(request.lock["recipe"])).digest:
        expected = f"the lock's recipe ({request.lock['recipe']['name']})"
        found = f"another one ({request.recipe.name}, {request.recipe.digest})"
        raise UsageError(f"--lock: expected {expected}, found {found}; leave --recipe and --set out")
    if "pictures" in given and not request.out.is_shared:  # inspect writes nothing
        raise UsageError(f"expected a folder or an object store, found {request.out.url}: processes do not share it")
    return request


def _mask_pattern(text: str | None, labels: Path | None) -> MaskPattern | None:
    if labels and not text:
        raise UsageError("--mask-labels: expected --masks PATTERN beside it, found none")
    return MaskPattern(text, read_label_names(labels) if labels else {}) if text else None


def _run_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is accepted, and what only `prepare` has: how it treats what OUT holds."""
    lock = read_lock(given["lock"]) if given.get("lock") else None
    return {
        "retry_failed": given.get("retry_failed", False),
        "paths": given.get("paths_in_manifests"),
        "grids": given.get("grids") or (lock or {}).get("grids"),
        "check": given.get("check", "time"),
        "lock": lock,
        "accept": _accepted(given),
    }


def _accepted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what --accept and --repair change of the policy of all scans; UsageError for what neither knows."""
    codes = []
    for text in given["repair"]:
        name, _, count = (part.strip() for part in text.partition("="))
        if name not in REPAIRS:
            raise UsageError(f"--repair: expected {', '.join(REPAIRS)}, found {text!r}")
        codes.append(f"{REPAIRS[name]}={count}")
    return accepted([*given["accept"], *codes])


@contextmanager
def stopped_as_exit_code() -> Iterator[None]:
    """End the command with the exit code for a run that could not go on."""
    try:
        yield
    except Stopped as error:
        fail(f"Stopped: {error}. What is done is kept.", STOPPED)


class PreparingBar(ProgressBar, planning.Callback):
    """Shows how far a run is, and prints at once every file that was refused or failed; see Callback."""

    total = done_bytes = masks_done = 0

    def on_archive(self, name: str, done_bytes: int, total_bytes: int) -> None:  # noqa: D102
        done, total = done_bytes // 1_000_000, total_bytes // 1_000_000
        self.update(description="unpacking", completed=done, total=total, detail=f"MB, {name}")
        self.line(f"unpacking {name}: {done:,} of {total:,} MB")

    def on_file(self, count: int) -> None:  # noqa: D102
        self.update(description="looking for scans", detail=f"{count} files seen")

    def on_note(self, note: str) -> None:  # noqa: D102
        console.print(note, soft_wrap=True)

    def on_plan(self, todo: Plan, ignored: Mapping[str, int]) -> None:  # noqa: D102
        self.total, self.before, self.start_s = len(todo.jobs), len(todo.done), time.monotonic()
        self.states = Counter(unchanged=self.before)
        console.print(f"{self.total + self.before} scans found, {self.before} of them done before")
        print_lines([f"files left alone: {left_alone(ignored)}"] if ignored else [])
        self.update(description="preparing", total=self.total, completed=0, detail="")

    def on_record(self, record: VolumeRecord) -> None:  # noqa: D102
        self.states[record.state] += 1
        self.done_bytes += record.bytes_in
        if not record.is_there and record.reason:
            console.print(f"{record.state} {record.name}: {record.reason}", soft_wrap=True)
        minutes = max((time.monotonic() - self.start_s) / 60, 1e-9)
        rate = (self.states.total() - self.states["unchanged"]) / minutes
        states = ", ".join(f"{n} {state}" for state, n in self.states.items() if n)
        detail = f"{states}; {self.done_bytes / 1e6:.0f} MB, {rate:.0f} volumes/min"
        self.update(advance=1, detail=detail)
        self.line(f"{self.states.total() - self.before} of {self.total} done: {detail}")

    def on_masks(self, row: VolumeRecord, total: int) -> None:  # noqa: D102
        self.masks_done += 1
        if row.state != UNCHANGED:
            print_lines(problems_of(row))
        self.update(description="masks", total=total, completed=self.masks_done, detail="")
        self.line(f"masks of {self.masks_done} of {total} volumes")


def print_result(request: Request, result: Result) -> None:
    """Print counts, the manifests, what is missing, and where to look."""
    states, kept, unmatched = result.states, result.kept, result.manifests.unmatched
    print_table(f"{len(result.records)} scans", [*states], [[*map(str, states.values())]], texts=0)
    codes = Counter((record.code, record.accept) for record in result.records if not record.is_there)
    for (code, accept), count in codes.most_common():
        print_lines([f"  {count} x {code}" + (f" (--accept {accept} would let them pass)" if accept else "")])
    # What was not fetched has no time either, and no key: the next run tries again.
    if remembered := sum(not one.is_there and one.seconds is None and bool(one.key) for one in result.records):
        console.print(f"{remembered} of them were not read again: nothing changed since (--retry-failed reads them)")
    if there := [record.id for record in kept if record.is_there]:
        console.print(f"{len(there)} volumes of earlier runs were kept, {min(there)} first")
    print_lines(_about_masks(result.masks))
    for split, rows in result.manifests.rows.items():
        console.print(f"manifests/{split}.jsonl: {len(rows)} rows on {len({row['volume_id'] for row in rows})} volumes")
    if request.lock:
        same = "every volume and question is as in the lock, to the byte"
        print_lines(result.differences or [same])
    if result.left:
        found = f"{len(result.left)} rows that the manifests had are gone: {first_few(result.left, SHOWN_QUESTIONS)}"
        console.print(found, style="yellow", soft_wrap=True)
    if result.leak is not None:
        console.print(f"No manifests were written: {result.leak}", style="red", soft_wrap=True)
    if result.damaged:
        console.print(f"{len(result.damaged)} x archives that could not be read as a whole; see above", style="red")
    _print_counts(result.counts)
    if unmatched:
        console.print(f"{len(unmatched)} questions have no row:", style="red")
    print_lines(f"  {one.id} (volume {one.volume}): {one.reason}" for one in unmatched[:SHOWN_QUESTIONS])
    if len(unmatched) > SHOWN_QUESTIONS:
        console.print(f"  and {len(unmatched) - SHOWN_QUESTIONS} more")
    console.print(f"{request.out.url}: see report.html, volumes.jsonl", soft_wrap=True)


def _about_masks(rows: Sequence[VolumeRecord]) -> list[str]:
    """Return sentences about the masks of some volumes: how many there are, and what is missing."""
    if not rows:
        return []
    there, codes = [row for row in rows if row.is_there], Counter(row.code for row in rows if not row.is_there)
    without = "".join(f"; {count} x {code}" for code, count in codes.most_common())
    masks = sum((row.facts or {}).get("masks", 0) for row in there)
    lines = [f"masks of {len(there):,} of {len(rows):,} volumes ({masks:,} masks){without}"]
    for key, why in (("refused", "refused"), ("lost", "left without a voxel by the grid")):
        if found := [f"{name} of {row.id}" for row in there for name in (row.facts or {}).get(key, ())]:
            lines.append(f"{len(found):,} masks {why}: {first_few(found)}")
    return lines


def _print_counts(counts: Sequence[Count]) -> None:
    """Print what is asked, and how far a constant answer gets."""
    if not any(found.constant_answer for found in counts):
        return
    rows = []
    for found in counts:
        low, middle, high = found.per_volume
        numbers = [f"{found.questions:,}", f"{found.volumes:,}", f"{low} to {high}, median {middle:g}"]
        answer = " ".join((found.constant_answer or "").split())
        answer = answer if len(answer) <= ANSWER_LENGTH else answer[:ANSWER_LENGTH] + "..."
        shares = ["" if s is None else f"{s:.1%}" for s in (found.constant_accuracy, found.constant_macro)]
        rows.append([found.dataset, found.task, found.split, *numbers, answer, *shares])
    names = [
        "data set",
        "task",
        "split",
        "questions",
        "volumes",
        "per volume",
        "best constant answer",
        "right",
        "macro",
    ]
    print_table("questions (all of it in questions.json)", names, rows)


def print_status(out: Location) -> None:
    """Print what a prepared folder holds: volumes by source folder, questions by data set, and what a run would do."""
    records, parts = records_of(out), collection.status(out)
    gigabytes = sum(record.store_bytes or 0 for record in records if record.is_there) / 1e9
    names = ["source folder", "without a volume", "volumes", "unchanged", "changed", "new", "gone"]
    rows = []
    private = {record.root for record in records if record.hidden}
    for part in parts:
        root = "(private)" if part.root in private else part.root or "(not recorded)"
        without = ", ".join(f"{count} x {code}" for code, count in part.codes.items())
        found = ["?"] * 4 if part.gone is None else [part.unchanged, part.changed, part.new, len(part.gone)]
        rows.append([root, without, str(part.there), *map(str, found)])
    print_table(f"{out.url}: {gigabytes:,.2f} GB of stores", names, rows, texts=2)
    questions = kept_questions(out)
    if questions:
        counts = [[name, f"{len(own):,}"] for name, own in questions.items()]
        print_table("questions", ["data set", "questions"], counts, texts=1)
    if missing := [part.root for part in parts if part.gone is None and part.root not in private]:
        print_lines([f"not there now, so nothing is known of what changed: {first_few(missing)}"])
    volumes = {record.id: record for record in records if record.is_there}
    masks = [row for row in read_rows(out) if row.id in volumes]
    stale = [row.id for row in masks if is_stale(out, row, volumes[row.id])]
    old = f"{len(stale):,} of them are of earlier volumes, {first_few(stale)}: prepare --masks makes them again"
    print_lines([*_about_masks(masks), *([old] if stale else [])])
    print_lines(["The next prepare of a source does its changed and new scans. `prune` takes away what is gone."])
