"""Commands to run from the root of a clone, as modules: training scripts, benchmarks, and the comparison of routers.

    python -m recipes.train.quickstart

README.md in this folder lists them all.
"""
