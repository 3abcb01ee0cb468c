"""Splitting a list of files into training and validation, with no group of files on both sides."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hpm_video.data.manifest import Listing, ManifestError

_LAST_NUMBERS = re.compile(
    r"(?:[ _.-]+(?:c|clip|part|seg|segment|scene|shot)?[ _.-]*\d+)+$", re.IGNORECASE
)
"""What clips that were cut from one video have at the end of their names: ``_c02``, ``-clip7``,
``_000010_000020``."""


def groups_by_name(files: Sequence[str], labels: Sequence[str]) -> list[str] | None:
    """Group files whose names in one folder differ by their last numbers alone.

    None where no class has two groups. Raises ManifestError if some have, and others one of all.
    """
    groups = []
    for file in files:
        folder, _, name = file.rpartition("/")
        stem = name.rpartition(".")[0] or name
        groups.append(f"{folder}/{_LAST_NUMBERS.sub('', stem)}")
    of_class = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        of_class[label].add(group)
    single = sorted(label for label, found in of_class.items() if len(found) == 1)
    if len(single) == len(of_class):
        return None
    if single:
        raise ManifestError(
            f"by their names without the last numbers, all files of {len(single)} of "
            f"{len(of_class)} classes (first {single[0]!r}) were cut from one video, and a video "
            "must not be on both sides. If they were not, give --group none; if they were, name "
            "a column that tells the videos apart: --group COLUMN"
        )
    return groups


def groups_by_column(listing: Listing, column: str) -> list[str]:
    """Read the group of each file from a column, every cell of which must be filled."""
    groups = listing.column(column)
    if "" in groups:
        raise ManifestError(
            f"{listing.source} needs a column {column!r} with the group of every file, but row "
            f"{groups.index('') + 1} has none there; its columns are {[*listing.table]}"
        )
    return groups


def joined_groups(groups: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Make one of groups that share a file of equal content (empty: unknown)."""
    leader, first = dict[str, str](), dict[str, str]()

    def find(group: str) -> str:
        while leader.get(group, group) != group:
            group = leader[group]
        return group

    for group, content in zip(groups, contents, strict=True):
        if content:
            leader[find(group)] = find(first.setdefault(content, group))
    return [find(group) for group in groups]


def choose_validation(
    labels: Sequence[str], groups: Sequence[int | str], share: float, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups for validation, of every class about the same share: -> (files,)

    Groups are taken in random order, by the seed, each where it brings the classes nearer to their
    shares. ``labels`` are all equal where files have no classes; ``share`` is in (0, 0.5]. Raises
    ManifestError if no group is small enough to be taken.
    """
    numbers = np.unique(labels, return_inverse=True)[1]
    total = np.bincount(numbers)
    members = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    taken, chosen = np.zeros_like(total), np.zeros(len(labels), dtype=bool)
    names = [*members]
    for number in np.random.default_rng(seed).permutation(len(names)):
        places = members[names[number]]
        classes, count = np.unique(numbers[places], return_counts=True)
        missing = share * total[classes] - taken[classes]
        is_nearer = (count * (count - 2 * missing)).sum() < 0  # in squared distance
        if is_nearer and (taken[classes] + count < total[classes]).all():  # some remain to train on
            taken[classes] += count
            chosen[places] = True
    if not chosen.any():
        raise ManifestError(
            f"no group of files is small enough for a share of {share:g}: there are {len(members)} "
            f"groups of {len(labels)} files in {len(total)} classes; take a larger --share"
        )
    return chosen
