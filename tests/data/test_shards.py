"""Samples on a disk: shards, pictures, their order, cache and memory."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.data import (
    DiskCache,
    Picture,
    mix,
    open_feed,
    pictures,
    settled,
    shards,
)
from lepton_jax.data.indexed import Groups, spread_evenly
from lepton_jax.data.memory import HeldGroups
from lepton_jax.data.pipeline import open_stream
from lepton_jax.data.windows import WindowOrder, mixedness
from lepton_jax.errors import DataError

pl = pytest.importorskip("polars", reason="the extra data")
ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"


def write(folder, rows, files=3, group=16, first=0, **columns):
    """Shards of rows that are numbered: column `number`, and others by function."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(first, first + rows, dtype=np.int64)
    for i, part in enumerate(np.array_split(numbers, files)):
        frame = pl.DataFrame({"number": part})
        frame = frame.with_columns(
            (pl.col("number") * 0.5).alias("half"),
            (pl.col("number") % 7).cast(pl.UInt8).alias("label"),
            *(value.alias(name) for name, value in columns.items()),
        )
        frame.write_parquet(folder / f"train-{i}.parquet", row_group_size=group)
    return folder


def taken(dataset, count, seed=0, shuffle=True):
    rows, names = open_stream(dataset, seed, shuffle).take(count)
    return rows, names


def test_columns_stand_side_by_side_or_by_argument(tmp_path):
    write(tmp_path, 50)
    (inputs, targets), names = taken(
        shards(tmp_path, inputs=["number", "half"], target="label"), 5, shuffle=False
    )
    assert inputs.dtype == np.float32 and inputs.tolist()[3] == [3, 1.5]
    assert targets.dtype == np.uint8 and targets.tolist() == [0, 1, 2, 3, 4]
    assert names[0] == "data:0:0"

    by_argument = shards(
        tmp_path, inputs={"a": "number", "b": ["half"]}, target="label"
    )
    (inputs, _), _ = taken(by_argument, 2, shuffle=False)
    assert inputs["a"].dtype == np.int32 and inputs["b"].tolist() == [[0], [0.5]]

    (inputs, _), _ = taken(shards(tmp_path, "train", target="label"), 2, shuffle=False)
    assert inputs.tolist() == [[0, 0], [1, 0.5]]


def test_an_epoch_has_every_row_once_and_a_position_goes_on_anywhere(tmp_path):
    write(tmp_path, 101)
    dataset = shards(tmp_path, inputs="number", target="label")
    assert dataset.epoch_samples == 101
    stream = open_stream(dataset, shuffle=True)
    first, second = (stream.take(101)[0] for _ in range(2))
    for numbers, labels in (first, second):
        assert sorted(numbers.tolist()) == list(range(101))
        np.testing.assert_array_equal(labels, numbers % 7)
    assert first[0].tolist() != second[0].tolist()

    stream = open_stream(dataset, shuffle=True)
    stream.take(57)
    state = json.loads(json.dumps(stream.state()))
    elsewhere = open_stream(dataset, shuffle=True)
    elsewhere.restore(state)
    np.testing.assert_array_equal(stream.take(60)[0][0], elsewhere.take(60)[0][0])


def test_a_position_is_refused_where_the_files_are_others(tmp_path):
    write(tmp_path, 40)
    state = open_stream(shards(tmp_path, inputs="number", target="label")).state()
    write(tmp_path, 40, first=5)
    with pytest.raises(DataError, match="the content of 'data' was"):
        open_stream(shards(tmp_path, inputs="number", target="label")).restore(state)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(0, 300),
    st.integers(1, 60),
)
@settings(max_examples=20, deadline=None)
def test_a_windowed_order_is_a_permutation_any_stretch_of_which_is_computed_alone(
    sizes, width, start, count
):
    order = WindowOrder(np.array(sizes), width, 0, "a")
    samples = sum(sizes)
    epochs, indices = order.at(0, start + count)
    fresh = WindowOrder(np.array(sizes), width, 0, "a").at(start, count)
    np.testing.assert_array_equal(fresh[0], epochs[start:])
    np.testing.assert_array_equal(fresh[1], indices[start:])
    np.testing.assert_array_equal(epochs, np.arange(start + count) // samples)
    for epoch in range((start + count) // samples):
        here = indices[epoch * samples : (epoch + 1) * samples]
        assert sorted(here.tolist()) == list(range(samples))

    groups = order.groups_of(np.arange(samples))
    np.testing.assert_array_equal(groups, np.repeat(np.arange(len(sizes)), sizes))


def test_hints_name_each_group_of_the_next_window_once_before_it_is_used():
    order = WindowOrder(np.full(12, 5), 3, 0, "a")
    groups, ranks = [], []
    for position in range(0, 60, 4):
        more, of_them = order.upcoming(position, 4)
        groups += more.tolist()
        ranks += of_them.tolist()
    # the first window is read when it is used; the last group belongs to the next epoch
    assert sorted(groups) != groups and len(groups) == 12
    used = order.groups_of(order.at(15, 45)[1])
    assert set(groups[:9]) == set(used.tolist())
    assert set(np.round(ranks, 3)) == {0, 0.333, 0.667}


def test_a_window_mixes_as_a_whole_shuffle_does_if_the_groups_are_alike():
    sizes = np.full(64, 32)
    whole = WindowOrder(sizes, 64, 0, "a")
    groups = whole.groups_of(whole.at(0, 64 * 32)[1])
    assert 0.9 < mixedness(groups, 64) < 1.1

    narrow = WindowOrder(sizes, 4, 0, "a")
    narrow_groups = narrow.groups_of(narrow.at(0, 64 * 32)[1])
    assert mixedness(narrow_groups, 64) < 0.15
    # what a model sees is classes: groups that hold them at random are as good as whole
    classes = np.random.default_rng(0).integers(10, size=64 * 32)
    assert 0.85 < mixedness(classes[narrow.at(0, 64 * 32)[1]], 64) < 1.15


def test_held_groups_keep_their_limit_and_read_each_once():
    held = HeldGroups(100)
    reads = []

    def load(key):
        time.sleep(0.01)
        reads.append(key)
        return key, 40

    threads = [
        threading.Thread(target=lambda: held.get("a", lambda: load("a")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == ["a"]
    for key in "bcd":
        held.get(key, lambda key=key: load(key))
    assert held.bytes == 80 and held.loads == 4


def test_each_group_is_read_once_an_epoch(tmp_path):
    write(tmp_path, 400, group=10)
    dataset = shards(tmp_path, inputs="number", target="label")
    stream = open_stream(dataset, shuffle=True)
    for _ in range(40):
        stream.take(10)
    assert stream.held.loads == len(dataset.data.groups.sizes)


def test_two_hosts_read_the_batch_of_one_and_half_of_the_groups_each(
    tmp_path, monkeypatch
):
    write(tmp_path, 4096, files=4, group=64)
    monkeypatch.setattr("lepton_jax.data.indexed.WINDOW_BYTES", 16 * 1400)
    dataset = shards(tmp_path, inputs="number", target="label")
    alone = open_stream(dataset, shuffle=True)
    hosts = [open_stream(dataset, shuffle=True) for _ in range(2)]
    for _ in range(16):
        rows = alone.take(256)[0][0].tolist()
        halves = [
            host.take(256, np.arange(128) + 128 * number)[0][0].tolist()
            for number, host in enumerate(hosts)
        ]
        assert rows == halves[0] + halves[1]
    groups = len(dataset.data.groups.sizes)
    assert alone.held.loads == groups
    for host in hosts:
        assert host.held.loads < 0.75 * groups


@given(st.lists(st.integers(1, 1000), min_size=8, max_size=200))
@settings(max_examples=50, deadline=None)
def test_halves_of_a_batch_are_balanced_up_to_one_sample(sizes):
    sizes = np.array(sizes[: 2 ** (len(sizes).bit_length() - 1)])
    dealt = sizes[np.argsort(spread_evenly(sizes))]
    half = len(sizes) // 2
    assert abs(dealt[:half].sum() - dealt[half:].sum()) <= sizes.max()


def test_documents_of_shards_are_packed(tmp_path):
    tokens = [list(range(n)) for n in (3, 4, 5)]
    pl.DataFrame({"tokens": tokens}).write_parquet(tmp_path / "a.parquet")
    (inputs, _), _ = taken(shards(tmp_path).pack(6), 1, shuffle=False)
    assert inputs.tolist() == [[0, 1, 2, 0, 1, 2]]


def test_array_records_are_bytes_that_a_function_decodes(tmp_path):
    module = pytest.importorskip(
        "array_record.python.array_record_module", reason="the extra data"
    )
    writer = module.ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for number in range(40):
        writer.write(np.array([number, number + 1], np.float32).tobytes())
    writer.close()

    def decode(content):
        return np.frombuffer(content, np.float32)

    dataset = shards(
        tmp_path, inputs="record", target="record", decode={"record": decode}
    )
    (inputs, _), _ = taken(dataset, 40)
    assert sorted(inputs[:, 0].tolist()) == list(range(40))


def test_prepared_records_are_maps_of_columns(tmp_path):
    module = pytest.importorskip(
        "array_record.python.array_record_module", reason="the extra data"
    )
    import msgpack

    path = tmp_path / "train.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for n in range(10):
        row = {"lepton.row": n, "a": n / 2, "tokens": [n, n + 1], "label": n % 2}
        writer.write(msgpack.packb(row))
    writer.close()
    listed = [{"path": path.name, "split": "train", "sha256": "0"}]
    manifest = {"shards": listed, "inputs": ["a"], "target": "label"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (inputs, targets), _ = taken(shards(tmp_path), 4, shuffle=False)
    assert inputs.tolist() == [[0], [0.5], [1], [1.5]]
    assert targets.tolist() == [0, 1, 0, 1]

    lists = shards(tmp_path, inputs={"x": "tokens"}, target="label")
    assert taken(lists, 2, shuffle=False)[0][0]["x"].tolist() == [[0, 1], [1, 2]]


def test_a_recipe_takes_what_preparation_gave(tmp_path):
    write(tmp_path, 30)

    class Prepared:
        folder = tmp_path
        manifest = {}  # noqa: RUF012

    listed = [{"path": "train-0.parquet", "split": "train", "sha256": "0"}]
    manifest = {"shards": listed, "inputs": ["half", "number"], "target": "label"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert settled(Prepared()).epoch_samples == 10
    assert shards(Prepared(), "train").epoch_samples == 10


def test_a_manifest_says_what_is_in_a_split(tmp_path):
    write(tmp_path / "shards", 30)
    listed = [
        {"path": f"shards/train-{i}.parquet", "split": split, "sha256": str(i)}
        for i, split in enumerate(["train", "train", "test"])
    ]
    manifest = {"shards": listed, "inputs": ["half"], "target": "label"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    dataset = shards(tmp_path, "train")
    assert dataset.epoch_samples == 20
    (inputs, targets), _ = taken(dataset, 3, shuffle=False)
    assert inputs.tolist() == [[0], [0.5], [1]] and targets.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        shards(tmp_path, "tset")


def mistakes(folder):
    write(folder / "good", 20, text=pl.lit("a"), gap=pl.lit(None, pl.Int64))
    (folder / "bad").mkdir()
    (folder / "bad" / "a.parquet").write_bytes(b"no such thing")
    (folder / "empty").mkdir()
    good = folder / "good"
    return {
        "no such folder": lambda: shards(folder / "none"),
        "there are no shards": lambda: shards(folder / "empty"),
        "can't be read": lambda: shards(folder / "bad"),
        "did you mean 'label'": lambda: shards(good, target="labl"),
        "inputs, but no targets": lambda: taken(shards(good, inputs="half"), 1),
        "bytes or text": lambda: taken(shards(good, inputs="text", target="label"), 1),
        "20 missing|7 missing|6 missing": lambda: taken(
            shards(good, inputs="gap", target="label"), 1
        ),
    }


@pytest.mark.parametrize(
    "message",
    [
        "no such folder",
        "there are no shards",
        "can't be read",
        "did you mean 'label'",
        "inputs, but no targets",
        "bytes or text",
        "20 missing|7 missing|6 missing",
    ],
)
def test_mistakes_are_named(message, tmp_path):
    with pytest.raises(DataError, match=message):
        mistakes(tmp_path)[message]()


def test_a_lost_shard_is_an_error_with_its_name(tmp_path):
    write(tmp_path, 100)
    stream = open_stream(shards(tmp_path, inputs="half", target="label"))
    (tmp_path / "train-2.parquet").unlink()
    with pytest.raises(DataError, match=r"the shard is gone(.|\n)*train-2"):
        stream.take(100)


# ---- the cache ----


def read_through(folder, cache_folder, size, rounds):
    cache = DiskCache(cache_folder, size)
    for _ in range(rounds):
        for file in sorted(folder.glob("*.parquet")):
            content = cache.copied(file, file.stem, Path.read_bytes)
            assert content == file.read_bytes()
            with cache._locked("folder"):
                used = sum(copy.stat().st_size for copy in cache_folder.glob("*.copy"))
            assert used <= size


def test_a_cache_that_many_share_keeps_its_limit_and_gives_the_right_bytes(tmp_path):
    write(tmp_path / "data", 900, files=6)
    size = 3 * (tmp_path / "data" / "train-0.parquet").stat().st_size
    arguments = (tmp_path / "data", tmp_path / "cache", size, 20)
    # a lock on an open file keeps threads apart just as it does processes
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read_through, *arguments) for _ in range(4)]
    for reader in readers:
        reader.result()
    assert not list((tmp_path / "cache").glob("*.part"))


def test_shards_are_read_from_their_copies(tmp_path):
    write(tmp_path / "data", 60)
    cache = DiskCache(tmp_path / "cache", 1e6)
    dataset = shards(tmp_path / "data", inputs="half", target="label", cache=cache)
    first = taken(dataset, 60)[0][0]
    assert len(list((tmp_path / "cache").glob("*.copy"))) == 3
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    np.testing.assert_array_equal(taken(dataset, 60)[0][0], first)


# ---- pictures ----


def picture_folder(folder, count=12):
    image = pytest.importorskip("PIL.Image", reason="the extra image")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            height, width = random.integers(20, 90, 2)
            pixels = np.full((height, width, 3), 40 if name == "cat" else 200, np.uint8)
            image.fromarray(pixels).save(folder / name / f"{i:02}.jpg")
    return folder


def test_a_folder_a_class_gives_pixels_and_labels(tmp_path):
    dataset = pictures(picture_folder(tmp_path), 16, 24)
    (pixels, labels), names = taken(dataset, 24)
    assert pixels.shape == (24, 16, 24, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(labels, (pixels[:, 0, 0, 0] > 100).astype(np.int32))
    assert len(set(names)) == 24 and dataset.epoch_samples == 24


def test_crop_keeps_the_middle_and_the_camera_orientation():
    image = pytest.importorskip("PIL.Image", reason="the extra image")
    import io

    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    out = io.BytesIO()
    exif = image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    image.fromarray(pixels).save(out, "png", exif=exif)
    upright = Picture(80, 40)(out.getvalue())
    assert upright[10].mean() < 20 and upright[70].mean() > 235
    middle = Picture(8, 8, channels=1, fit="crop")(out.getvalue())
    assert middle.shape == (8, 8, 1) and middle[0].mean() < 20 < 235 < middle[-1].mean()


def test_a_broken_picture_is_named(tmp_path):
    folder = picture_folder(tmp_path)
    (folder / "cat" / "99.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DataError, match=r"can't be read(.|\n)*99\.jpg"):
        taken(pictures(folder, 8, 8), 25)


def test_the_feed_of_a_disk_is_the_stream_however_many_threads_read(tmp_path):
    import jax

    write(tmp_path, 300)
    dataset = shards(tmp_path, inputs="number", target="label")
    stream = open_stream(dataset, shuffle=True)
    expected = np.concatenate([stream.take(40)[0][0] for _ in range(6)])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for workers in (1, 3):
        feed = open_feed(
            dataset.within(workers=workers),
            batch_size=40,
            steps=2,
            sharding=device,
            shuffle=True,
            blocks=3,
        )
        blocks = [np.asarray(block[0]).reshape(-1) for block in feed]
        np.testing.assert_array_equal(np.concatenate(blocks), expected)
        feed.close()


def test_a_mixture_holds_no_more_than_one_source(tmp_path):
    datasets = {}
    for i in range(5):
        write(tmp_path / str(i), 200, files=1, group=8)
        datasets[f"s{i}"] = shards(tmp_path / str(i), inputs="number", target="label")
    mixed = mix(datasets, weights=dict.fromkeys(datasets, 1))
    assert mixed.sources == 5
    groups = Groups(np.full(100, 8), 100 * 2**20)
    assert 5 * groups.width(5) <= groups.width(1)
    stream = open_stream(mixed.within(memory=2000), shuffle=True)
    rows, _ = stream.take(300)
    assert stream.held.bytes <= 1000
    np.testing.assert_array_equal(rows[1], rows[0] % 7)


def test_prepared_shards_of_wide_rows_have_small_groups(tmp_path):
    from lepton_jax.data.prepare.shards import write_shards

    random = np.random.default_rng(0)
    cells = [random.bytes(50_000) for _ in range(300)]
    table = pl.DataFrame(
        {"lepton.source": [0] * 300, "lepton.row": range(300), "picture": cells}
    )
    write_shards(tmp_path, "0", table, ["picture"], "parquet")
    dataset = shards(tmp_path, "shards", inputs="picture")
    sizes = dataset.data.groups.sizes
    assert sizes.sum() == 300 and 70 < sizes.max() < 90
