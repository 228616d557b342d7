"""Keep ``uv.lock`` free of the index and the machine that it was resolved on.

uv writes the address of the index into every entry of its lock. A lock like that installs only where that
index can be reached, which rules out mirrors and air-gapped machines. Rewritten by `neutralise`, every
registry is the relative name ``index`` and every file is a bare file name; names, versions, markers and
hashes stay, and ``uv lock --check`` and ``uv export --frozen`` read the result as it is.

    python tools/lock.py rewrite uv.lock
    python tools/lock.py check uv.lock
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

NEUTRAL_INDEX = "index"

_REGISTRY = re.compile(r'(\bregistry = )"[^"]*"')
_FILE_ENTRY = re.compile(r'^(sdist = \{ |    \{ )url = "(?:[^"]*/)?([^"/#?]+)[^"/]*"')
_ANY_REGISTRY = re.compile(r'\bregistry = "([^"]*)"')
_LOCAL_FILE = re.compile(r'^(?:sdist = \{ |    \{ )path = "')
_MACHINE_PATH = re.compile(r'"(?:/|~|\\\\|\.\.[/\\]|[A-Za-z]:[/\\]|file:)')
_LOCAL_VERSION = re.compile(r'^version = "[^"]*\+')


def neutralise(text: str) -> str:
    """Return the lock with neutral registries and bare file names; a neutral lock comes back unchanged.

    Only registry sources and the ``sdist`` and ``wheels`` files are rewritten. Sources such as ``git`` and
    ``editable`` are left, so that `problems` can speak up about the ones that name a host.
    """
    lines = []
    for line in text.splitlines(keepends=True):
        line = _REGISTRY.sub(rf'\1"{NEUTRAL_INDEX}"', line)
        lines.append(_FILE_ENTRY.sub(r'\1url = "\2"', line))
    return "".join(lines)


def problems(text: str) -> Iterator[str]:
    """Yield one sentence, with its line number, for each line that ties the lock to a host or a machine."""
    for number, line in enumerate(text.splitlines(), start=1):
        reason = _problem(line)
        if reason:
            yield f"line {number}: {reason}: {line.strip()[:120]}"


def _problem(line: str) -> str | None:
    if "://" in line:
        return "names a host"
    if _MACHINE_PATH.search(line):
        return "names a path outside the project"
    if any(name != NEUTRAL_INDEX for name in _ANY_REGISTRY.findall(line)):
        return f'has a registry other than "{NEUTRAL_INDEX}"'
    if _LOCAL_FILE.match(line):
        return "takes a file from a folder of one machine (find-links?)"
    if _LOCAL_VERSION.match(line):
        return "pins a local version, which only one index serves"
    return None


def main(arguments: list[str]) -> int:
    """Run ``rewrite FILE`` or ``check FILE``; 0 when the lock is neutral, 1 when not, 2 for wrong usage."""
    if len(arguments) != 2 or arguments[0] not in ("rewrite", "check"):
        print("usage: lock.py rewrite|check FILE", file=sys.stderr)
        return 2
    action, path = arguments[0], Path(arguments[1])
    if not path.is_file():
        print(f"{path} is not there; make it with: nox -s lock", file=sys.stderr)
        return 2
    text = path.read_text(encoding="utf-8")
    if action == "rewrite":
        text = neutralise(text)
        path.write_text(text, encoding="utf-8")
    found = list(problems(text))
    for problem in found:
        print(f"{path}: {problem}", file=sys.stderr)
    if found and action == "check":
        print("put it right with: nox -s lock", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
