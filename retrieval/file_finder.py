"""Search for document files in folders, without those that ``.gitignore`` or an ignore pattern excludes."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from .store.manifest import CURRENT, SHARDS

# Folders of dependencies and build products; a pattern such as "!node_modules/" includes them again.
IGNORED = ("node_modules/", "bower_components/", "__pycache__/", "site-packages/", "*.egg-info/")


def files_of_folder(
    folder: Path, ignore: Iterable[str] = (), on_error: Callable[[OSError], None] | None = None
) -> Iterator[Path]:
    """Iterate over the files of a folder and its subfolders, sorted.

    Hidden files and folders, indexes, and files that are ignored are left out. A ``.gitignore`` has the same effect as
    for Git, also one in a parent folder of the same repository. Links to folders are not followed.

    Args:
        folder: Folder to search.
        ignore: Further patterns in the format of ``.gitignore``, relative to ``folder``; they take precedence.
        on_error: Called with the error of each folder that cannot be read.
    """
    root = folder.absolute()
    patterns = GitIgnoreSpec.from_lines([*IGNORED, *ignore])
    repository = next((p for p in (root, *root.parents) if (p / ".git").exists()), root)
    git_rules = functools.cache(_git_rules)

    def ignored(path: Path, is_folder: bool) -> bool:
        parents = list(path.parents)
        inside = parents[: parents.index(repository) + 1]
        for rules, base in ((patterns, root), *((git_rules(parent), parent) for parent in inside)):
            name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
            included = rules.check_file(name).include  # None if the rules do not mention the path
            if included is not None:
                return included
        return False

    for place, folders, names in os.walk(folder, onerror=on_error):
        here = Path(place)
        if any((here / name).exists() for name in (CURRENT, SHARDS)):
            folders.clear()  # the files of an index are not documents
            continue
        absolute = here.absolute()
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not ignored(absolute / n, True))
        yield from (here / n for n in sorted(names) if not n.startswith(".") and not ignored(absolute / n, False))


def _git_rules(folder: Path) -> GitIgnoreSpec:
    try:
        text = (folder / ".gitignore").read_text(encoding="utf-8", errors="replace")
        return GitIgnoreSpec.from_lines(text.splitlines())
    except (OSError, ValueError):
        return GitIgnoreSpec.from_lines([])
