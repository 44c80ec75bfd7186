import pytest

from photon_data.errors import UsageError
from photon_data.recipe import RECIPES, Policy, Recipe, named_recipe


def test_settings_become_the_types_of_their_fields():
    recipe, _ = named_recipe(
        "chest_ct", ["spacing_mm=1.5,1.5,3", "shape_zyx=100, 200,200", "antialias=true", "pad_hu=-900"]
    )
    assert recipe.spacing_mm == (1.5, 1.5, 3.0)
    assert recipe.shape_zyx == (100, 200, 200)
    assert recipe.antialias is True
    assert recipe.pad_hu == -900.0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("spacing=1,1,1", "did you mean 'spacing_mm'"),
        ("spacing_mm=1,1", "3 numbers"),
        ("spacing_mm=1,1,0", "0.05 to 50"),
        ("shape_zyx=1.5,2,2", "3 whole numbers"),
        ("shape_zyx=1,2,9999", "1 to 4096"),
        ("window_hu=100,-100", "low < high"),
        ("window_hu=-99999,0", "int16"),
        ("pad_hu=2000", "within the window"),
        ("pad_hu=nan", "within the window"),
        ("modality=mr", "ct or other"),
        ("non_finite=zero", "refuse or fill"),
        ("nifti_affine=both", "auto, sform or qform"),
        ("antialias=maybe", "true or false"),
        ("centre=lung", "scan or body"),
        ("instruction=<video> what?", "literal <video>"),
        ("spacing_mm", "expected key=value"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_was_wanted(setting, said):
    with pytest.raises(UsageError, match=said):
        named_recipe("chest_ct", [setting])


def test_a_recipe_survives_json_and_unknown_keys_do_not():
    recipe, _ = named_recipe("chest_ct", ["spacing_mm=2,2,2", "modality=other"])
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(UsageError, match="spacings"):
        Recipe.from_json({"spacings": [1, 1, 1]})


def test_the_digest_differs_exactly_where_bytes_can():
    base = Recipe()
    same = ["name=x", "instruction=Look.", "modality=other", "non_finite=fill", "nifti_affine=sform", "max_voxels=9"]
    assert named_recipe("chest_ct", same)[0].digest == base.digest
    changed = ["spacing_mm=1,1,2", "shape_zyx=9,9,9", "window_hu=-1000,900", "pad_hu=0", "antialias=true"]
    changed.append("centre=body")
    digests = {named_recipe("chest_ct", [setting])[0].digest for setting in changed}
    assert len(digests | {base.digest}) == len(changed) + 1


def test_the_digest_is_that_of_earlier_versions_whose_recipes_held_a_policy():
    assert Recipe().digest == "d5d07f51d86e1ae4"  # of commit d443086
    earlier = {**Recipe().to_json(), "modality": "other", "non_finite": "fill", "nifti_affine": "qform"}
    assert Recipe.from_json(earlier) == Recipe()


def test_settings_of_the_policy_stand_beside_those_of_the_recipe():
    _, policy = named_recipe("chest_ct", ["nifti_affine=qform", "pad_hu=0", "max_voxels=1000"])
    assert policy == Policy(nifti_affine="qform", max_voxels=1000)


def test_every_ready_recipe_goes_by_its_name():
    assert all(make().name == name for name, make in RECIPES.items())
