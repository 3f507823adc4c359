"""``lightning-acu configs``: list the configurations that come with the package, or copy one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..choices import did_you_mean
from ..files import write_whole
from .config_files import with_bases
from .errors import Parser

__all__ = ["configs_directory", "make_parser", "run"]


def configs_directory() -> Path:
    """Where the example configurations are: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.with_name("configs")


def make_parser() -> Parser:
    """The options."""
    parser = Parser("configs", "list the configurations, or copy one")
    parser.add_argument("name", nargs="?", help="name of the one to copy")
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIRECTORY", help="where to copy (default: here)")
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu configs [NAME] [--to DIRECTORY]``."""
    parser = make_parser()
    options = parser.parse_args(words[1:])
    root = configs_directory()
    paths = sorted(root.rglob("*.yaml"), key=lambda path: (len(path.parts), path))  # folders last
    known = {path.relative_to(root).as_posix(): path for path in paths}
    if options.name is None:
        for name, path in known.items():
            print(f"{name:{max(map(len, known))}}  {path.read_text().splitlines()[0].removeprefix('# ')}")
        return
    name = options.name if options.name.endswith(".yaml") else f"{options.name}.yaml"
    if name not in known:
        near = did_you_mean(name, known)
        parser.error(f"there is no configuration {options.name!r}{near or '; choose one of ' + ', '.join(known)}")
    if options.to.exists() and not options.to.is_dir():
        parser.error(f"--to (={options.to}) is a file; give a directory")
    target = options.to / known[name].name
    if _differs(target, known[name]):
        parser.error(f"{target} already exists and differs; remove it or choose another directory with --to")
    sources = with_bases(known[name])  # the bases beside it, where the copy looks for them
    for base in sources[:-1]:
        copy = options.to / base.name
        if _differs(copy, base):
            parser.error(f"{copy} already exists and differs from a base of {name}; choose another directory with --to")
    options.to.mkdir(parents=True, exist_ok=True)
    for source in sources:
        write_whole(options.to / source.name, partial(shutil.copyfile, source))
    print(f"copied to {target}; run: lightning-acu fit --config {target}")


def _differs(copy: Path, source: Path) -> bool:
    """Whether ``copy`` exists and is not a copy of ``source``."""
    return copy.exists() and not (copy.is_file() and copy.read_bytes() == source.read_bytes())
