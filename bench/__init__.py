"""Benchmarks of dsconv_ext: ``python -m bench --help``. Runs from a clone; not part of the wheel."""
