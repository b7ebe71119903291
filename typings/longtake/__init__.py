"""Type checkers resolve longtake's folders through the links beside this file; at run time nothing reads them."""

from pathlib import Path

__version__: str
source_root: Path | None
