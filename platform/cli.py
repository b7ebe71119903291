"""The `longtake` command: lists the jobs, and runs one as its script would be run; and the server.

longtake search-refine --preset tiny    is    python jobs/search_refine.py --preset tiny
longtake serve                          is    python -m longtake.serve
"""

from __future__ import annotations

import ast
import difflib
import importlib
import runpy
import sys
from pathlib import Path

import longtake


def jobs() -> dict[str, Path]:
    """The jobs' scripts by the name that the command gives them, in alphabetical order."""
    folders = importlib.import_module("longtake.jobs").__path__
    scripts = sorted(path for folder in folders for path in Path(folder).glob("[!_]*.py"))
    found = {path.stem.replace("_", "-"): path for path in scripts}
    (server,) = importlib.import_module("longtake.serve").__path__
    return found | {"serve": Path(server) / "__main__.py"}


def description(script: Path) -> str:
    """First line of the script's docstring; the script is parsed, not imported, so that listing stays fast."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; ends with status 2 when there is no such job."""
    arguments = sys.argv[1:] if argv is None else argv
    known = jobs()
    if not arguments or arguments[0] in ("-h", "--help"):
        _list(known)
    elif arguments[0] == "--version":
        print(f"longtake {longtake.__version__}")
    elif script := known.get(arguments[0].replace("_", "-")):
        sys.argv = [str(script), *arguments[1:]]
        runpy.run_path(str(script), run_name="__main__")
    else:
        near = difflib.get_close_matches(arguments[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`longtake` lists them"
        print(f"error: no job is called {arguments[0]!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def _list(known: dict[str, Path]) -> None:
    print("usage: longtake JOB [--help | OPTIONS]\n")
    width = max(map(len, known), default=0)
    for name, script in known.items():
        print(f"  {name:{width}}  {description(script)}")


if __name__ == "__main__":
    main()
