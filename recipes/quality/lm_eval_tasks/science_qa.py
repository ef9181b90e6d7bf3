"""For science_qa.yaml: the questions that a language model without eyes can answer."""

from __future__ import annotations

from typing import Any


def without_pictures(dataset: Any) -> Any:
    """Keep the questions whose field `image` is empty, and drop the field. No picture is decoded."""
    from datasets import Image

    stored = dataset.cast_column("image", Image(decode=False))
    return stored.filter(lambda image: image is None, input_columns="image").remove_columns("image")
