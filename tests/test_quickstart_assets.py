"""The quickstart's assets from a synthetic archive: parser, splits, soft labels; no download."""

import io
import subprocess
import tarfile

import pytest
import torch

from nlhf import quickstart

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def make_archive(path, rows, votes=None):
    """rows: (text, [scores]); the layout of the real source distribution."""
    stem = "hutto_ICWSM_2014/movieReviewSnippets_"
    truth = "".join(f"{i}\t0.0\t{text}\r\n" for i, (text, _) in enumerate(rows))
    lines = (f"{i}\t0.0\t1.0\t{scores}\r\n" for i, (_, scores) in enumerate(rows))
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, stem + "GroundTruth.txt", truth.encode())
        add(archive, stem + "anonDataRatings.txt", (votes or "".join(lines)).encode())
    base = "vaderSentiment-3.3.2"
    with tarfile.open(path, "w:gz") as archive:
        lexicon = "good\t1.9\t0.9\t[2]\nbad\t-2.5\t0.7\t[-3]\n:(\t-2.2\t0.7\t[-2]\n"
        add(archive, f"{base}/vaderSentiment/vader_lexicon.txt", lexicon.encode())
        add(archive, f"{base}/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    rows = [(" ".join([*WORDS[:7], str(i), *WORDS]), [i % 9 - 4, 0]) for i in range(400)]
    rows = [(f"{i} {text}", votes) for i, (text, votes) in enumerate(rows)]
    return quickstart.parse_ratings(make_archive(tmp_path_factory.mktemp("a") / "r.tar.gz", rows))


def test_parser(tmp_path):
    rows = [("a  café", [1, 2, 2]), ("b", [-4, 4]), ("b ", [4])]
    ratings = quickstart.parse_ratings(make_archive(tmp_path / "r.tar.gz", rows))
    assert ratings.texts == ["a café", "b"]
    # a text that occurs twice has the raters of both
    torch.testing.assert_close(
        ratings.histograms[1], torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 2]).double() / 3
    )
    assert ratings.valence["bad"] == -2.5


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        ("0\t0\t1\t[1]\r\n", "shorter"),
        ("0\t0\t1\t[1]\r\n2\t0\t1\t[1]\r\n", "has the ratings of"),
        ("0\t0\t1\t[1]\r\n1\t0\t1\t[]\r\n", "at least one"),
        ("0\t0\t1\t[1]\r\n1\t0\t1\t[-5]\r\n", "from -4 to 4"),
        ("0\t0\t1\t[1]\r\n1\t0\t1\t[5]\r\n", "not the ratings"),
        ("0\t0\t1\t[1]\r\n1\t0\r\n", "not the ratings"),
    ],
)
def test_parser_refuses(tmp_path, votes, words):
    path = make_archive(tmp_path / "r.tar.gz", [("a", [1]), ("b", [1])], votes)
    with pytest.raises(ValueError, match=words):
        quickstart.parse_ratings(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="delete it and try again"):
        quickstart.parse_ratings(path)


def test_probability_is_that_of_two_raters(tmp_path):
    scores = [[3, 3, -1], [3, 0], [-4], [2, 2, 2, 1]]
    rows = [(f"text {i}", votes) for i, votes in enumerate(scores)]
    ratings = quickstart.parse_ratings(make_archive(tmp_path / "r.tar.gz", rows))
    for i, a in enumerate(scores):
        for j, b in enumerate(scores):
            want = sum((x > y) + (x == y) / 2 for x in a for y in b) / (len(a) * len(b))
            got = ratings.probability(torch.tensor([i]), torch.tensor([j]))
            assert got.item() == pytest.approx(want, abs=1e-12)


def test_splits_are_disjoint(ratings):
    parts = [
        ratings.part("train"),
        ratings.part("train", held_out=True),
        ratings.part("judge"),
        ratings.part("judge", held_out=True),
        ratings.part("prompts"),
    ]
    assert all(parts)
    assert sorted(row for part in parts for row in part) == list(range(len(ratings.texts)))
    assert 0.25 < len(ratings.part("prompts")) / len(ratings.texts) < 0.35

    train, held_out = ratings.prompts()
    assert not {*train} & {*held_out}
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert all(len(prompt.split()) == quickstart.PROMPT_WORDS for prompt in train + held_out)
    sources = {" ".join(ratings.texts[i].split()[:7]) for i in ratings.part("prompts")}
    assert {*train, *held_out} <= sources


def test_pairs(ratings):
    rows = ratings.part("train")
    pairs = ratings.pairs(rows, 3)
    assert len(pairs) == 3 * len(rows)
    assert {*pairs.chosen, *pairs.rejected} == {ratings.texts[i] for i in rows}
    assert all(a != b for a, b in zip(pairs.chosen, pairs.rejected, strict=True))
    assert {*pairs.prompt} == {quickstart.INSTRUCTION}
    assert pairs == ratings.pairs(rows, 3)
    assert pairs != ratings.pairs(rows, 3, seed=1)


def test_lexicon():
    lexicon = quickstart.Lexicon({"good": 1.9, "bad": -2.5})
    assert lexicon("nothing known") == 0.0
    assert lexicon("Good, 'good'!") == pytest.approx(3.8 / (3.8**2 + 15) ** 0.5)
    assert lexicon("bad") < 0
    assert quickstart.lexicon_score("bad", lexicon.valence) == lexicon("bad")


def test_pip_failures(monkeypatch, tmp_path):
    monkeypatch.setenv("NLHF_CACHE", str(tmp_path / "cache"))
    calls = []

    def run(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "x\nERROR: no network\nERROR: more\n")

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    with pytest.raises(
        ValueError, match=r"could not download vadersentiment.*: ERROR: no network;"
    ):
        quickstart.build()
    assert "--no-build-isolation" in calls[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]

    def wrong(command, **_):
        place = command[command.index("--dest") + 1]
        (quickstart.Path(place) / quickstart.RATINGS[1]).write_bytes(b"another file")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(quickstart.subprocess, "run", wrong)
    with pytest.raises(ValueError, match="is not the file expected"):
        quickstart.fetch_ratings()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
