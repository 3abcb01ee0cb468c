"""Which process reads which samples, without processes: together they read what one would."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.data.mixture import Places, deal_out

weight = st.floats(0.05, 20)


@st.composite
def runs(draw):
    """Sources of updates, a batch size for 1, 2 and 4 processes, and an update to start at."""
    num_updates = draw(st.integers(0, 30))
    sources = deal_out(draw(st.lists(weight, min_size=1, max_size=3)), num_updates)
    return sources, 4 * draw(st.integers(1, 4)), draw(st.integers(0, num_updates))


def shares_of(sources, batch_size, start, processes):
    return [
        [*Places(sources, batch_size, start, rank=rank, processes=processes)]
        for rank in range(processes)
    ]


@given(run=runs(), processes=st.sampled_from([2, 4]))
def test_shares_of_each_batch_in_turn_are_the_batch(run, processes):
    """So every process takes a micro-batch from the same update, wherever a run starts."""
    sources, batch_size, start = run
    whole = [*Places(sources, batch_size, start)]
    shares = shares_of(sources, batch_size, start, processes)
    size = batch_size // processes
    assert {len(share) for share in shares} == {(len(sources) - start) * size}
    joined = [
        place
        for update in range(len(sources) - start)
        for share in shares
        for place in share[update * size : (update + 1) * size]
    ]
    assert joined == whole


@given(run=runs(), processes=st.sampled_from([1, 2, 4]))
def test_every_sample_comes_once_and_to_one_process(run, processes):
    sources, batch_size, _ = run
    taken = [place for share in shares_of(sources, batch_size, 0, processes) for place in share]
    assert len(set(taken)) == len(taken)
    for source in set(sources.tolist()):
        positions = sorted(place.position for place in taken if place.source == source)
        assert positions == [*range(len(positions))]


@given(
    num_files=st.integers(1, 40),
    epochs=st.integers(1, 4),
    batch_size=st.sampled_from([4, 8, 12]),
    processes=st.sampled_from([1, 2, 4]),
)
def test_every_file_comes_once_per_epoch(num_files, epochs, batch_size, processes):
    """A stream shows entry ``position % files`` of the order of epoch ``position // files``, so
    nothing is missing or repeated where an epoch ends in the middle of a batch."""
    num_updates = num_files * epochs // batch_size
    sources = np.zeros(num_updates, np.int64)
    shown = [
        place.position
        for share in shares_of(sources, batch_size, 0, processes)
        for place in share
        if place.position < num_files * epochs
    ]
    for epoch in range(len(shown) // num_files):
        slots = sorted(p % num_files for p in shown if p // num_files == epoch)
        assert slots == [*range(num_files)]


@given(run=runs(), processes=st.sampled_from([2, 4]), share_done=st.floats(0, 1))
def test_a_run_may_go_on_with_any_number_of_processes(run, processes, share_done):
    sources, batch_size, start = run
    before = sum(shares_of(sources, batch_size, 0, processes), [])
    done = [place for place in before if place in {*Places(sources[:start], batch_size)}]
    rest = sum(shares_of(sources, batch_size, start, 1), [])
    assert sorted(done + rest) == sorted(before)
