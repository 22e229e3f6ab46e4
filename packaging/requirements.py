"""Print pinned requirements of setup.cfg: `install` for the packages, `dev` for building."""

import configparser
import sys
from pathlib import Path


def requirements(group: str) -> list[str]:
    """Returns the requirements of a group of setup.cfg, in their order."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    section = {"install": ("options", "install_requires")}.get(
        group, ("options.extras_require", group)
    )
    return [line for line in config.get(*section).splitlines() if line and line[0] != "#"]


if __name__ == "__main__":
    print(*(line for group in sys.argv[1:] for line in requirements(group)))  # noqa: T201
