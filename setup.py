"""The one compiled part, beside what pyproject.toml says: photon_data/_kernels.c, for any Python from 3.11 on.

Where it cannot be compiled, the package is installed without it, and numpy does the same (photon_data/interpolate.py).
"""

import sys

from setuptools import Extension, setup

# Results are those of numpy to the bit: no operations are merged or reordered.
STRICT = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-trapping-math"]
if sys.platform == "win32":
    STRICT = ["/O2", "/fp:precise"]

setup(
    ext_modules=[
        Extension(
            "photon_data._kernels",
            ["photon_data/_kernels.c"],
            extra_compile_args=STRICT,
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
