"""Namespaces of PyTorch ops (`torch.ops.<name>`)."""

from __future__ import annotations

import torch


def only_library(name: str) -> torch.library.Library:
    """The library that defines the namespace `name`.

    PyTorch lets a namespace be defined once in a process. After a re-import of this package (importlib.reload, a purged
    sys.modules) the new ops take the place of the old ones.
    """
    namespace = getattr(torch.ops, name)
    before = vars(namespace).get("defined_by")
    if before is not None:
        before._destroy()
    made = torch.library.Library(name, "DEF")
    namespace.defined_by = made
    return made
