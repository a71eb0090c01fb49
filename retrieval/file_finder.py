"""Search for document files in folders, without those that ``.gitignore`` or an ignore pattern excludes."""

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from .store.manifest import CURRENT, SHARDS

# Folders of dependencies and build products; a pattern such as "!node_modules/" includes them again.
IGNORED = ("node_modules/", "bower_components/", "__pycache__/", "site-packages/", "*.egg-info/")


def files_of_folder(folder: Path, ignore: Iterable[str] = ()) -> Iterator[Path]:
    """Iterate over the files of a folder and its subfolders, sorted.

    Hidden files and folders, indexes, and files that are ignored are left out. A ``.gitignore`` has the same effect as
    for Git, also one in a parent folder of the same repository.

    Args:
        folder: Folder to search.
        ignore: Further patterns in the format of ``.gitignore``, relative to ``folder``; they take precedence.
    """
    patterns = GitIgnoreSpec.from_lines([*IGNORED, *ignore])
    parents = [folder.absolute(), *folder.absolute().parents]
    repository = next((p for p in parents if (p / ".git").exists()), parents[0])

    def ignored(path: Path, is_folder: bool) -> bool:
        included = _included(patterns, path, folder, is_folder)
        if included is not None:
            return included
        absolute = path.absolute()
        for parent in absolute.parents:
            if (rules := _git_rules(parent)) is not None:
                included = _included(rules, absolute, parent, is_folder)
                if included is not None:
                    return included
            if parent == repository:
                break
        return False

    for place, folders, names in os.walk(folder):
        here = Path(place)
        if any((here / name).exists() for name in (CURRENT, SHARDS)):
            folders.clear()  # the files of an index are not documents
            continue
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not ignored(here / n, True))
        yield from (here / n for n in sorted(names) if not n.startswith(".") and not ignored(here / n, False))


def _included(rules: GitIgnoreSpec, path: Path, base: Path, is_folder: bool) -> bool | None:
    """Return whether rules ignore a path (True), include it again (False), or do not mention it (None)."""
    return rules.check_file(path.relative_to(base).as_posix() + ("/" if is_folder else "")).include


@functools.lru_cache(1024)
def _git_rules(folder: Path) -> GitIgnoreSpec | None:
    try:
        return GitIgnoreSpec.from_lines(
            (folder / ".gitignore").read_text(encoding="utf-8", errors="replace").splitlines()
        )
    except (OSError, ValueError):
        return None
