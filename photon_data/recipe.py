"""Recipe: every setting that decides a voxel of a store. Policy: what is refused or picked on the way.

Both are frozen values; `--set key=value` changes either. Variants derive from one another with `dataclasses.replace`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from photon_data.errors import UsageError, name_hint

# Part of every resume key: raise it when the same recipe would give other bytes.
ALGORITHM = 2
# These fields decide no voxel, hence not the digest.
WITHOUT_DIGEST = ("name", "instruction")
# The largest scan of CT-RATE's validation split has 424 million voxels.
MAX_VOXELS = 1_000_000_000
# These were fields of Recipe once. The digest still counts their defaults, so that old stores keep their digest.
EARLIER = {"modality": "ct", "non_finite": "refuse", "nifti_affine": "auto"}


@dataclass(frozen=True)
class Recipe:
    """How a scan becomes a volume. Triples are in z, y, x order.

    >>> from dataclasses import replace
    >>> usual = photon_data.Recipe()
    >>> usual.digest == replace(usual, spacing_mm=(1.5, 1.5, 1.5)).digest
    False
    >>> usual.digest == replace(usual, name="mine").digest
    True
    """

    name: str = "chest_ct"
    # The target grid: its direction is the identity in LPS (ITK calls it "RAI"). See `centre` for its place.
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shape_zyx: tuple[int, int, int] = (364, 364, 364)
    window_hu: tuple[float, float] = (-1000.0, 1000.0)  # values are clipped to this range
    pad_hu: float = -1000.0  # value outside of the scan
    # Smooth along axes that are down-sampled before interpolating (Gaussian of Cardoso et al. 2015), for every grid. It
    # is slower.
    antialias: bool = False
    centre: str = "scan"  # of the grid: that of the "scan"'s field of view, or of the box around the "body" in it
    # The model grid: resized trilinearly from the target grid (align_corners=False).
    model_shape_zyx: tuple[int, int, int] = (140, 280, 280)
    instruction: str = "Describe the findings of this CT scan."  # the question of a volume that has none in a table

    def __post_init__(self) -> None:
        """UsageError for a setting that no store can be made with."""
        _check(all(0.05 <= s <= 50 for s in self.spacing_mm), "spacing_mm", "three of 0.05 to 50 mm", self.spacing_mm)
        for name, shape in (("shape_zyx", self.shape_zyx), ("model_shape_zyx", self.model_shape_zyx)):
            _check(all(1 <= n <= 4096 for n in shape), name, "three whole numbers of 1 to 4096", shape)
        low, high = self.window_hu
        _check(-32768 <= low < high <= 32767, "window_hu", "low < high, both within int16", self.window_hu)
        _check(low <= self.pad_hu <= high, "pad_hu", f"a value within the window {self.window_hu}", self.pad_hu)
        _check(self.centre in ("scan", "body"), "centre", "scan or body", self.centre)
        _check("<video>" not in self.instruction, "instruction", "text without a literal <video>", self.instruction)

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits that differ between recipes that can give different bytes."""
        settings = {k: v for k, v in self.to_json().items() if k not in WITHOUT_DIGEST} | EARLIER
        if self.centre == "scan":  # as before there was a choice
            del settings["centre"]
        if self.antialias:  # once, the model grid was not smoothed
            settings["antialias"] = "every grid"
        return hashlib.sha256(json.dumps([ALGORITHM, settings], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the Recipe of a saved dict, also of one that held a policy; UsageError for other keys or values."""
        return cls(**{key: _convert(cls, key, value) for key, value in data.items() if key not in EARLIER})


@dataclass(frozen=True)
class Policy:
    """What is refused, and what is picked where a scan leaves a choice.

    A store does not depend on the policy unless a choice mattered for its scan; that choice is then recorded with it.

    >>> photon_data.Policy(modality="mr")
    Traceback (most recent call last):
    photon_data.errors.UsageError: modality: expected ct or other, found mr
    """

    modality: str = "ct"  # "ct" refuses intensities that cannot be Hounsfield units; "other" does not
    non_finite: str = "refuse"  # "refuse" scans with NaN or infinite voxels, or "fill" these with the recipe's pad_hu
    # Sform if coded, else qform. Where both are coded and differ, "auto" refuses, "sform" and "qform" pick that one.
    nifti_affine: str = "auto"
    max_voxels: int = MAX_VOXELS  # larger scans are refused
    # DICOM slices at uneven distances, up to so many missing in a row, are resampled on their true positions; 0 takes
    # uneven distances with no slice missing, -1 refuses both.
    repair_slices: int = -1
    repair_gap_mm: float = 10.0  # the widest distance of two slices between which such a repair interpolates

    def __post_init__(self) -> None:
        """UsageError for a choice that does not exist."""
        _check(self.modality in ("ct", "other"), "modality", "ct or other", self.modality)
        _check(self.non_finite in ("refuse", "fill"), "non_finite", "refuse or fill", self.non_finite)
        affines = ("auto", "sform", "qform")
        _check(self.nifti_affine in affines, "nifti_affine", "auto, sform or qform", self.nifti_affine)
        _check(self.max_voxels >= 1, "max_voxels", "a number above 0", self.max_voxels)
        _check(self.repair_slices >= -1, "repair_slices", "a number of missing slices, or -1", self.repair_slices)
        _check(0 < self.repair_gap_mm < 1000, "repair_gap_mm", "0 to 1000 mm", self.repair_gap_mm)

    def allows(self, choices: Mapping[str, Any]) -> bool:
        """Tell whether this policy lets a volume pass for which `choices` mattered, in the very same way."""
        own = vars(self)
        return all(
            key in own and (own[key] >= value if key in LIMITS else own[key] == value) for key, value in choices.items()
        )


LIMITS = ("repair_slices", "repair_gap_mm")  # of a volume, what it takes is recorded, not what was allowed


class Acceptance(NamedTuple):
    """What `--accept CODE=VALUE` changes of a policy."""

    field: str
    usual: str | None  # the value of a code alone; None: a person has to give one
    values: str  # which there are, in words


# By the code of the refusal that it takes back. docs/reading.md has the same table.
ACCEPTANCES = {
    "dicom-missing-slices": Acceptance("repair_slices", "3", "the most missing slices in a row, 0 for none"),
    "affine-conflict": Acceptance("nifti_affine", None, "sform or qform"),
    "non-finite": Acceptance("non_finite", "fill", "fill"),
    "hu-implausible": Acceptance("modality", "other", "other"),
    "too-large": Acceptance("max_voxels", None, "the most voxels of a scan"),
}


def accepted(texts: Sequence[str]) -> dict[str, Any]:
    """Return {field of a policy: value} for codes of refusals with their values; UsageError for what is neither.

    ["non-finite", "affine-conflict=sform"] -> {"non_finite": "fill", "nifti_affine": "sform"}
    """
    changes: dict[str, Any] = {}
    for text in texts:
        code, _, value = (part.strip() for part in text.partition("="))
        if code not in ACCEPTANCES:
            raise UsageError(f"expected a code that can be accepted, found {code!r}; {name_hint(code, ACCEPTANCES)}")
        field, usual, values = ACCEPTANCES[code]
        given = value or usual
        if given is None or given == "?":
            raise UsageError(f"{code}: expected {code}={values}, found {text!r}; a person has to choose")
        change = _convert(Policy, field, given)
        if vars(Policy(**{field: change}))[field] == vars(Policy())[field]:
            raise UsageError(f"{code}: expected {values}, found {given!r}, which accepts nothing")
        if changes.setdefault(field, change) != change:
            raise UsageError(f"{code}: expected one value, found {changes[field]} and {change}")
    return changes


def chest_ct() -> Recipe:
    """Return the published preprocessing of Photon: 1 mm, 364^3, [-1000, 1000] HU, model grid 140 x 280 x 280."""
    return Recipe()


def abdomen_ct() -> Recipe:
    """Return the same grid for abdominal scans, with an instruction of their own."""
    return replace(chest_ct(), name="abdomen_ct", instruction="Describe the findings of this abdominal CT scan.")


def wide_ct() -> Recipe:
    """Return a grid of 504 x 504 x 504 mm at 1.4 mm, which cuts off almost no scan."""
    return replace(chest_ct(), name="wide_ct", spacing_mm=(1.4, 1.4, 1.4), shape_zyx=(360, 360, 360))


RECIPES: dict[str, Callable[[], Recipe]] = {"chest_ct": chest_ct, "abdomen_ct": abdomen_ct, "wide_ct": wide_ct}


def named_recipe(name: str, settings: Sequence[str] = ()) -> tuple[Recipe, Policy]:
    """Return the recipe of that name and a policy, changed by "key=value" settings; UsageError for what neither knows.

    ["spacing_mm=1.5,1.5,1.5", "modality=other"] -> Recipe(spacing_mm=(1.5, 1.5, 1.5)), Policy(modality="other")
    """
    if name not in RECIPES:
        raise UsageError(f"recipe: expected one of {', '.join(RECIPES)}, found {name!r}")
    changes: dict[type, dict[str, Any]] = {Recipe: {}, Policy: {}}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UsageError(f"expected key=value, found {setting!r}; for example spacing_mm=1.5,1.5,1.5")
        owner = Policy if key in get_type_hints(Policy) else Recipe
        changes[owner][key] = _convert(owner, key, text)
    return replace(RECIPES[name](), **changes[Recipe]), Policy(**changes[Policy])


def _convert(owner: type, key: str, value: Any) -> Any:
    """Return `value` (text, or plain JSON) as the type of the field `key` of Recipe or Policy."""
    kind = get_type_hints(owner).get(key)
    if kind is None:
        known = [*get_type_hints(Recipe), *get_type_hints(Policy)]
        raise UsageError(f"expected a field of the recipe or policy, found {key!r}; {name_hint(key, known)}")
    items: tuple[type, ...] = getattr(kind, "__args__", ())
    expected = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}.get(kind)
    expected = expected or f"{len(items)} {'whole ' if items[0] is int else ''}numbers with commas between"
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if not items:
            return kind(value)
        parts = value.split(",") if isinstance(value, str) else list(value)
        return tuple(item(part) for item, part in zip(items, parts, strict=True))
    except (KeyError, ValueError, TypeError, OverflowError):
        raise UsageError(f"{key}: expected {expected}, found {value!r}") from None


def _check(good: bool, name: str, expected: str, found: Any) -> None:
    if not good:
        raise UsageError(f"{name}: expected {expected}, found {found}")
