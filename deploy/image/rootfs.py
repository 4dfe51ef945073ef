"""Collect what the exporter needs to run, and nothing else, into an empty root for a `FROM scratch` image.

usage: rootfs.py VENV TARGET

That is: the interpreter, its standard library, the virtual environment, the shared libraries they load, a user.
No shell, no package manager, no compiler gets in, because nothing is taken out: only what is named here is put in.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

UNUSED = ("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "site-packages")
UNUSED_PATTERNS = ("__pycache__", "config-*", "_tkinter.*", "_test*.so", "_ctypes_test.*", "xx*.so", "*.a")
SOURCES = ("bin", "include", "__pycache__", "*.pyi", "*.pyx", "*.pxd", "*.h", "*.c")
USER = 65532


def libraries(binary: pathlib.Path) -> set[pathlib.Path]:
    """The shared libraries that the dynamic loader finds for `binary`, the loader itself among them."""
    listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    if "not found" in listed:
        sys.exit(f"{binary} needs a library that is not here:\n{listed}")
    return {pathlib.Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}


def put(target: pathlib.Path, path: pathlib.Path) -> None:
    """Copy the file behind `path`, links followed, to the same place below `target`."""
    there = target / path.relative_to("/")
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, there)


def write(target: pathlib.Path, path: str, text: str) -> None:
    there = target / path
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_text(text)


def main() -> None:
    venv, target = (pathlib.Path(argument) for argument in sys.argv[1:])
    interpreter = pathlib.Path(sys.executable).resolve()
    stdlib = pathlib.Path(sysconfig.get_path("stdlib")).resolve()

    put(target, interpreter)
    shutil.copytree(
        stdlib,
        target / stdlib.relative_to("/"),
        ignore=lambda folder, names: {
            *shutil.ignore_patterns(*UNUSED_PATTERNS)(folder, names),
            *(name for name in names if name in UNUSED and pathlib.Path(folder) == stdlib),
        },
    )
    # Of bin/ only the interpreter, as a link to the real one, and our command.
    copy = target / venv.relative_to("/")
    shutil.copytree(venv, copy, symlinks=True, ignore=shutil.ignore_patterns(*SOURCES))
    (copy / "bin").mkdir()
    (copy / "bin/python").symlink_to(interpreter)
    shutil.copy2(venv / "bin/blueking-exporter", copy / "bin")

    binaries = [interpreter, *target.rglob("*.so"), *target.rglob("*.so.*")]
    needed = set().union(*map(libraries, binaries))
    # glibc loads this one by itself when a thread ends.
    needed |= set(pathlib.Path("/").glob("lib/*/libgcc_s.so.1"))
    for library in sorted(needed):
        if not library.is_relative_to(target):
            put(target, library)
    put(target, pathlib.Path("/etc/ld.so.cache"))

    write(target, "etc/passwd", f"root:x:0:0::/:\nexporter:x:{USER}:{USER}::/var/lib/blueking-exporter:\n")
    write(target, "etc/group", f"root:x:0:\nexporter:x:{USER}:\n")
    write(target, "etc/nsswitch.conf", "hosts: files dns\n")
    (target / "etc/blueking-exporter").mkdir()
    (target / "var/lib").mkdir(parents=True)
    (target / "tmp").mkdir()
    (target / "tmp").chmod(0o1777)

    # The root is read-only at run time, so the byte code has to be there already.
    compiled = [sys.executable, "-m", "compileall", "-q", "-s", str(target), "-p", "/", "--invalidation-mode"]
    subprocess.run([*compiled, "unchecked-hash", target / stdlib.relative_to("/"), copy], check=True)
    size = sum(file.lstat().st_size for file in target.rglob("*"))
    print(f"{len(needed)} shared libraries, {size / 1e6:.0f} MB below {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
