"""The package's imports, read from the code itself: what imports what, in rows from the top down, and any circles.

    python docs/structure.py                      # the rows and the circles, as text
    python docs/structure.py --picture out.png    # the same as a picture
    python docs/structure.py --check              # exit with 1 if there is a circle
    python docs/structure.py --commit 83cd0d3     # of an earlier commit

An import counts wherever it stands: at the top of a file, under `TYPE_CHECKING` or inside a function. The last two hide a circle
from Python, not from a reader, and are drawn dashed.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peft_loraswitch"
Imports = dict[str, dict[str, bool]]  # importer -> imported -> whether any such import stands at the top of the file


def module_name(path: Path, package: Path) -> str:
    """ "inference/fuse.py" -> "inference.fuse"; a folder's __init__.py has the folder's name, the package's own is "__init__"."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(node: ast.ImportFrom, importer: list[str], package: str, files: Collection[str]) -> Iterator[str]:
    """The files that one `from ... import ...` reads: a name may be a file of its own, or stand in the file before it."""
    module = node.module.split(".") if node.module else []
    if node.level:
        base = importer[: len(importer) - node.level] + module
    elif module[:1] == [package]:
        base = module[1:]
    else:
        return
    for alias in node.names:
        for name in (".".join([*base, alias.name]), ".".join(base)):
            if name in files:
                yield name
                break


def _code(path: Path) -> bool:
    """Whether there is more in a folder's __init__.py than a text."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


@contextmanager
def package_at(commit: str) -> Iterator[Path]:
    """The package as it was at an earlier commit, in a folder that is gone afterwards."""
    archive = subprocess.run(["git", "archive", commit, PACKAGE.name], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(
            f"--commit {commit}: {archive.stderr.decode().strip()} (a shallow clone? git fetch --unshallow)"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "package.tar"
        path.write_bytes(archive.stdout)
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder) / PACKAGE.name


def read_imports(package: Path = PACKAGE) -> Imports:
    paths = [
        path
        for path in sorted(package.rglob("*.py"))
        if path.parent == package or path.name != "__init__.py" or _code(path)
    ]
    files = {module_name(path, package): path for path in paths}
    imports: Imports = {name: {} for name in files}
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        folder = path.parent.relative_to(package).parts
        importer = [*folder, path.stem]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for target in imported(node, importer, package.name, files):
                    if target != name:
                        imports[name][target] = imports[name].get(target, False) or id(node) in top
    return imports


def circles(imports: Imports) -> list[list[str]]:
    """Groups of files that import each other, however far around (strongly connected components of more than one)."""
    reach: dict[str, set[str]] = {}
    for name in imports:
        seen, waiting = set(), list(imports[name])
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                waiting += imports[each]
        reach[name] = seen
    found = {
        tuple(sorted({name, *(o for o in reach[name] if name in reach[o])})) for name in imports if name in reach[name]
    }
    return sorted(map(list, found))


def rows(imports: Imports) -> list[list[str]]:
    """The files in rows: each stands below all that import it. Files of one circle stand in one row."""
    together = {name: tuple(group) for group in circles(imports) for name in group}
    depth = dict.fromkeys(imports, 0)
    for _ in imports:  # longest path, by as many rounds as it can have steps
        for name, targets in imports.items():
            for target in targets:
                if together.get(name, name) != together.get(target, target):
                    depth[target] = max(depth[target], depth[name] + 1)
        for group in set(together.values()):
            for name in group:
                depth[name] = max(depth[each] for each in group)
    return [sorted(name for name, d in depth.items() if d == row) for row in range(max(depth.values()) + 1)]


def ordered(table: list[list[str]], imports: Imports) -> list[list[str]]:
    """Each row in an order in which a file stands below the middle of those that import it, files of a folder side by side."""
    place: dict[str, float] = {}
    result = []
    for row in table:
        above = {n: [place[i] for i, targets in imports.items() if n in targets and i in place] for n in row}
        middle = {n: sum(above[n]) / len(above[n]) if above[n] else 0.5 for n in row}
        folders: dict[str, list[float]] = {}
        for name in row:
            folders.setdefault(name.rpartition(".")[0], []).append(middle[name])
        row = sorted(
            row, key=lambda n: (sum(f := folders[n.rpartition(".")[0]]) / len(f), n.rpartition(".")[0], middle[n])
        )
        place.update({name: (column + 0.5) / len(row) for column, name in enumerate(row)})
        result.append(row)
    return result


def draw(imports: Imports, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    table = ordered(rows(imports), imports)
    widest = max(map(len, table))
    place = {
        name: ((column + 0.5) * widest / len(row), -index)
        for index, row in enumerate(table)
        for column, name in enumerate(row)
    }
    in_circle = {name: tuple(group) for group in circles(imports) for name in group}
    folders = sorted({name.rpartition(".")[0] for name in imports})
    colors = dict(
        zip(folders, ["#eeeeee", *plt.get_cmap("Pastel1").colors, *plt.get_cmap("Pastel2").colors], strict=False)
    )
    figure, axes = plt.subplots(figsize=(1.25 * widest + 1, 1.05 * len(table) + 1))
    for name, targets in imports.items():
        for target, at_top in targets.items():
            circle = in_circle.get(name) is not None and in_circle.get(name) == in_circle.get(target)
            axes.annotate(
                "", xy=place[target], xytext=place[name],
                arrowprops={
                    "arrowstyle": "-|>", "color": "#c22" if circle else "#b8c4d0", "lw": 1.4 if circle else 0.7,
                    "linestyle": "-" if at_top else "--", "shrinkA": 12, "shrinkB": 12, "connectionstyle": "arc3,rad=0.06",
                },
            )  # fmt: skip
    for name, (x, y) in place.items():
        folder, _, file = name.rpartition(".")
        box = {"boxstyle": "round", "fc": colors[folder], "ec": "#c22" if name in in_circle else "#667"}
        label = f"{folder}/\n{file}" if folder else file
        axes.text(
            x,
            y,
            label.replace("_", "_\n", 1) if len(file) > 15 else label,
            ha="center",
            va="center",
            fontsize=7.5,
            bbox=box,
        )
    axes.set_xlim(0, widest)
    axes.set_ylim(-len(table) + 0.4, 0.6)
    axes.axis("off")
    axes.set_title(
        "Each file stands below those that import it. Red: a circle. Dashed: not at the top of the file. Colour: folder.",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    with Image.open(path) as picture:  # arrows in full colour would be a file of megabytes
        picture.convert("RGB").quantize(48).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=PACKAGE, help="folder of the package to read")
    parser.add_argument("--commit", help="read the package as it was at this commit")
    parser.add_argument("--picture", metavar="FILE", help="draw the imports into this file (PNG or SVG)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if there is a circle")
    arguments = parser.parse_args()
    if arguments.commit:
        with package_at(arguments.commit) as package:
            imports = read_imports(package)
    else:
        imports = read_imports(arguments.package)
    for row in rows(imports):
        print("  ".join(row))
    found = circles(imports)
    for group in found:
        print(f"circle: {', '.join(group)}")
    if arguments.picture:
        draw(imports, arguments.picture)
    return 1 if arguments.check and found else 0


if __name__ == "__main__":
    raise SystemExit(main())
