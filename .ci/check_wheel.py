"""Checks the wheel in a folder: its tag, what is in it, and that it packs with its native library once installed.

Usage: ``python .ci/check_wheel.py dist``, with the Python of an environment that has the dependencies.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

PROGRAM = """
import torch
from compressed_format import bitpack, ops

info = ops.backend_info()
assert ops.native_library() is not None, info
codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 5)[:, :77]
assert torch.equal(ops.pack_codes(codes, 4), bitpack.pack_codes(codes, 4))
print("packs with", info["libraries"]["cpu"]["path"])
"""


def check_contents(wheel: Path) -> None:
    assert re.fullmatch(r"compressed_format-[^-]+-py3-none-(?!any)\w+\.whl", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sum(bool(re.fullmatch(r"compressed_format/lib\w+\.(so|dll)", name)) for name in names) == 1, names
    assert "compressed_format/py.typed" in names
    page = {f"compressed_format/inspection/report.{kind}" for kind in ("html", "css", "js")}
    assert page <= set(names), names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    # Neither sources nor tests nor anything else that lies in the tree: one package, and what describes it.
    strangers = [name for name in names if not re.match(r"compressed_format(-[^/]+\.dist-info)?/", name)]
    known = r"\.(py|so|dll)$|/py\.typed$|\.dist-info/"
    strangers += [name for name in names if name not in page and not re.search(known, name)]
    assert not strangers, strangers


def check_installed(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        variables = {"base": folder, "platbase": folder}
        site = Path(sysconfig.get_path("purelib", "venv", variables))
        python = Path(sysconfig.get_path("scripts", "venv", variables)) / "python"
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
        # The dependencies are borrowed. A path in a .pth file is not searched for further .pth files, so this does
        # not borrow the editable install of the project along with them.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        output = subprocess.run(
            [python, "-I", "-c", PROGRAM], check=True, cwd=folder, stdout=subprocess.PIPE, text=True
        )
        assert folder in output.stdout, output.stdout


if __name__ == "__main__":
    (found,) = Path(sys.argv[1]).glob("*.whl")
    check_contents(found)
    check_installed(found)
    print(f"{found.name}: tag, contents and native library are right")
