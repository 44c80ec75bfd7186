"""Small trees laid out as publishers lay out their data sets; every value invented, columns and traps as published."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import yaml
from scans import ct_like
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data.datasets.combine import read_dataset
from photon_data.datasets.declare import read_data_manifest

SHAPE, SPACING = (16, 24, 28), (1.5, 0.75, 0.75)
METADATA_HEADER = [
    "VolumeName",
    "Manufacturer",
    "SeriesDescription",
    "ManufacturerModelName",
    "PatientSex",
    "PatientAge",
    "ReconstructionDiameter",
    "DistanceSourceToDetector",
    "DistanceSourceToPatient",
    "GantryDetectorTilt",
    "TableHeight",
    "RotationDirection",
    "ExposureTime",
    "XRayTubeCurrent",
    "Exposure",
    "FilterType",
    "GeneratorPower",
    "FocalSpots",
    "ConvolutionKernel",
    "PatientPosition",
    "RevolutionTime",
    "SingleCollimationWidth",
    "TotalCollimationWidth",
    "TableSpeed",
    "TableFeedPerRotation",
    "SpiralPitchFactor",
    "DataCollectionCenterPatient",
    "ReconstructionTargetCenterPatient",
    "ExposureModulationType",
    "CTDIvol",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceLocation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "XYSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "NumberofSlices",
    "ZSpacing",
    "StudyDate",
]


def place(root, name, version):
    """Where CT-RATE has a volume: train_1_a_1 -> train_fixed/train_1/train_1_a/train_1_a_1.nii.gz."""
    split, patient = name.split("_")[0], name.rsplit("_", 2)[0]
    return Path(root, split + ("_fixed" if version == "v2" else ""), patient, name.rsplit("_", 1)[0], f"{name}.nii.gz")


def write_v2(path, seed=0, spacing=SPACING, raw=0, blank=False):
    """A volume whose header is right and whose values are HU; `raw` is added to them, `blank` takes the header away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = (ct_like(SHAPE, seed).astype(np.float32) + raw).transpose(2, 1, 0)
    affine = np.eye(4) if blank else np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    image = nibabel.Nifti1Image(array if blank else array.astype(np.int16), affine)
    image.set_sform(affine, 0 if blank else 1)
    image.set_qform(affine, 0 if blank else 1)
    nibabel.save(image, path)
    return path


def write_v1(path, seed=0, intercept=-1024):
    """A volume with a blank header and raw float values: HU = value + intercept."""
    return write_v2(path, seed, raw=-intercept, blank=True)


def write_metadata(path, **rows):
    """A metadata table: a row per volume, `rows` maps its name to what differs from a plain one."""
    plain = {
        "ConvolutionKernel": "B",
        "PatientPosition": "HFS",
        "ImagePositionPatient": "[-166, 9, 56.2998657]",
        "ImageOrientationPatient": "[1.000000, 0.000000, 0.000000, 0.000000, 1.000000, -0.000000]",
        "Rows": SHAPE[1],
        "Columns": SHAPE[2],
        "XYSpacing": f"[{SPACING[1]}, {SPACING[2]}]",
        "RescaleIntercept": -1024,
        "RescaleSlope": 1,
        "NumberofSlices": SHAPE[0],
        "ZSpacing": SPACING[0],
    }
    return write_csv(
        path, METADATA_HEADER, [{**plain, "VolumeName": f"{name}.nii.gz", **row} for name, row in rows.items()]
    )


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def declare(folder, out="out", **datasets):
    """A data_manifest.yaml in `folder` with these entries."""
    path = Path(folder) / "data_manifest.yaml"
    recipe = {"name": "chest_ct", "shape_zyx": [40, 32, 32], "model_shape_zyx": [14, 28, 28]}
    names = {name.replace("_", "-"): entry for name, entry in datasets.items()}
    path.write_text(yaml.safe_dump({"out": out, "recipe": recipe, "datasets": names}, sort_keys=False))
    return path


def cli(*words):
    """The exit code of photon-data, and what it printed, on one line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def collected(folder, **entry):
    """The one data set of this entry, read and matched."""
    (declared,) = read_data_manifest(declare(folder, data=entry)).datasets
    return read_dataset(declared, instruction="Describe it.", seed=0)
