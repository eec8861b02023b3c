"""Build the shared library dsconv_ext/_C.abi3.so; sources, flags and CUDA detection are in dsconv_ext/_build.py."""

import importlib.util

from setuptools import setup

# Loaded by path: importing the package would need the library that is about to be built.
spec = importlib.util.spec_from_file_location("dsconv_build", "dsconv_ext/_build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

setup(**build.setup_arguments())
