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
import csv
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import IO, Any

from typing_extensions import Self

from hpm_video.data.manifest import Listing, Manifest
from hpm_video.decoding.locations import TarMember, is_frame_folder
from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.atomic import written_beside
from hpm_video.files.settings import check_settings
from hpm_video.preparation.check import stamp_of
from hpm_video.preparation.shards import Packable, Packed, output_names, suffix_of
from hpm_video.preparation.transcode import (
    Broken,
    Failed,
    Job,
    Made,
    Recipe,
    Shard,
    Step,
    bytes_of,
    remove,
)
from hpm_video.workers.pool import Lost, Pool

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
STALE = {
    *COLUMNS,
    "duration",
    "codec",
    "pixel_format",
    "rotation",
    "bytes",
    "modified",
    "content",
    "decoder",
    "verdict",
    "reason",
}
"""Columns that say of a source what is not true of what is made of it."""
UNRELATED = ("hpm_video",)
"""Settings that are noted, but in which the starts of one folder may differ."""
TRIED = 8
"""Files that an estimate is made from, at most; of few files a tenth."""
TRIED_SECONDS = 20.0
"""Of each of them."""
HEADERS = 3 * 1024
"""Bytes that a sample takes in a tar besides its own, about."""
_TEXT: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


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
        verdicts = listing.column("verdict")
        kept = [row for row, verdict in enumerate(verdicts) if verdict != "bad"]

        def cells(name: str) -> list[str]:
            column = listing.column(name)
            return [column[row] for row in kept]

        others = [name for name in listing.table.columns if name not in STALE]
        return cls(manifest, {name: cells(name) for name in others}, cells("fps"))

    def label_name(self, row: int) -> str:
        """Of the class of a row; empty where it has none."""
        names, label = self.manifest.label_names or (), self.manifest.labels[row]
        return names[label] if 0 <= label < len(names) else ""


@dataclass
class _State:
    """What is done."""

    made: dict[str, Made] = field(default_factory=dict)
    """Of each place."""
    packed: dict[str, tuple[str, Packed]] = field(default_factory=dict)
    """Of each place its shard, and where it lies in there."""
    failed: dict[str, str] = field(default_factory=dict)
    """Of each place why."""
    shards: int = 0
    """One more than the highest number of a shard."""
    outdated: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Shards that hold something that is no longer true, as the journal has them. What is good in
    them is packed anew, and then they are deleted."""
    repacked: dict[str, str] = field(default_factory=dict)
    """Of each place that is good in an outdated shard, the member that it is there."""


class PreparedFolder:
    """A folder that outputs are written to, and what is known of them."""

    def __init__(self, path: Path, recipe: Recipe, rows: Rows, base: Path) -> None:
        """``base``: outputs are named by the paths of sources from there on."""
        self.path = path.absolute()
        self.recipe = recipe
        self.rows = rows
        self._base = str(base)
        self._names = output_names(
            rows.manifest.files,
            self._base,
            dots=recipe.form != "shards",
            nests=recipe.form != "frames",
        )
        self._of_name = {name: place for place, name in self._names.items()}
        self._row = {place: row for row, place in reversed([*enumerate(rows.manifest.files)])}
        self._state = _State()
        self.changed = 0
        """Files that were done before, and whose source or label has changed since."""
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # it is empty, unless this run was stopped
                self._unfinished.rmdir()
            self._lock.close()

    # --- What is there -----------------------------------------------------------------------

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder one of these settings, and find out what is done already.

        Raises:
            FileExistsError: it holds something else.
            BlockingIOError: another program is at it.
        """
        check_settings(self.path, settings, holds="prepared data", unrelated=UNRELATED)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BlockingIOError(f"another program writes to {self.path}; let it end") from error
        with written_beside(self.path / "settings.json") as path:
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        remove(str(self._unfinished))
        self._unfinished.mkdir()
        self._read_journal()
        with written_beside(self._journal) as path, path.open("w", encoding="utf-8") as file:
            file.writelines(self._lines())

    def missing(self) -> list[str]:
        """Places of which nothing is made yet, each once, in the order of the manifest."""
        done = self._state.made.keys() | self._state.failed.keys()
        unsafe = [place for place, name in self._names.items() if name is None]
        self._state.failed |= dict.fromkeys(
            unsafe, "its name holds control characters; rename the file"
        )
        refused = dict.fromkeys(filter(is_frame_folder, self._names)) if self.recipe.copy else {}
        for place in refused:
            self._state.failed[place] = (
                "a folder of frames cannot be packed as it is; leave out --copy"
            )
        return [p for p in self._names if p not in done and p not in self._state.failed]

    def __len__(self) -> int:
        """Files that are done, of which some may still have to be packed."""
        return len(self._state.made)

    @property
    def num_places(self) -> int:
        """Different files of the manifest."""
        return len(self._names)

    @property
    def made(self) -> Mapping[str, Made]:
        """What was made of each place."""
        return self._state.made

    @property
    def failed(self) -> Mapping[str, str]:
        """Places of which nothing could be made, and why."""
        return self._state.failed

    # --- Work --------------------------------------------------------------------------------

    def job(self, place: str) -> Job:
        """What to do to make an output."""
        suffix = self.recipe.suffix(place)
        number = self._row[place]
        return Job(
            place,
            beside=f"{self._unfinished}/{number}{suffix}",
            target=self._output(place),
            **self._stated(place),
        )

    def trial(self, place: str, folder: Path) -> Job:
        """The same for its first seconds, in another folder."""
        name = f"{self._row[place]}{self.recipe.suffix(place)}"
        return Job(
            place,
            beside=f"{folder}/beside-{name}",
            target=f"{folder}/{name}",
            **self._stated(place),
            cut=TRIED_SECONDS,
        )

    def note(self, place: str, made: Made) -> None:
        """Take in what was made."""
        self._state.made[place] = made
        self._append(self._line(place))

    def fail(self, place: str, reason: str) -> None:
        """Take in that nothing can be made."""
        self._state.failed[place] = reason

    def unpacked_shards(self) -> list[Shard]:
        """The shards that are still to be written, each as full as it may be."""
        shards: list[list[Packable]] = []
        room = 0
        for place in self._names:
            if place not in self._state.made or place in self._state.packed:
                continue
            taken = self._state.made[place].bytes + HEADERS
            if not shards or taken > room:
                shards.append([])
                room = self.recipe.shard_bytes
            shards[-1].append(self._packable(place))
            room -= taken
        names = [f"shard-{self._state.shards + i:06d}.tar" for i in range(len(shards))]
        return [
            Shard(f"{self._unfinished}/{name}", f"{self.path}/{name}", tuple(samples))
            for name, samples in zip(names, shards, strict=True)
        ]

    def note_shard(self, shard: Shard, packed: Sequence[Packed]) -> None:
        """Take in a shard, and delete what it was made of."""
        name = Path(shard.target).name
        places = [self._of_name[sample.key] for sample in shard.samples]
        for place, where in zip(places, packed, strict=True):
            self._state.packed[place] = (name, where)
        self._append(self._shard_line(name, places))
        if not self.recipe.copy:
            for place in places:
                remove(self._output(place))

    def write_lists(self) -> None:
        """Write ``manifest.csv`` in the order of the source, and ``failed.csv``."""
        rows = self.rows
        there = [row for row, place in enumerate(rows.manifest.files) if self._place_of(place)]
        with written_beside(self.path / "manifest.csv") as path, path.open("w", **_TEXT) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *rows.others])
            writer.writerows(map(self._cells, there))
        failed = self.path / "failed.csv"
        failed.unlink(missing_ok=True)
        if self._state.failed:
            with written_beside(failed) as path, path.open("w", **_TEXT) as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["path", "reason"])
                writer.writerows(self._state.failed.items())
        if self._parts.is_dir() and len(self._state.packed) == len(self._state.made):
            shutil.rmtree(self._parts)
        if len(self._state.packed) == len(self._state.made):
            for name in self._state.outdated:
                remove(str(self.path / name))

    def bytes_before(self) -> int:
        """Of the sources of all outputs."""
        return sum(made.source_bytes for made in self._state.made.values())

    def bytes_now(self) -> int:
        """Of all outputs."""
        return sum(made.bytes for made in self._state.made.values())

    # --- Inside ------------------------------------------------------------------------------

    @property
    def room(self) -> Path | None:
        """A folder for what is thrown away again, if there is one."""
        return self._unfinished if self._unfinished.is_dir() else None

    @property
    def _journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def _unfinished(self) -> Path:
        return self.path / ".unfinished"

    @property
    def _parts(self) -> Path:
        return self.path / ".parts"

    def _output(self, place: str) -> str:
        suffix = self.recipe.suffix(place)
        folder = {".jpg": "images", ".mp4": "videos", "/": "frames"}[suffix]
        root = self._parts if self.recipe.form == "shards" else self.path / folder
        return f"{root}/{self._names[place]}{suffix}"

    def _place_of(self, place: str) -> str | None:
        """Where a manifest finds what was made, from the folder on; none where it is not there."""
        if place not in self._state.made:
            return None
        if self.recipe.form != "shards":
            return self._output(place).removeprefix(f"{self.path}/")
        if place not in self._state.packed:
            return None
        shard, where = self._state.packed[place]
        return f"{shard}::{where.member}@{where.offset}+{where.size}"

    def _cells(self, row: int) -> list[object]:
        place, label = self.rows.manifest.files[row], self.rows.manifest.labels[row]
        made = self._state.made[place]
        return [
            self._place_of(place),
            label if label >= 0 else "",
            self.rows.label_name(row),
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
        row = self._row[place]
        label, name = self.rows.manifest.labels[row], self.rows.label_name(row)
        info: dict[str, Any] = {
            "num_frames": self._state.made[place].num_frames,
            "source": place.removeprefix(self._base.rstrip("/") + "/"),
        }
        if label >= 0:
            info["label"] = label
        if name:
            info["label_name"] = name
        suffix = suffix_of(place) if self.recipe.copy else self.recipe.suffix(place)
        where = place if self.recipe.copy else self._output(place)
        where = self._state.repacked.get(place, where)
        return Packable(str(self._names[place]), where, suffix, label, info)

    def _read_journal(self) -> None:
        state, shards = self._state, {}
        for record in _records(self._journal):
            if "shard" not in record:
                self._take(record)
            elif self._take_shard(record):
                shards[Path(record["shard"]).name] = record
        changed = {place for place in state.made if self._has_changed(place)}
        for place in changed:
            del state.made[place]
        changed |= {place for record in shards.values() for place in self._told_otherwise(record)}
        self.changed = len(changed)
        for name, record in shards.items():
            self._set_aside(name, record, changed)
        for place in [place for place in state.made if not self._is_there(place)]:
            del state.made[place]

    def _has_changed(self, place: str) -> bool:
        """Whether a source is another one since. One that is gone may have been deleted."""
        made = self._state.made[place]
        try:
            stamp = stamp_of(place)
        except OSError:
            return False
        noted = made.source_modified or stamp.modified  # older journals lack it
        return (made.source_bytes, noted) != (stamp.bytes, stamp.modified)

    def _told_otherwise(self, record: Mapping[str, Any]) -> list[str]:
        """Places whose label in a shard is not that of the manifest."""
        name = Path(record["shard"]).name
        return [
            place
            for (place, *_), told in zip(record["members"], record.get("labels", ()), strict=False)
            if self._lies_in(place, name) and told != self._label(place)
        ]

    def _set_aside(self, name: str, record: Mapping[str, Any], changed: set[str]) -> None:
        """Have a shard packed anew if it holds what is no longer true.

        That is so as well where some of it was packed anew before, by a run that was stopped.
        """
        state = self._state
        known = [place for place, *_ in record["members"] if place in self._names]
        here = [place for place in known if self._lies_in(place, name)]
        is_good = len(here) == len(known) and changed.isdisjoint(known)
        if is_good and not record.get("outdated"):
            return
        good = {}
        for place in here:
            _, where = state.packed.pop(place)
            if place in state.made:
                good[place] = where
                state.repacked[place] = str(TarMember(str(self.path / name), *where))
        members = [[place, *where] for place, where in good.items()]
        state.outdated[name] = {
            **{"shard": name, "bytes": record["bytes"]},
            **{"members": members, "outdated": True},
        }

    def _lies_in(self, place: str, shard: str) -> bool:
        return place in self._state.packed and self._state.packed[place][0] == shard

    def _take(self, record: Mapping[str, Any]) -> None:
        place = record.get("place", "")
        if self._names.get(place) is not None and self._names[place] == record.get("name"):
            known = {each.name: record[each.name] for each in fields(Made) if each.name in record}
            self._state.made[place] = Made(**known)

    def _take_shard(self, record: Mapping[str, Any]) -> bool:
        """-> whether it is there and whole"""
        name = Path(record["shard"]).name
        path = self.path / name
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        self._state.shards = max(self._state.shards, int(name[6:12]) + 1)
        for place, *where in record["members"]:
            if place in self._names:
                self._state.packed[place] = (name, Packed(*where))
        return True

    def _is_there(self, place: str) -> bool:
        """Whether the output of a place, which was found good once, is still there and whole.

        Of a folder of frames only how many there are is looked at: there may be many millions.
        """
        if place in self._state.packed or place in self._state.repacked:
            return True
        try:
            if not self.recipe.copy and is_frame_folder(self._output(place)):
                with os.scandir(self._output(place)) as entries:
                    frames = sum(entry.name.endswith(".jpg") for entry in entries)
                return frames == self._state.made[place].num_frames
            now = bytes_of(place if self.recipe.copy else self._output(place))
        except OSError:
            return False
        return now == self._state.made[place].bytes

    def _append(self, line: str) -> None:
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(line)

    def _lines(self) -> Iterator[str]:
        yield from map(self._line, self._state.made)
        yield from (json.dumps(record) + "\n" for record in self._state.outdated.values())
        of_shard: dict[str, list[str]] = {}
        for place, (name, _) in self._state.packed.items():
            of_shard.setdefault(name, []).append(place)
        yield from (self._shard_line(name, of_shard[name]) for name in sorted(of_shard))

    def _line(self, place: str) -> str:
        record = {"place": place, "name": self._names[place], **asdict(self._state.made[place])}
        return json.dumps(record) + "\n"

    def _shard_line(self, name: str, places: Sequence[str]) -> str:
        record = {
            "shard": name,
            "bytes": (self.path / name).stat().st_size,
            "members": [[place, *self._state.packed[place][1]] for place in places],
            "labels": [self._label(place) for place in places],
        }
        return json.dumps(record) + "\n"

    def _label(self, place: str) -> list[Any]:
        """What a shard tells of the class of a place."""
        row = self._row[place]
        return [self.rows.manifest.labels[row], self.rows.label_name(row)]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a kill may have left half of one."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


Told = Callable[[int, bool], None]
"""Is told of frames that were written, and whether a file is done with them."""


def make(folder: PreparedFolder, pool: Pool[Job], places: Sequence[str], told: Told) -> None:
    """Have outputs made, and take them in.

    Raises:
        OSError: nothing can be written any more.
        PoolError: the processes do not work.
    """
    jobs = {place: folder.job(place) for place in places}
    for place, result in _results(pool, jobs, told):
        if isinstance(result, Made):
            folder.note(place, result)
        else:
            remove(jobs[place].beside)
            folder.fail(place, result.reason)


def pack(folder: PreparedFolder, pool: Pool[Shard], shards: Sequence[Shard]) -> Iterator[int]:
    """Have shards written, and take them in. -> bytes of each

    Raises:
        OSError: a shard cannot be written.
        PoolError: the processes do not work.
    """
    for number, shard in enumerate(shards):
        pool.submit(number, shard)
    left = len(shards)
    while left:
        answer = pool.next()
        shard = shards[answer.tag]
        if isinstance(answer.result, Broken | Lost):
            remove(shard.beside)
            raise OSError(f"{shard.target}: {answer.result.reason}")
        if isinstance(answer.result, list):
            folder.note_shard(shard, answer.result)
            left -= 1
            yield sum(packed.size for packed in answer.result)


def _results(
    pool: Pool[Job], jobs: Mapping[str, Job], told: Told
) -> Iterator[tuple[str, Made | Failed | Lost]]:
    for place, job in jobs.items():
        pool.submit(place, job)
    written = dict.fromkeys(jobs, 0)
    left = len(jobs)
    while left:
        answer = pool.next()
        place, result = answer.tag, answer.result
        if isinstance(result, Broken):
            raise OSError(f"{result.reason}. What is done stays; make room, and go on")
        frames = result.frames if isinstance(result, Step) else written[place]
        frames = result.num_frames if isinstance(result, Made) else frames
        told(max(0, frames - written[place]), answer.is_last)
        written[place] = max(frames, written[place])
        if answer.is_last:
            left -= 1
            yield place, result


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of files, made from some of them."""

    tried: int
    """Files it is made from; 0 where none of those tried could be read."""
    files: int
    before: int
    """Bytes of all files."""
    after: int
    """Bytes of all outputs."""
    seconds: float
    """Of work, by one process."""


def try_out(folder: PreparedFolder, pool: Pool[Job], places: Sequence[str]) -> Estimate:
    """Make the first seconds of a few files, throw them away, and conclude to all ``places``.

    Bytes and time are taken to grow with the bytes of the source.
    """
    count = min(TRIED, ceil(len(places) / 10))
    chosen = [places[i * len(places) // count] for i in range(count)]
    source = taken = seconds = 0.0
    tried = 0
    with tempfile.TemporaryDirectory(prefix="transcode-", dir=folder.room) as temporary:
        jobs = {place: folder.trial(place, Path(temporary)) for place in chosen}
        for place, result in _results(pool, jobs, lambda *_: None):
            if isinstance(result, Made) and result.share > 0:
                tried += 1
                source += bytes_of(place)
                taken += result.bytes / result.share
                seconds += result.seconds / result.share
    before = sum(map(_bytes_or_none, places))
    scale = before / source if source else 0.0
    return Estimate(tried, len(places), before, round(taken * scale), seconds * scale)


def copied(places: Sequence[str]) -> Estimate:
    """What is to be expected where files are packed as they are."""
    before = sum(map(_bytes_or_none, places))
    return Estimate(len(places), len(places), before, before, 0.0)


def _bytes_or_none(place: str) -> int:
    try:
        return bytes_of(place)
    except OSError:
        return 0
