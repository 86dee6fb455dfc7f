"""Ratings and clicks of a person's own: what is learned, counted and refused."""

from __future__ import annotations

import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.errors import DataError, LeptonError, RecipeError
from recipes import _ratings, click_through, recommender

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEAD = "userId,movieId,rating,timestamp"
ROWS = [
    f"u{i % 6},m{(i * 7 + i // 6) % 9},{1 + i % 9 / 2},{1000 * i}" for i in range(54)
]


@pytest.fixture
def write(tmp_path):
    def to_file(rows, head=HEAD, name="ratings.csv"):
        path = tmp_path / name
        path.write_text("\n".join([head, *rows]) + "\n")
        return path

    return to_file


def read(path, **settings):
    counts = _ratings.Counts()
    given = {"rating": "rating", "time": "timestamp"} | settings
    asked = _ratings.Asked(path, "userId", "movieId", **given)
    return _ratings.read(asked, counts), counts.lines


# ---- what is learned ----


def test_ratings_are_predicted_with_sessions(write, capsys):
    recipe = recommender.recipe(write(ROWS * 2), steps=20, batch_size=8, members=2)
    assert "explicit feedback: the ratings have 9 values" in capsys.readouterr().err
    assert set(recipe.train.inputs) == {"user", "item", "session"}
    trainer = lepton.Trainer(recipe, devices=1)
    history = trainer.fit()
    assert np.isfinite(history.metrics["rmse"])
    given = {"user": "u1", "item": "m3", "time": 500.0}
    assert trainer.predict(given).shape == (1,), "from a raw row"


def test_items_are_ranked_and_those_used_are_left_out(write, tmp_path):
    items = write(
        [f"m{i},Film {'abc'[i % 3]} (19{i}0),x|y{i % 2}" for i in range(11)],
        "movieId,title,genres",
        "movies.csv",
    )
    recipe = recommender.recipe(
        write(ROWS),
        items=items,
        steps=4,
        batch_size=8,
        history=3,
        dim=4,
        samples=8,
    )
    trainer = lepton.Trainer(recipe, devices=1)
    metrics = trainer.fit().metrics
    assert 0 <= metrics["ndcg_10"] <= metrics["hit_rate_10"] <= 1
    assert recipe.model.args[1] == 11, "items that nobody has used are candidates"
    first = trainer.predict(recipe.test.inputs)
    used = recipe.model.keywords["used"]
    for user, ranked in zip(recipe.test.inputs["user"], first, strict=True):
        best = ranked[: 11 - len(used[user])]
        assert not set(best.tolist()) & set(used[user])


@pytest.mark.parametrize("negatives", ["all", "in_batch"])
@pytest.mark.parametrize("loss", ["softmax", "contrastive"])
def test_each_loss_takes_each_kind_of_negatives(write, negatives, loss):
    recipe = recommender.recipe(
        write(ROWS),
        feedback="implicit",
        negatives=negatives,
        loss=loss,
        steps=2,
        batch_size=8,
        dim=4,
        history=2,
    )
    history = lepton.Trainer(recipe, devices=1).fit()
    assert np.isfinite(history["loss"]).all()


def test_a_history_holds_what_came_before_and_never_the_item_itself(write):
    rows, _ = read(write(ROWS))
    counts = _ratings.Counts()
    pairs = _ratings.pairs_of(rows, 0, (), counts)
    parts = _ratings.split(pairs, "last", 0.1, 0, counts)
    train, test = _ratings.histories(pairs, parts, 4)
    for user in range(len(pairs.users)):
        mine = pairs.item[(pairs.user == user) & parts.train].tolist()
        of_user = train[pairs.user[parts.train] == user]
        for position, history in enumerate(of_user.tolist()):
            before = mine[:position][::-1][:4]
            assert history == before + [-1] * (4 - len(before))
        assert test[user].tolist() == mine[::-1][:4]


@pytest.mark.parametrize("how", ["last", "random"])
def test_one_item_of_each_user_is_held_out_and_validation_leaves_it_alone(write, how):
    rows, _ = read(write(ROWS))
    counts = _ratings.Counts()
    pairs = _ratings.pairs_of(rows, 0, (), counts)
    parts = _ratings.split(pairs, how, 0.1, 0, counts)
    assert pairs.user[parts.test].tolist() == list(range(6))
    if how == "last":
        ends = np.flatnonzero(np.diff(pairs.user, append=99))
        assert np.flatnonzero(parts.test).tolist() == ends.tolist()
    choosing = _ratings.split(pairs, how, 0.1, 0, counts, validation=True)
    assert not (choosing.train | choosing.test)[parts.test].any()


def test_new_items_are_held_out_whole_and_are_the_only_candidates(write):
    rows, _ = read(write(ROWS))
    counts = _ratings.Counts()
    pairs = _ratings.pairs_of(rows, 0, (), counts)
    parts = _ratings.split(pairs, "new_items", 0.3, 0, counts)
    new = set(np.flatnonzero(parts.candidates).tolist())
    assert set(pairs.item[parts.test].tolist()) == new
    assert not new & set(pairs.item[parts.train].tolist())
    for items in _ratings.used_items(pairs, parts):
        assert set(range(9)) - new <= set(items)


# ---- bad files: left out and counted ----


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("u1,,3,1", "1 rows without item, left out"),
        (",m1,3,1", "1 rows without user, left out"),
        ("u1,m1,,1", "1 rows without rating, left out"),
        ("u1,m1,NaN,1", "1 rows without rating, left out"),
        ("u1,m1,inf,1", "1 rows without rating, left out"),
        ("u1,  ,3,1", "1 rows without item, left out"),
    ],
)
def test_a_bad_row_is_counted_or_an_error(write, row, line):
    path = write([*ROWS, row])
    rows, lines = read(path)
    assert rows.height == len(ROWS)
    assert lines == [line]
    with pytest.raises(DataError, match="1 rows have no"):
        read(path, skip_bad=False)


def test_of_several_ratings_of_a_pair_the_one_that_is_asked_for_counts(write):
    path = write([*ROWS, "new,film,2,50", "new,film,4,70", "new,film,3,60"])
    for which, rating in (("last", 4.0), ("first", 2.0)):
        rows, lines = read(path, duplicates=which)
        own = rows.filter(rows["user"] == "new")
        assert own["rating"].to_list() == [rating]
        assert lines == [f"2 ratings of a pair that has another; the {which} counts"]
    with pytest.raises(DataError, match="have one already"):
        read(path, duplicates="error")


def test_names_that_look_like_numbers_stay_names(write):
    rows, _ = read(write(["007,7,3,1", "7,seven,4,2", "7.0,7,2,3"]))
    assert sorted(rows["user"]) == ["007", "7", "7.0"]
    assert sorted(set(rows["item"])) == ["7", "seven"]


def test_ratings_below_nought_are_ratings(write):
    rows, lines = read(write(["a,x,-3,1", "b,y,5,2"]))
    assert rows["rating"].to_list() == [-3, 5]
    assert not lines
    liked, lines = read(write(["a,x,-3,1", "b,y,5,2"]), least_rating=0)
    assert liked["user"].to_list() == ["b"]
    assert lines == ["1 ratings below 0, no sign of liking"]


def test_ratings_without_a_time_are_taken_as_the_oldest(write):
    rows, _ = read(write(["a,x,3,", "a,y,4,9", "b,x,2,5"]))
    counts = _ratings.Counts()
    pairs = _ratings.pairs_of(rows, 0, (), counts)
    assert counts.lines == ["1 ratings without a time, taken as the oldest"]
    assert [pairs.items[i] for i in pairs.item] == ["x", "y", "x"]


def test_users_with_one_item_and_items_of_one_table_alone_are_counted(write):
    rows, _ = read(write(["a,x,3,1", "a,y,4,2", "b,x,3,1"]))
    counts = _ratings.Counts()
    pairs = _ratings.pairs_of(rows, 0, ["x", "z"], counts)
    _ratings.split(pairs, "last", 0.1, 0, counts)
    features = _ratings.features_of(pairs.items, {"x": ("f",), "z": ("f",)}, counts)
    assert features == ((0,), (), (0,))
    assert counts.lines == [
        "1 items of the table of items that nobody has used",
        "1 users with one item, in training alone",
        "1 items that have no features",
    ]


def test_rows_of_the_table_of_items_that_say_nothing_are_counted(write):
    path = write([",Film,x", "m1,Old,x", "m1,New,y"], "movieId,title,genres")
    counts = _ratings.Counts()
    found = _ratings.read_items(path, "movieId", ["title"], ["genres"], counts)
    assert found == {"m1": ("title=old", "genres=x")}
    assert counts.lines == [
        "1 rows of the table of items without an item, left out",
        "1 rows of items that are there already; the first counts",
    ]


# ---- bad files: refused ----

TEXT = [f"u{i % 5},m{i % 4},{'good' if i % 2 else 'bad'},{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "head", "settings", "what"),
    [
        (["a,x,3,1", "a,y,4,2"], HEAD, {}, "there is one user, 'a'"),
        (["a,x,3,1", "b,x,4,2"], HEAD, {}, "there is one item, 'x'"),
        ([",x,3,1", "b,,4,2"], HEAD, {}, "no row is left"),
        (TEXT, HEAD, {}, "no numbers"),
        (ROWS, "user,movieId,rating,timestamp", {}, "did you mean 'user'"),
        (ROWS, HEAD, {"item": "userId"}, "different columns"),
        (ROWS, HEAD, {"time": "none", "split": "last"}, "no column of times"),
        (ROWS, HEAD, {"split": "time"}, "for ratings"),
        (ROWS, HEAD, {"rating": "none", "feedback": "explicit"}, "no column of rat"),
        (ROWS, HEAD, {"rating": "none", "least_rating": 3}, "no column of ratings"),
        (ROWS, HEAD, {"feedback": "both"}, "feedback is 'both'"),
        (ROWS, HEAD, {"duplicates": "some"}, "duplicates is 'some'"),
        (["a,x,3,1", "b,y,4,2"], HEAD, {}, "nothing to test on"),
    ],
)
def test_ratings_that_cannot_be_ranked_are_refused(write, rows, head, settings, what):
    given = {"feedback": "implicit"} | settings
    with pytest.raises(LeptonError, match=what) as error:
        recommender.recipe(write(rows, head), **given)
    assert error.value.remedy


CLICKS = "label,count,site"


@pytest.mark.parametrize(
    ("rows", "head", "settings", "what"),
    [
        (["1,2,a"] * 9 + ["0,3,b"] * 9, "click,count,site", {}, "no column 'label'"),
        (["1,2,a"] * 20, CLICKS, {}, "has 1 classes"),
        ([f"{i % 3},2,a" for i in range(30)], CLICKS, {}, "has 3 classes"),
        (["1,2,a"] * 9 + ["0,3,b"] * 9, CLICKS, {"model": "dnn"}, "model is 'dnn'"),
        (["1"] * 9 + ["0"] * 9, "label", {}, "no column is left"),
    ],
)
def test_clicks_that_cannot_be_used_are_refused(write, rows, head, settings, what):
    with pytest.raises((DataError, RecipeError), match=what) as error:
        click_through.recipe(write(rows, head), **settings)
    assert error.value.remedy


@pytest.mark.parametrize("model", ["dcn", "dlrm", "fm", "lr", "wide_deep"])
def test_each_click_model_learns_from_counts_and_categories(model):
    recipe = click_through.recipe(model=model, members=2, steps=3, batch_size=64)
    history = lepton.Trainer(recipe, devices=1).fit()
    assert 0 < history.metrics["auc"] < 1
