"""A data set made quick to read: what is done of it, what is still to do, and its manifest.

A folder of prepared data holds
    manifest.csv        of each file where it lies, its label, and what it has: train on this
    failed.csv          files of which nothing could be made, and why
    settings.json       how it was made: a folder never mixes two settings
    journal.jsonl       what is done, a line each; a second start goes on from there
and, by what was asked for,
    videos/NAME.mp4     or for an image images/NAME.jpg
    frames/NAME/        a folder of 000000.jpg, 000001.jpg ...
    shard-000000.tar    and so on; the samples lie in the order of the manifest
Each output is whole or absent.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from typing_extensions import Self

from hpm_video.data.manifest import Listing, Manifest
from hpm_video.decoding.locations import TarMember, is_frame_folder
from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import stamp_of
from hpm_video.preparation.findings import COLUMNS as OF_A_CHECK
from hpm_video.preparation.jobs import Journal, claim, remove, write_failures, write_table
from hpm_video.preparation.shards import Packable, Packed, Shard, output_names, suffix_of
from hpm_video.preparation.transcode import Job, Made, Recipe

COLUMNS = (
    "path",
    "label",
    "label_name",
    "num_frames",
    "width",
    "height",
    "fps",
    "key_frame_distance",
)
STALE = {*COLUMNS, *OF_A_CHECK}
"""Columns that say of a source what is not true of what is made of it."""
UNRELATED = ("hpm_video",)
"""Settings that are noted, but in which the starts of one folder may differ."""
TRIED_SECONDS = 20.0
"""Of a file that an estimate is made from."""
HEADERS = 3 * 1024
"""Bytes that a sample takes in a tar besides its own, about."""


@dataclass(frozen=True)
class Rows:
    """What a manifest says of files, row by row."""

    manifest: Manifest
    others: Mapping[str, Sequence[str]]
    """Its columns that nothing here knows: they are true of what is made of a file as well."""
    rates: Sequence[str] = ()
    """Frames a second of each file, as the list says it; empty where it does not."""

    @classmethod
    def of(cls, manifest: Manifest, listing: Listing) -> "Rows":
        """Of a manifest, and the list that it was read from."""
        kept = [row for row, told in enumerate(listing.column("verdict")) if told != "bad"]
        cells = {name: listing.column(name) for name in (*listing.table.columns, "fps")}
        cells = {name: [column[row] for row in kept] for name, column in cells.items()}
        others = {name: column for name, column in cells.items() if name not in STALE}
        return cls(manifest, others, cells["fps"])

    def label(self, row: int) -> tuple[int, str]:
        """The class of a row and its name: -1 where it has none, and an empty name."""
        names, label = self.manifest.label_names or (), self.manifest.labels[row]
        return label, names[label] if 0 <= label < len(names) else ""


class PreparedFolder:
    """A folder that outputs are written to, and what is known of them."""

    def __init__(self, path: Path, recipe: Recipe, rows: Rows, base: Path) -> None:
        """``base``: outputs are named by the paths of sources from there on."""
        self.path = path.absolute()
        self.recipe = recipe
        self.rows = rows
        self.made: dict[str, Made] = {}
        """Of each place."""
        self.failures: dict[str, Failure] = {}
        """Places of which nothing could be made."""
        self.changed = 0
        """Files that were done before, and whose source or label has changed since."""
        self._base = str(base)
        self._names = output_names(
            rows.manifest.files,
            self._base,
            dots=recipe.form != "shards",
            nests=recipe.form != "frames",
        )
        self._of_name = {name: place for place, name in self._names.items()}
        self._row = {place: row for row, place in reversed([*enumerate(rows.manifest.files)])}
        self._shards: dict[str, dict[str, Any]] = {}
        """Those that are there, as the journal has them. One that is outdated holds something that
        is no longer true: what is good in it is packed anew, and then it is deleted."""
        self._packed: dict[str, tuple[str, Packed]] = {}
        """Of each place its shard, which may be outdated, and where it lies in there."""
        self._journal: Journal | None = None
        self._unfinished = self.path / ".unfinished"
        self._parts = self.path / ".parts"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let others write to the folder."""
        if self._journal is not None:
            with contextlib.suppress(OSError):  # it is empty, unless this run was stopped
                self._unfinished.rmdir()
            self._journal.close()

    # --- What is there -----------------------------------------------------------------------

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder one of these settings, and find out what is done already.

        Raises:
            FileExistsError: it holds something else.
            BlockingIOError: another program is at it.
        """
        self._journal = claim(self.path, settings, holds="prepared data", unrelated=UNRELATED)
        remove(str(self._unfinished))
        self._unfinished.mkdir()
        for record in self._journal.read():
            if shard := Path(record.get("shard", "")).name:
                path = self.path / shard
                if path.is_file() and path.stat().st_size == record["bytes"]:
                    self._shards[shard] = record
            elif record.get("name") and self._names.get(record["place"]) == record["name"]:
                known = {
                    each.name: record[each.name] for each in fields(Made) if each.name in record
                }
                self.made[record["place"]] = Made(**known)
        for name, record in self._shards.items():
            for place, *where in record["members"]:
                if place in self._names:
                    self._packed[place] = name, Packed(*where)
        self._drop_what_changed()

    def _drop_what_changed(self) -> None:
        """Forget what is no longer true, or no longer there."""
        changed = {place for place in self.made if self._has_changed(place)}
        relabelled = {
            place
            for name, record in self._shards.items()
            for (place, *_), told in zip(record["members"], record.get("labels", ()), strict=False)
            if self._shard_of(place) == name and (*told,) != self.rows.label(self._row[place])
        }
        self.changed = len(changed | relabelled)
        self.made = {place: made for place, made in self.made.items() if place not in changed}
        for name, record in [*self._shards.items()]:
            known = [member for member in record["members"] if member[0] in self._names]
            good = [m for m in known if m[0] in self.made and self._shard_of(m[0]) == name]
            is_new = {member[0] for member in known}.isdisjoint(relabelled)
            if len(good) < len(known) or not is_new or record.get("outdated"):
                # It is packed anew, with the members that are good in it.
                outdated = {"shard": name, "bytes": record["bytes"], "members": good}
                outdated["outdated"] = True
                if outdated != record:
                    self._note(outdated)
                    self._shards[name] = outdated
        self._packed = {p: where for p, where in self._packed.items() if p in self.made}
        self.made = {place: made for place, made in self.made.items() if self._is_there(place)}

    def _has_changed(self, place: str) -> bool:
        """Whether a source is another one since. One that is gone may have been deleted."""
        made = self.made[place]
        try:
            stamp = stamp_of(place)
        except OSError:
            return False
        noted = made.source_modified or stamp.modified  # older journals lack it
        return (made.source_bytes, noted) != (stamp.bytes, stamp.modified)

    def _is_there(self, place: str) -> bool:
        """Whether the output of a place, which was found good once, is still there and whole.

        Of a folder of frames only how many there are is looked at: there may be many millions.
        """
        if place in self._packed:
            return True
        try:
            if not self.recipe.copy and is_frame_folder(self._output(place)):
                with os.scandir(self._output(place)) as entries:
                    frames = sum(entry.name.endswith(".jpg") for entry in entries)
                return frames == self.made[place].num_frames
            now = stamp_of(place if self.recipe.copy else self._output(place))
        except OSError:
            return False
        return now.bytes == self.made[place].bytes

    def missing(self) -> list[str]:
        """Places of which nothing is made yet, each once, in the order of the manifest."""
        for place, name in self._names.items():
            if name is None:
                self.fail(place, "its name holds control characters; rename the file")
            elif self.recipe.copy and is_frame_folder(place):
                self.fail(place, "a folder of frames cannot be packed as it is; leave out --copy")
        return [p for p in self._names if p not in self.made and p not in self.failures]

    def __len__(self) -> int:
        """Files that are done, of which some may still have to be packed."""
        return len(self.made)

    @property
    def num_places(self) -> int:
        """Different files of the manifest."""
        return len(self._names)

    # --- Work --------------------------------------------------------------------------------

    def job(self, place: str, trial: Path | None = None) -> Job:
        """Describe how to make an output; as a ``trial``, of its first seconds in that folder."""
        name = f"{self._row[place]}{self.recipe.suffix(place)}"
        stated = self._stated(place)
        if trial is not None:
            beside, target = f"{trial}/beside-{name}", f"{trial}/{name}"
            return Job(place, beside, target, **stated, cut=TRIED_SECONDS)
        return Job(place, f"{self._unfinished}/{name}", self._output(place), **stated)

    def note(self, place: str, made: Made) -> None:
        """Take in what was made."""
        self.made[place] = made
        self._note({"place": place, "name": self._names[place], **asdict(made)})

    def fail(self, place: str, reason: str) -> None:
        """Take in that nothing can be made."""
        self.failures[place] = Failure(place, reason)

    def unpacked_shards(self) -> list[Shard]:
        """The shards that are still to be written, each as full as it may be."""
        shards: list[list[Packable]] = []
        room = 0
        for place in self._names:
            if place not in self.made or self._is_packed(place):
                continue
            taken = self.made[place].bytes + HEADERS
            if not shards or taken > room:
                shards.append([])
                room = self.recipe.shard_bytes
            shards[-1].append(self._packable(place))
            room -= taken
        first = max((int(name[6:12]) + 1 for name in self._shards), default=0)
        names = [f"shard-{first + i:06d}.tar" for i in range(len(shards))]
        return [
            Shard(f"{self._unfinished}/{name}", f"{self.path}/{name}", tuple(samples))
            for name, samples in zip(names, shards, strict=True)
        ]

    def note_shard(self, shard: Shard, packed: Sequence[Packed]) -> None:
        """Take in a shard, and delete what it was made of."""
        name = Path(shard.target).name
        places = [self._of_name[sample.key] for sample in shard.samples]
        self._packed |= {place: (name, where) for place, where in zip(places, packed, strict=True)}
        self._shards[name] = {
            "shard": name,
            "bytes": Path(shard.target).stat().st_size,
            "members": [[place, *where] for place, where in zip(places, packed, strict=True)],
            "labels": [self.rows.label(self._row[place]) for place in places],
        }
        self._note(self._shards[name])
        if not self.recipe.copy:
            for place in places:
                remove(self._output(place))

    def write_lists(self) -> None:
        """Write ``manifest.csv`` in the order of the source, and ``failed.csv``."""
        there = [row for row, place in enumerate(self.rows.manifest.files) if self._place_of(place)]
        header = [*COLUMNS, *self.rows.others]
        write_table(self.path / "manifest.csv", header, map(self._cells, there))
        write_failures(self.path / "failed.csv", [*self.failures.values()])
        if self._shards and all(map(self._is_packed, self.made)):
            remove(str(self._parts))
            for name, record in self._shards.items():
                if record.get("outdated"):
                    remove(str(self.path / name))

    # --- Inside ------------------------------------------------------------------------------

    def _note(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None, "the folder is claimed before anything is written to it"
        self._journal.append(record)

    def _shard_of(self, place: str) -> str:
        return self._packed[place][0] if place in self._packed else ""

    def _is_packed(self, place: str) -> bool:
        return place in self._packed and not self._shards[self._shard_of(place)].get("outdated")

    def _output(self, place: str) -> str:
        suffix = self.recipe.suffix(place)
        folder = {".jpg": "images", ".mp4": "videos", "/": "frames"}[suffix]
        root = self._parts if self.recipe.form == "shards" else self.path / folder
        return f"{root}/{self._names[place]}{suffix}"

    def _place_of(self, place: str) -> str | None:
        """Where a manifest finds what was made, from the folder on; none where it is not there."""
        if place not in self.made:
            return None
        if self.recipe.form != "shards":
            return self._output(place).removeprefix(f"{self.path}/")
        shard, where = self._packed.get(place, ("", None))
        return str(TarMember(shard, *where)) if where and self._is_packed(place) else None

    def _cells(self, row: int) -> list[object]:
        place = self.rows.manifest.files[row]
        (label, name), made = self.rows.label(row), self.made[place]
        return [
            self._place_of(place),
            label if label >= 0 else "",
            name,
            made.num_frames,
            made.width,
            made.height,
            f"{made.fps:.4f}".rstrip("0").rstrip(".") if made.fps else "",
            made.key_frame_distance,
            *(column[row] for column in self.rows.others.values()),
        ]

    def _stated(self, place: str) -> dict[str, Any]:
        """What the manifest says of a source."""
        count = self.rows.manifest.num_frames[self._row[place]]
        stated: dict[str, Any] = {"num_frames": count} if count > 0 else {}
        with contextlib.suppress(ValueError, ZeroDivisionError):
            rate = Fraction(self.rows.rates[self._row[place]] if self.rows.rates else "")
            if 0 < rate < 1000:
                stated["fps"] = rate.limit_denominator(SIMPLEST)
        return stated

    def _packable(self, place: str) -> Packable:
        label, name = self.rows.label(self._row[place])
        info: dict[str, Any] = {
            "num_frames": self.made[place].num_frames,
            "source": place.removeprefix(self._base.rstrip("/") + "/"),
        }
        info |= {"label": label} if label >= 0 else {}
        info |= {"label_name": name} if name else {}
        suffix, lies = self.recipe.suffix(place), self._output(place)
        if self.recipe.copy:
            suffix, lies = suffix_of(place), place
        if place in self._packed:
            shard, where = self._packed[place]
            lies = str(TarMember(str(self.path / shard), *where))
        return Packable(str(self._names[place]), lies, suffix, label, info)
