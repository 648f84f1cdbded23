"""The optional part of the build; all else is in pyproject.toml.

Without a C compiler the package is the same but for `dop.ops._launch`, see dop/ops/native.py.
"""

from setuptools import Extension, setup

STABLE = 0x030A0000
"""CPython's stable ABI as of 3.10: one binary for this version and all later ones."""

setup(
    ext_modules=[
        Extension(
            "dop.ops._launch",
            ["dop/ops/_launch.c"],
            define_macros=[("Py_LIMITED_API", f"{STABLE:#010x}")],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
