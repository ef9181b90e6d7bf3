"""Which modules of a backbone an adapter changes, settled before the first of them is replaced."""
