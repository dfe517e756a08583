"""``nlhf solve`` and games in files."""

import numpy as np
import pytest

from nlhf import cli, tabular
from nlhf.tabular import comparison, fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def solve(capsys, *arguments):
    cli.main(["solve", *map(str, arguments)])
    return capsys.readouterr().out


def table(text, head):
    """The rows of the table whose first column is called ``head``, by their first cell."""
    lines = iter(text.splitlines())
    columns = next(line for line in lines if line.startswith(head)).split("  ")
    width = len([c for c in columns if c.strip()])
    rows = {}
    for line in lines:
        if not line.strip():
            return rows
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        assert len(cells) == width, line
        rows[cells[0]] = cells[1:]
    return rows


def test_a_fixture_is_solved_and_every_solver_compared(tmp_path, capsys):
    plot = tmp_path / "plot.png"
    text = solve(capsys, "three-types", "--tau", 0.05, "--iterations", 100, "--output", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tau 0.05" in text
    game = fixtures.three_types(tau=0.05)
    solution = tabular.solve(game)
    for name, cells in table(text, "action").items():
        wanted = solution.policy[game.names.index(name)].exp().item()
        assert float(cells[0]) == pytest.approx(wanted, rel=1e-5)
    exploited = table(text, "policy")
    for name, wanted in zip(game.names, tabular.pure_exploitability(game).tolist(), strict=True):
        assert float(exploited[f"always {name}"][0]) == pytest.approx(wanted, rel=1e-5)
    assert set(exploited) == {"always y1", "always y2", "always y3", "uniform", "equilibrium"}
    rows = table(text, "solver")
    assert list(rows) == list(tabular.SOLVERS)
    for name, solver in tabular.SOLVERS.items():
        policies = list(zip(range(101), solver.run(game), strict=False))
        assert rows[name][0] == solver.limit
        for column, k in ((2, 10), (3, 100)):
            wanted = tabular.kl(solution.policy, policies[k][1]).item()
            assert float(rows[name][column]) == pytest.approx(wanted, rel=0.06)
        wanted = tabular.exploitability(game, policies[100][1]).item()
        assert float(rows[name][4]) == pytest.approx(wanted, rel=0.06)


def test_chosen_solvers_and_a_reference(tmp_path, capsys):
    arguments = ("--solvers", "nash_mp, omd", "--ref", "0.5,0.3,0.2", "--iterations", 3)
    text = solve(capsys, "dice", *arguments, "--output", tmp_path / "p.svg")
    assert list(table(text, "solver")) == ["nash_mp", "omd"]
    assert [cells[1] for cells in table(text, "action").values()] == ["0.5", "0.3", "0.2"]


def test_a_large_game_shows_twenty_actions_and_says_so(tmp_path, capsys):
    path = tmp_path / "game.npy"
    game = fixtures.random(25)
    np.save(path, game.preference.numpy())
    text = solve(capsys, path, "--iterations", 2, "--output", tmp_path / "p.png")
    assert "The 20 most likely of 25 actions:" in text
    assert "the 20 least exploitable of 25 pure policies" in text
    shown = table(text, "action")
    assert len(shown) == 20
    assert next(iter(shown)) == str(tabular.solve(game).policy.argmax().item())
    assert len(table(text, "policy")) == 22


def test_several_contexts_are_summed_up(tmp_path, capsys):
    path = tmp_path / "game.npy"
    game = fixtures.random(4, 3)
    np.save(path, game.preference.numpy())
    text = solve(capsys, path, "--iterations", 2, "--output", tmp_path / "p.png")
    assert "Over all 3 contexts:" in text
    assert "The first context:" in text
    original = tabular.exploitability(game, tabular.solve(game).policy, 0.0)
    (line,) = [
        x for x in text.splitlines() if x.startswith("exploitability of the equilibrium, or")
    ]
    mean, largest = map(float, line.split()[-2:])
    assert mean == pytest.approx(original.mean().item(), rel=1e-5)
    assert largest == pytest.approx(original.max().item(), rel=1e-5)


def test_where_no_reward_fits_the_others_go_on(tmp_path, capsys):
    path = tmp_path / "game.csv"
    path.write_text("good,bad\n0.5,1\n0,0.5\n")
    text = solve(capsys, path, "--iterations", 12, "--output", tmp_path / "p.png")
    assert table(text, "solver")["rlhf"][2:5] == ["-", "-", "-"]
    assert "rlhf has no result: bradley_terry: the fit diverges: 'good' and 0 more" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dise"], "do you mean dice?"),
        (["dice", "--solvers", "nash_mpp"], "do you mean nash_mp?"),
        (["dice", "--tau", "0"], "tau must be above 0, got 0.0"),
        (["dice", "--tau", "-1"], "tau must be a number, at least 0 and finite, got -1.0"),
        (["dice", "--ref", "0.5,0.5"], "one probability for each of the 3 actions"),
        (["dice", "--ref", "a,b"], "--ref must be numbers with commas between, got 'a,b'"),
        (["dice", "--iterations", "0"], "iterations must be at least 1, got 0"),
        (["dice", "--output", "plot.txt"], "--output must end in .png, .pdf or .svg"),
        (["dice", "--output", "/nowhere/at/all.png"], "there is no folder /nowhere/at"),
        (["missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["solve", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nlhf: ")
    assert error.count("\n") == 1


PLAIN = "0.5,0.7\n0.3,0.5\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (PLAIN, ("0", "1")),
        ("\ufeff" + PLAIN.replace("\n", "\r\n"), ("0", "1")),
        ("yes,no\n" + PLAIN, ("yes", "no")),
        ("10,20\n" + PLAIN, ("10", "20")),
        ("yes,0.5,0.7\n\nno,0.3,0.5\n", ("yes", "no")),
        (",yes,no\nyes,0.5,0.7\nno,0.3,0.5\n", ("yes", "no")),
        ("action,yes,no\nyes,0.5,0.7\nno,0.3,0.5\n", ("yes", "no")),
        (',"a, b",2\n"a, b",0.5,0.7\n2,0.3,0.5\n', ("a, b", "2")),
    ],
)
def test_a_csv_is_read_with_and_without_names(text, names, tmp_path):
    path = tmp_path / "game.csv"
    path.write_text(text, encoding="utf-8", newline="")
    game = tabular.read(path, tau=0.3)
    assert game.preference.tolist() == [[0.5, 0.7], [0.3, 0.5]]
    assert (game.names, game.tau) == (names, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.7\n0.3,x5\n", "game.csv: line 2, column 2: 'x5' is no number"),
        ("0.5,0.7,.1\nx.3,0.5,.1\n.9,.9,.5\n", "line 2, column 1: 'x.3' is no number"),
        ("a,b\n0.5,1.7\n0.3,0.5\n", r"line 2, column 2: a preference must be in \[0, 1\], got 1.7"),
        ("a,0.5,nan\nb,0.3,0.5\n", r"line 1, column 3: a preference must be in \[0, 1\], got nan"),
        (
            "0.5,0.7\n0.4,0.5\n",
            r"game.csv: MatrixGame: preference\[0, 1\] = 0.7 and its mirror 0.4",
        ),
        ("0.5,0.7\n0.3\n", "line 2 has 1 columns, the first has 2"),
        ("0.5,0.7,0.5,0.1\n0.3,0.5,0.2,0.1\n", "as many lines as columns"),
        (",a,b\na,0.5,0.7\nc,0.3,0.5\n", "the names above and before differ"),
        ("\n\n", "no lines in it"),
    ],
)
def test_a_bad_csv_is_named_with_line_and_column(text, message, tmp_path):
    path = tmp_path / "game.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tabular.read(path)


def test_bad_arrays_are_named(tmp_path):
    path = tmp_path / "game.npy"
    for content, message in ((b"", "not an array"), (b"nonsense", "not an array")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"game\.npy: {message}"):
            tabular.read(path)
    for array in (np.zeros(3), np.array([["a"]]), np.zeros((2, 2), dtype=complex)):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"must hold real numbers \(Y, Y\) or \(X, Y, Y\)"):
            tabular.read(path)
    np.save(path, np.full((2, 2), 0.7))
    with pytest.raises(ValueError, match=r"game\.npy: MatrixGame: preference\[0, 0\] = 0.7"):
        tabular.read(path)
    with pytest.raises(ValueError, match=r"must end in \.csv or \.npy"):
        tabular.read(tmp_path / "game.txt")


def test_points_are_the_columns_of_the_table_and_the_ends():
    for iterations in (1, 7, 10, 1000, 5000):
        points = comparison._points(iterations)
        assert points == sorted(set(points))
        assert (points[0], points[-1]) == (0, iterations)
        assert {k for k in (10, 100, 1000) if k <= iterations} <= set(points)
