"""The Python files of a wheel over those that are installed, whose compiled files stay: unpack_python_files.py WHEEL FOLDER NAME

NAME, "package-version", is what Python's metadata then says is installed, besides what it said before.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

wheel, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
with zipfile.ZipFile(wheel) as files:
    files.extractall(folder, [each for each in files.namelist() if each.endswith(".py")])
package, _, version = name.partition("-")
described = folder / f"{name}.dist-info"
described.mkdir(exist_ok=True)
(described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
