"""Where things lie on disk: what the package ships, and where a run works."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]  # the folder simple_llama


def root_path(*parts: str) -> str:
    """Absolute path of `parts` below the project's root; of an installed package, below the working folder.

    A wheel has no root of its own: what a run reads and writes by default must not lie in site-packages.
    """
    return str((_PACKAGE.parent if is_checkout() else Path.cwd()).joinpath(*parts))


def package_path(*parts: str) -> str:
    """Absolute path of `parts` below the package itself: data that it ships, links followed.

    `ds_configs` is such a link: a folder of the checkout, and one inside the package in a wheel.
    """
    return str(_PACKAGE.joinpath(*parts).resolve())


def is_checkout() -> bool:
    """Whether the package lies in a checkout of the project."""
    return (_PACKAGE.parent / "pyproject.toml").is_file()
