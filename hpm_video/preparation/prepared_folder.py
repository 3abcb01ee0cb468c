"""A folder of transcoded data: its state, its remaining work, and its manifest.

It holds
    manifest.csv        path, label and properties of each file: train on this
    failed.csv          files that failed, and the reasons
    settings.json       the settings: a folder never mixes two
    journal.jsonl       what is done, a line each; a second start goes on from there
and, by the chosen format,
    videos/NAME.mp4     or for an image images/NAME.jpg
    frames/NAME/        a folder of 000000.jpg, 000001.jpg ...
    shard-000000.tar    and so on; the samples lie in the order of the manifest
Each output is complete or absent.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from hpm_video.data.manifest import Listing, Manifest
from hpm_video.decoding.locations import TarMember, is_frame_folder, is_image
from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.failures import Failure
from hpm_video.preparation.findings import COLUMNS as CHECK_COLUMNS
from hpm_video.preparation.findings import stamp_of
from hpm_video.preparation.jobs import Journal, claim, remove, run_jobs, write_report, write_table
from hpm_video.preparation.shards import Sample, Shard, output_names, pack_shard, suffix_of
from hpm_video.preparation.transcode import Job, Output, Recipe, Transcoder
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

MOST_TRIALS = 8  # limit on the files that an estimate tries; of fewer than 80 files, a tenth
PROPERTIES = ("num_frames", "width", "height", "fps", "key_frame_distance")
ADDED = {"keep_every": 1, "tune": "none"}  # settings that folders of earlier versions lack
COLUMNS = ("path", "label", "label_name", *PROPERTIES)
STALE = {
    *COLUMNS,
    *CHECK_COLUMNS,
    "kept_every",
}  # columns of the source's manifest that do not hold for outputs
UNRELATED = ("hpm_video",)  # settings that may differ between the starts of one folder
TRIAL_SECONDS = 20.0  # seconds of each file in an estimate
HEADERS = 3 * 1024  # estimate of the bytes that a tar adds to a sample


class Estimate(NamedTuple):
    """Estimate of size and time for all files, from trials with some of them."""

    tried: int  # number of successful trials
    files: int
    before: int  # total bytes of the sources
    after: int  # total bytes of the outputs
    seconds: float  # time that one process would take


class PreparedFolder:
    """A folder of outputs, and what its journal says of them."""

    def __init__(
        self, path: Path, recipe: Recipe, manifest: Manifest, listing: Listing, base: Path
    ) -> None:
        """``listing``: source of ``manifest``; ``base``: outputs are named by paths below it."""
        self.path = path.absolute()
        self.recipe = recipe
        self.outputs: dict[str, Output] = {}  # by place, as are the others
        self.failures: dict[str, Failure] = {}
        self.changed = 0  # number of files whose source or label has changed since they were done
        kept = [row for row, verdict in enumerate(listing.column("verdict")) if verdict != "bad"]
        # Of sections the whole file is prepared: they are columns that stay as they are.
        self.manifest = replace(manifest, files=tuple(listing.files[row] for row in kept))
        cells = {n: listing.column(n) for n in (*listing.table.columns, "fps", "verdict")}
        cells = {name: [column[row] for row in kept] for name, column in cells.items()}
        self._rates, self._verdicts = cells["fps"], cells["verdict"]
        # Further columns of the manifest, which hold for outputs as well.
        self._others = {name: column for name, column in cells.items() if name not in STALE}
        if recipe.fps is None and (recipe.keep_every > 1 or manifest.kept_every):
            self._others["kept_every"] = [
                ""
                if is_image(place)
                else str(manifest.kept_every.get(place, 1) * recipe.keep_every)
                for place in manifest.files
            ]
        self._base = str(base)
        dots, nests = recipe.form != "shards", recipe.form != "frames"
        self.names = output_names(self.manifest.files, self._base, dots=dots, nests=nests)
        self._of_name = {name: place for place, name in self.names.items()}
        self._row = {place: row for row, place in reversed([*enumerate(self.manifest.files)])}
        self._shards: dict[str, dict[str, Any]] = {}  # existing shards as the journal has them
        # Shards of which some content has changed: the rest is packed anew, and they go.
        self._outdated: set[str] = set()
        self._packed: dict[str, TarMember] = {}  # by place; in a shard that may be outdated
        self._journal: Journal | None = None
        self._unfinished = self.path / ".unfinished"
        self._parts = self.path / ".parts"

    def close(self) -> None:
        """Release the folder."""
        if self._journal is not None:
            with contextlib.suppress(OSError):  # it is empty, unless this run was stopped
                self._unfinished.rmdir()
            self._journal.close()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Claim the folder for these settings (see :func:`claim`), and find out what is done."""
        self._journal = claim(
            self.path, settings, holds="prepared data", unrelated=UNRELATED, added=ADDED
        )
        remove(str(self._unfinished))
        self._unfinished.mkdir()
        for record in self._journal.read():
            if shard := Path(record.get("shard", "")).name:
                path = self.path / shard
                if path.is_file() and path.stat().st_size == record["bytes"]:
                    self._shards[shard] = record
                    for place, *where in record["members"]:
                        self._packed[place] = TarMember(shard, *where)
            elif record.get("name") and self.names.get(record["place"]) == record["name"]:
                known = {each.name for each in fields(Output)} & record.keys()
                output = Output(**{name: record[name] for name in known})
                self.outputs[record["place"]] = output
                self._packed.pop(record["place"], None)  # a shard has what it was before
        self._drop_what_changed()

    def _drop_what_changed(self) -> None:
        """Forget outputs whose source, label or file has changed."""
        members = {
            name: {place for place, *_ in record["members"] if place in self.names}
            for name, record in self._shards.items()
        }
        relabelled = {
            place
            for name, record in self._shards.items()
            for (place, *_), label in zip(record["members"], record.get("labels", ()), strict=False)
            if place in members[name] and self._shard_of(place) == name
            if (*label,) != self._label(self._row[place])
        }
        changed = {place for place in self.outputs if self._has_changed(place)}
        self.changed = len(changed | relabelled)
        for place in [*self.outputs]:
            if place in changed or not self._is_there(place):
                del self.outputs[place]
        self._packed = {p: where for p, where in self._packed.items() if p in self.outputs}
        self._outdated = {
            name
            for name, places in members.items()
            if any(self._shard_of(place) != name for place in places)
            or places & relabelled
            or self._shards[name].get("outdated")  # of an earlier version
        }

    def _has_changed(self, place: str) -> bool:
        """Whether a source has changed. A missing one may have been deleted on purpose."""
        made, stamp = self.outputs[place], stamp_of(place)
        noted = made.source_modified or stamp.modified  # older journals lack it
        now = (stamp.bytes, stamp.modified)
        return stamp.bytes is not None and (made.source_bytes, noted) != now

    def _is_there(self, place: str) -> bool:
        """Whether an output is still there. Frames are only counted: there may be millions."""
        if place in self._packed:
            return True
        output = place if self.recipe.copy else self._output(place)
        if is_frame_folder(output):
            names = os.listdir(output) if Path(output).is_dir() else []  # noqa: PTH208 - quick
            return sum(name.endswith(".jpg") for name in names) == self.outputs[place].num_frames
        return stamp_of(output).bytes == self.outputs[place].bytes

    def missing(self) -> list[str]:
        """Return the places without an output, each once, in the order of the manifest."""
        if self.recipe.copy:
            reason = "a folder of frames cannot be packed as it is; leave out --copy"
            folders = filter(is_frame_folder, self.names)
            self.failures = {place: Failure(place, reason) for place in folders}
        return [p for p in self.names if p not in self.outputs and p not in self.failures]

    def estimate(self, places: Sequence[str], workers: int, limits: Limits) -> Estimate:
        """Estimate the cost of ``places``, in proportion to their bytes, by trials with a few."""
        before = sum(stamp_of(place).bytes or 0 for place in places)
        if self.recipe.copy:
            return Estimate(len(places), len(places), before, before, 0.0)
        count = min(MOST_TRIALS, ceil(len(places) / 10))
        chosen = [places[i * len(places) // count] for i in range(count)]
        there = self._unfinished if self._unfinished.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="transcode-", dir=there) as temporary:
            jobs = {place: self.job(place, Path(temporary)) for place in chosen}
            results = [*run_jobs(Transcoder(self.recipe), jobs, workers, limits)]
        made = [each for _, each in results if isinstance(each, Output) and each.share > 0]
        source = sum(output.source_bytes for output in made)
        scale = before / source if source else 0.0
        after = round(scale * sum(output.bytes / output.share for output in made))
        seconds = scale * sum(output.seconds / output.share for output in made)
        return Estimate(len(made), len(places), before, after, seconds)

    def make(self, places: Sequence[str], workers: int, limits: Limits) -> None:
        """Make outputs, and record them. Raises as :func:`run_jobs`."""
        jobs = {place: self.job(place) for place in places}
        with (
            closing(ProgressBar(len(jobs), "files", "frames/s")) as bar,
            closing(run_jobs(Transcoder(self.recipe), jobs, workers, limits)) as results,
        ):
            for place, result in results:
                if isinstance(result, Output):
                    self.note(place, result)
                    bar.advance(result.num_frames)
                else:
                    remove(jobs[place].temporary)
                    self.failures[place] = Failure(place, result.reason)
                    bar.advance(0)

    def pack(self, workers: int, limits: Limits) -> None:
        """Write the shards that are missing, and record them. OSError: one cannot be written."""
        jobs = {shard.target: shard for shard in self.unpacked_shards()}
        # Nothing is decoded, and a large file is copied in one step: it may take longer.
        limits = replace(limits, seconds=10 * limits.seconds)
        with (
            closing(ProgressBar(len(jobs), "shards", "MB/s")) as bar,
            closing(run_jobs(pack_shard, jobs, workers, limits)) as results,
        ):
            for target, result in results:
                if isinstance(result, Failure):
                    remove(jobs[target].temporary)
                    raise OSError(f"{target} cannot be written: {result.reason}")
                self._note_shard(jobs[target], result)
                bar.advance(sum(member.size for member in result) / 1e6)

    def job(self, place: str, trial: Path | None = None) -> Job:
        """Make the job of a place; as a ``trial``, for its first seconds in that folder."""
        row = self._row[place]
        name, count = f"{row}{self.recipe.suffix(place)}", self.manifest.num_frames[row]
        # A check counts the frames that training can read; of the others some can be mended.
        is_wanted = count > 0 and (self.recipe.copy or not self._verdicts[row])
        stated: dict[str, Any] = {"num_frames": count} if is_wanted else {}
        with contextlib.suppress(ValueError, ZeroDivisionError):
            rate = Fraction(self._rates[row])
            if 0 < rate < 1000:
                stated["fps"] = rate.limit_denominator(SIMPLEST)
        if trial is not None:
            temporary, target = f"{trial}/temporary-{name}", f"{trial}/{name}"
            return Job(place, temporary, target, **stated, cut=TRIAL_SECONDS)
        return Job(place, f"{self._unfinished}/{name}", self._output(place), **stated)

    def note(self, place: str, output: Output) -> None:
        """Record an output."""
        self.outputs[place] = output
        self._note({"place": place, "name": self.names[place], **asdict(output)})

    def _note(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None, "the folder is claimed before anything is written to it"
        self._journal.append(record)

    def unpacked_shards(self) -> list[Shard]:
        """Return the shards that are still to be written, each as full as allowed."""
        shards: list[list[Sample]] = []
        room = 0
        for place in self.names:
            if place not in self.outputs or self._is_packed(place):
                continue
            size = self.outputs[place].bytes + HEADERS
            if not shards or size > room:
                shards.append([])
                room = self.recipe.shard_bytes
            shards[-1].append(self._sample(place))
            room -= size
        first = max((int(name[6:12]) + 1 for name in self._shards), default=0)
        names = [f"shard-{number:06d}.tar" for number in range(first, first + len(shards))]
        return [
            Shard(f"{self._unfinished}/{name}", f"{self.path}/{name}", tuple(samples))
            for name, samples in zip(names, shards, strict=True)
        ]

    def _note_shard(self, shard: Shard, members: Sequence[TarMember]) -> None:
        """Record a shard, and delete the files that it was made of."""
        name = Path(shard.target).name
        places = [self._of_name[sample.key] for sample in shard.samples]
        packed = dict(zip(places, members, strict=True))
        self._packed |= packed
        self._shards[name] = {
            "shard": name,
            "bytes": Path(shard.target).stat().st_size,
            "members": [[place, it.name, it.offset, it.size] for place, it in packed.items()],
            "labels": [self._label(self._row[place]) for place in places],
        }
        self._note(self._shards[name])
        if not self.recipe.copy:
            for place in places:
                remove(self._output(place))

    def write_lists(self) -> None:
        """Write ``manifest.csv`` in the order of the source, and ``failed.csv``."""
        places = enumerate(self.manifest.files)
        rows = [self._cells(row, place) for row, place in places if self._path_of(place)]
        write_table(self.path / "manifest.csv", [*COLUMNS, *self._others], rows)
        failed, reasons = self.path / "failed.csv", self.failures.values()
        failed.unlink(missing_ok=True)
        if reasons:
            write_report(failed, ("path", "reason"), ((bad.path, bad.reason) for bad in reasons))
        if self._shards and all(map(self._is_packed, self.outputs)):
            remove(str(self._parts))
            for name in self._outdated:
                remove(str(self.path / name))

    def _shard_of(self, place: str) -> str:
        return self._packed[place].tar if place in self._packed else ""

    def _is_packed(self, place: str) -> bool:
        return place in self._packed and self._shard_of(place) not in self._outdated

    def _label(self, row: int) -> tuple[int, str]:
        names, label = self.manifest.label_names or (), self.manifest.labels[row]
        return label, names[label] if 0 <= label < len(names) else ""

    def _output(self, place: str) -> str:
        suffix = self.recipe.suffix(place)
        folder = {".jpg": "images", ".mp4": "videos", "/": "frames"}[suffix]
        root = self._parts if self.recipe.form == "shards" else self.path / folder
        return f"{root}/{self.names[place]}{suffix}"

    def _path_of(self, place: str) -> str | None:
        """Path of an output relative to the folder, if it is there."""
        if place not in self.outputs:
            return None
        if self.recipe.form != "shards":
            return self._output(place).removeprefix(f"{self.path}/")
        return str(self._packed[place]) if self._is_packed(place) else None

    def _cells(self, row: int, place: str) -> list[object]:
        (label, name), output = self._label(row), self.outputs[place]
        fps = f"{output.fps:.4f}".rstrip("0").rstrip(".") if output.fps else ""
        properties = [fps if each == "fps" else getattr(output, each) for each in PROPERTIES]
        others = [column[row] for column in self._others.values()]
        return [self._path_of(place), label if label >= 0 else "", name, *properties, *others]

    def _sample(self, place: str) -> Sample:
        label, name = self._label(self._row[place])
        info: dict[str, Any] = {
            "num_frames": self.outputs[place].num_frames,
            "source": place.removeprefix(self._base.rstrip("/") + "/"),
        }
        info |= {"label": label} if label >= 0 else {}
        info |= {"label_name": name} if name else {}
        suffix, path = self.recipe.suffix(place), self._output(place)
        if self.recipe.copy:
            suffix, path = suffix_of(place), place
        if place in self._packed:
            member = self._packed[place]
            path = str(replace(member, tar=f"{self.path}/{member.tar}"))
        return Sample(self.names[place], path, suffix, label, info)
