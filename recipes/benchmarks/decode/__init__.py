"""What a routed adapter costs at decode time, on a GPU: `python -m recipes.benchmarks.decode --help`."""
