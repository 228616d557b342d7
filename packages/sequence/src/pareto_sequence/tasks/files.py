"""Where published files are looked for; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pareto_core.errors import DataError


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set's files: ``needed`` lie in a directory that ``data``, else ``$variable``, names, or in a subfolder.

    ``folders`` are the subfolders that the published archive makes, as paths from that directory.
    """

    title: str
    variable: str
    folders: tuple[str, ...]
    needed: tuple[str, ...]
    url: str

    def find(self, data: str | None) -> Path:
        """Return the directory that holds every needed file or folder.

        Raises :class:`DataError` that says where it was looked for, what is missing, and where the set comes from.
        """
        given = data or os.environ.get(self.variable)
        if not given:
            raise DataError(f"{self.title}: no directory was given: set data or ${self.variable}; {self._remedy()}")
        places = [Path(given), *(Path(given) / folder for folder in self.folders)]
        for place in places:
            if all((place / name).exists() for name in self.needed):
                return place
        looked = ", ".join(map(str, places))
        missing = next(name for name in self.needed if not (places[0] / name).exists())
        raise DataError(f"{self.title}: {missing} is not in any of {looked}; {self._remedy()}")

    def _remedy(self) -> str:
        return f"get {' and '.join(self.needed)} from {self.url}, unpack, and name the directory"
