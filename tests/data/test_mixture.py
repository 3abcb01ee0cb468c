"""Several sources in one run: which one each update uses, and which samples they give."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data import reading
from hpm_video.data.batch import collate
from hpm_video.data.clips import ValidationClips, VideoClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.manifest import Manifest
from hpm_video.data.mixture import Place, Places, deal_out
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.randomness import generator, key_of
from hpm_video.runs.data import open_data

weight = st.floats(0.05, 20)
SEED = 5


@given(first=weight, second=weight, num_updates=st.integers(0, 300))
def test_two_sources_have_their_shares_within_one_update_at_any_time(first, second, num_updates):
    sources = deal_out([first, second], num_updates)
    assert len(sources) == num_updates
    share = second / (first + second)
    lag = np.cumsum(sources) - share * np.arange(1, num_updates + 1)
    assert np.abs(lag).max(initial=0) <= 1 + 1e-9


@given(weights=st.lists(weight, min_size=1, max_size=6), num_updates=st.integers(1, 300))
def test_no_source_is_ahead_of_its_share_by_a_whole_update(weights, num_updates):
    sources = deal_out(weights, num_updates)
    for source, its_weight in enumerate(weights):
        had = np.cumsum(sources == source)
        due = its_weight / sum(weights) * np.arange(1, num_updates + 1)
        assert (had - due).max() < 1 + 1e-9


def test_sources_are_dealt_out_evenly():
    assert deal_out([3.0], 4).tolist() == [0, 0, 0, 0]
    assert deal_out([1, 1], 6).tolist() == [0, 1, 0, 1, 0, 1]
    assert deal_out([1, 2], 6).tolist() == [1, 0, 1, 1, 0, 1]
    assert np.bincount(deal_out([5, 3, 2], 1000)).tolist() == [500, 300, 200]


def test_whose_turn_it_is_does_not_depend_on_the_length_of_the_run():
    weights = [1, 0.3, 2.2]
    assert deal_out(weights, 500)[:70].tolist() == deal_out(weights, 70).tolist()


@given(
    weights=st.lists(weight, min_size=1, max_size=4),
    num_updates=st.integers(0, 40),
    batch_size=st.integers(1, 5),
    share_done=st.floats(0, 1),
)
def test_each_source_is_read_on_without_a_gap_wherever_a_run_starts(
    weights, num_updates, batch_size, share_done
):
    dealt = deal_out(weights, num_updates)
    whole = [*Places(dealt, batch_size)]
    assert len(whole) == len(Places(dealt, batch_size)) == num_updates * batch_size
    for source in range(len(weights)):
        positions = [place.position for place in whole if place.source == source]
        assert positions == [*range(len(positions))]
    for update, source in enumerate(dealt):
        batch = whole[update * batch_size : (update + 1) * batch_size]
        assert {place.source for place in batch} == {source}
    start = int(share_done * num_updates)
    rest = Places(dealt, batch_size, start)
    assert [*rest] == whole[start * batch_size :]
    assert len(rest) == (num_updates - start) * batch_size


def test_there_are_no_places_beyond_the_run():
    places = Places(deal_out([1], 3), 2, start=1)
    assert places[3] == Place(0, 5)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            places[index]


# --- Their samples ------------------------------------------------------------------------------


class Noise:
    """A file of 20 frames that all differ."""

    num_frames = 20
    height, width = 12, 14

    def __init__(self, path, decoder):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def frames_stated(self, stated):
        return self.num_frames

    def read(self, indices):
        draws = [generator(self.path, int(index)) for index in indices]
        frames = [draw.integers(256, size=(12, 14, 3), dtype=np.uint8) for draw in draws]
        return np.stack(frames)


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    monkeypatch.setattr(reading, "open_video", Noise)


def stream(source, num_frames=4, count=5, folder="v"):
    files = tuple(f"/{folder}/{number}.mp4" for number in range(count))
    return VideoClips(
        Manifest(files, (-1,) * count, (-1,) * count),
        DataConfig(
            num_frames=num_frames,
            frame_stride=1,
            max_frame_stride=3,
            frame_size=(8, 8),
            repeats=2,
            max_bad_share=0,
        ),
        MultiScaleCrop(flip=True),
        seed=SEED,
        source=source,
    )


def batches_of(streams, weights, updates=12, start=0, batch_size=3, micro_batch=None):
    places = Places(deal_out(weights, updates), batch_size, start)
    return list(clip_batches(streams, places, batch_size=micro_batch or batch_size, workers=0))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own.clips, other.clips)
        assert own.keys.tolist() == other.keys.tolist()
        assert (own.files, own.source) == (other.files, other.source)


@pytest.mark.parametrize(
    ("others", "weights"),
    [((), [1]), (("images",), [1, 1]), (("images",), [1, 7]), (("more", "images"), [2, 1, 0.5])],
)
def test_samples_of_a_source_do_not_depend_on_the_others_or_on_weights(others, weights):
    streams = [stream(""), *(stream(name, num_frames=1, count=4) for name in others)]
    batches = batches_of(streams, weights, updates=24)
    alone = batches_of([stream("")], [1], updates=24)
    own = [batch for batch in batches if not batch.source]
    assert len(own) >= 3
    assert_same(own, alone[: len(own)])
    if "images" in others:
        images = [batch for batch in batches if batch.source == "images"]
        assert images
        of_images = batches_of([stream("images", num_frames=1, count=4)], [1], updates=24)
        assert_same(images, of_images[: len(images)])


def test_sources_draw_for_themselves():
    """A second source with the same files has another order, other frames and other crops; the main
    source is as without a mix."""
    main, second = stream(""), stream("images")
    epochs = range(10)
    assert [main[p].file for p in epochs] != [second[p].file for p in epochs]
    assert not {key for p in epochs for key in main[p].keys} & {
        key for p in epochs for key in second[p].keys
    }
    index = main.manifest.files.index(main[7].file)
    assert main[7].keys == tuple(key_of(SEED, 1, index, repeat) for repeat in (0, 1))


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_every_batch_is_of_one_source_and_says_of_which(micro_batch):
    streams = [stream(""), stream("images", num_frames=1)]
    batches = batches_of(streams, [1, 1], batch_size=4, micro_batch=micro_batch)
    passes = 4 // micro_batch
    names = [batch.source for batch in batches]
    assert names == [name for _ in range(6) for name in ("", "images") for _ in range(passes)]
    assert {batch.clips.shape[2] for batch in batches if batch.source} == {1}
    assert {batch.to("cpu").source for batch in batches} == {"", "images"}
    with pytest.raises(ValueError, match="unpack"):
        collate([streams[0][0], streams[1][0]])


@pytest.mark.parametrize("start", [0, 1, 5, 11, 12])
def test_a_mixed_run_goes_on_with_the_same_batches(start):
    streams = [stream(""), stream("images", num_frames=1, count=3)]
    whole = batches_of(streams, [1, 0.6])
    assert_same(batches_of(streams, [1, 0.6], start=start), whole[start:])


def test_validation_clips_say_of_which_source_they_are():
    data = DataConfig(num_frames=1, frame_size=(8, 8))
    validation_clips = ValidationClips(stream("").manifest, data, seed=SEED, source="images")
    assert collate([validation_clips[0], validation_clips[3]]).source == "images"


# --- A mixed run ------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixed", "updates"), [(1, 60), (0.5, 45), (3, 120)])
def test_an_epoch_shows_the_main_source_once(tmp_path, mixed, updates):
    for name, count in ("videos", 20), ("images", 70):
        files = "".join(f"{number}.mp4\n" for number in range(count))
        (tmp_path / f"{name}.csv").write_text(f"path\n{files}")
    (tmp_path / "run.yaml").write_text(
        f"""
        data: {{train: {tmp_path}/videos.csv}}
        mix: {{images: {{weight: {mixed}, data: {{train: {tmp_path}/images.csv}}}}}}
        recipe: {{epochs: 3, batch_size: 2, warmup_epochs: 0}}
        """
    )
    config = load_config(PretrainConfig, tmp_path / "run.yaml", [])
    data = open_data(config)
    assert [len(source.train) for source in data.sources.values()] == [20, 70]
    assert data.timeline.num_updates == updates
    dealt = deal_out(config.weights, data.timeline.num_updates)
    videos_shown = np.sum(dealt == 0) * config.recipe.batch_size
    assert videos_shown == 3 * len(data.main.train)
    other = load_config(PretrainConfig, tmp_path / "run.yaml", ["mix.images.weight=9"])
    assert open_data(other).fingerprint == data.fingerprint
    (tmp_path / "images.csv").write_text("path\n1.mp4\n")
    assert open_data(other).fingerprint != data.fingerprint
