"""A raw scan is asked about as if it had been prepared: the same bytes, the same refusals."""

import gzip

import numpy as np
import pytest
from dicom_files import *  # noqa: F403
from raw import write_scan

from photon_data import open_volume
from photon_data.errors import Refused, UsageError
from photon_data.job import Job, run
from photon_data.readers import find_scans
from photon_data.recipe import Recipe
from photon_data.store import store_name
from photon_train.scan_input import open_input

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
