"""The recipe: every setting that shapes the bytes of a store, as one frozen, validated, digested value.

Ready recipes, as functions; variants derive from one another.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from photon_data.errors import UsageError

# Part of every resume key: raise it when the same recipe would give other bytes.
ALGORITHM = 2

# Fields that do not change a voxel, hence not the digest.
_WORDS = ("name", "instruction")


@dataclass(frozen=True)
class Recipe:
    """How a scan becomes a volume. Triples are in z, y, x order.

    name             of the recipe, for people
    spacing_mm       voxel size of the target grid; its direction is the identity in LPS (ITK calls it "RAI")
    shape_zyx        voxels of the target grid, centred on the centre of the scan's own field of view
    window_hu        values are clipped to this range
    pad_hu           value outside of the scan
    antialias        smooth along axes that are down-sampled before interpolating (Gaussian of Cardoso et al. 2015); slower
    model_shape_zyx  voxels of the model grid, resized trilinearly from the target grid (align_corners=False)
    modality         "ct" refuses intensities that cannot be Hounsfield units; "other" does not look
    non_finite       "refuse" scans with NaN or infinite voxels, or "fill" those voxels with pad_hu
    nifti_affine     "auto": sform if coded, else qform, and refuse where both are coded and differ; "sform"; "qform"
    instruction      the question of a volume that has none in a table
    """

    name: str = "chest_ct"
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shape_zyx: tuple[int, int, int] = (364, 364, 364)
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    pad_hu: float = -1000.0
    antialias: bool = False
    model_shape_zyx: tuple[int, int, int] = (140, 280, 280)
    modality: str = "ct"
    non_finite: str = "refuse"
    nifti_affine: str = "auto"
    instruction: str = "Describe the findings of this CT scan."

    def __post_init__(self) -> None:
        """UsageError for a setting that no store can be made with."""
        _check(all(0.05 <= s <= 50 for s in self.spacing_mm), "spacing_mm", "three of 0.05 to 50 mm", self.spacing_mm)
        for name in ("shape_zyx", "model_shape_zyx"):
            shape = getattr(self, name)
            _check(all(1 <= n <= 4096 for n in shape), name, "three whole numbers of 1 to 4096", shape)
        low, high = self.window_hu
        _check(-32768 <= low < high <= 32767, "window_hu", "low < high, both within int16", self.window_hu)
        _check(low <= self.pad_hu <= high, "pad_hu", f"a value within the window {self.window_hu}", self.pad_hu)
        _check(self.modality in ("ct", "other"), "modality", "ct or other", self.modality)
        _check(self.non_finite in ("refuse", "fill"), "non_finite", "refuse or fill", self.non_finite)
        _check(self.nifti_affine in ("auto", "sform", "qform"), "nifti_affine", "auto, sform or qform", self.nifti_affine)
        _check("<video>" not in self.instruction, "instruction", "text without a literal <video>", self.instruction)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that differ between recipes that can give different bytes."""
        settings = {k: v for k, v in self.to_json().items() if k not in _WORDS}
        return hashlib.sha256(json.dumps([ALGORITHM, settings], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """Return the Recipe of a saved dict; UsageError for keys or values it does not know."""
        return replace(cls(), **{key: _convert(key, value) for key, value in data.items()})


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """Return the recipe with "key=value" settings applied, e.g. ["spacing_mm=1.5,1.5,1.5"]; UsageError if one cannot be."""
    changes = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"key=value wanted, got {setting!r}; for example spacing_mm=1.5,1.5,1.5")
        changes[key.strip()] = _convert(key.strip(), text.strip())
    return replace(recipe, **changes)


def _convert(key: str, value: Any) -> Any:
    """Return `value` (text, or plain JSON) as the type of the recipe field `key`."""
    hints = get_type_hints(Recipe)
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(f.name for f in fields(Recipe))}"
        raise UsageError(f"a recipe field wanted, got {key!r}{hint}")
    kind = hints[key]
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (str, float):
            return kind(value)
        parts = value.split(",") if isinstance(value, str) else list(value)
        item = kind.__args__[0]
        if len(parts) != len(kind.__args__):
            raise ValueError
        return tuple(item(part) for part in parts)
    except (KeyError, ValueError, TypeError):
        raise UsageError(f"{key}: {_wanted(kind)} wanted, got {value!r}") from None


def _wanted(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    if kind in (str, float):
        return "a number" if kind is float else "text"
    return f"{len(kind.__args__)} {'whole ' if kind.__args__[0] is int else ''}numbers with commas between"


def _check(good: bool, name: str, wanted: str, got: Any) -> None:
    if not good:
        raise UsageError(f"{name}: {wanted} wanted, got {got}")


def chest_ct() -> Recipe:
    """Return the published preprocessing of Photon: 1 mm, 364^3, [-1000, 1000] HU, model grid 140 x 280 x 280."""
    return Recipe()


def abdomen_ct() -> Recipe:
    """Return the same grid for abdominal scans, with an instruction of their own."""
    return replace(chest_ct(), name="abdomen_ct", instruction="Describe the findings of this abdominal CT scan.")


def wide_ct() -> Recipe:
    """Return a grid of 504 x 504 x 504 mm at 1.4 mm that cuts off almost no scan, at Photon's number of model voxels."""
    return replace(chest_ct(), name="wide_ct", spacing_mm=(1.4, 1.4, 1.4), shape_zyx=(360, 360, 360))


RECIPES: dict[str, Callable[[], Recipe]] = {"chest_ct": chest_ct, "abdomen_ct": abdomen_ct, "wide_ct": wide_ct}


def named_recipe(name: str, settings: Sequence[str]) -> Recipe:
    """Return the named recipe with "key=value" settings applied; UsageError for what it does not know."""
    if name not in RECIPES:
        raise UsageError(f"recipe: one of {', '.join(RECIPES)} wanted, got {name!r}")
    return with_settings(RECIPES[name](), list(settings))
