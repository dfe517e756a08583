"""What mutants of ``nlhf.tabular.comparison`` got past every other test: each line and stroke."""

import struct
import sys

import pytest
import torch

from nlhf import tabular
from nlhf.tabular import comparison
from nlhf.tabular.comparison import Curve
from nlhf.tabular.equilibrium import Solution

pytestmark = pytest.mark.usefixtures("one_thread")
P = [[0.5, 0.2, 0.9], [0.8, 0.5, 0.3], [0.1, 0.7, 0.5]]
# the first action wins, the others are alike
Q = [[0.5, 0.6, 0.8], [0.4, 0.5, 0.5], [0.2, 0.5, 0.5]]
NAMES = ("rock", "paper", "scissors")
# of P, its equilibrium taken to be (.5, .3, .2)
EXPLOITED = """\
Exploitability in the original game, max_y P(y > policy) - 1/2:
policy           exploitability
always rock      0.3
always paper     0.2
always scissors  0.4
uniform          0.0333333
equilibrium      0.11"""


def solver(name, limit, policies=iter, queries=1):
    cited = f"{name} et al."
    return tabular.Solver(name, lambda game: policies(game), limit, cited, queries=queries)


def solution(policy, residual, distance):
    policy = torch.tensor(policy, dtype=torch.float64)
    certificate = (torch.tensor(x, dtype=torch.float64) for x in (residual, distance))
    return Solution(policy.log(), *certificate, iterations=7)


# ---- the way of a solver


def test_points_are_even_in_the_logarithm_and_have_the_columns():
    assert comparison._points(1) == [0, 1]
    assert comparison._points(12) == list(range(13))
    points = comparison._points(10_000)
    assert points == sorted({0, 10, 100, 1000} | {round(10 ** (4 * k / 90)) for k in range(91)})
    assert len(points) == 80


def test_a_curve_has_means_over_the_contexts_and_no_policy_too_many(monkeypatch):
    game = tabular.MatrixGame([P, Q], tau=0.5)
    target = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    policies = [game.log_ref, torch.stack([target[0], game.log_ref[1]]), target, target]
    asked, bars = [], []

    def walk(game):
        for k, policy in enumerate(policies):
            asked.append(k)
            yield policy

    def fails(game):
        yield game.log_ref
        raise ValueError("there is no reward")

    class Bar(comparison.Progress):
        def __init__(self, title, total, *, show):
            bars.append([title, total, show, 0])
            super().__init__(title, total, show=False)

        def advance(self):
            bars[-1][3] += 1

    monkeypatch.setattr(comparison, "Progress", Bar)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    solvers = [solver("walk", "mixture", walk), solver("none", "iterates", fails)]
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)  # noqa: B023
        curves = comparison.compare(game, target, solvers, 2)
    assert asked == [0, 1, 2] * 2
    assert bars == [["solvers", 6, False, 4], ["solvers", 6, True, 4]]

    def measured(policy):
        yield tabular.kl(target, policy).mean().item()
        yield tabular.exploitability(game, policy).mean().item()
        yield tabular.exploitability(game, policy, 0.0).mean().item()

    columns = [list(column) for column in zip(*map(measured, policies[:3]), strict=True)]
    assert curves[0] == Curve(solvers[0], [0, 1, 2], *columns, "")
    start = ([column[0]] for column in columns)
    assert curves[1] == Curve(solvers[1], [0], *start, "there is no reward")


# ---- the tables


def test_every_line_about_one_context():
    game = tabular.MatrixGame(P, ref=[0.25, 0.25, 0.5], tau=0.5, names=NAMES)
    found = solution([0.5, 0.3, 0.2], 0.0123, 0.00456)
    regularised = tabular.exploitability(game, found.policy).item()
    assert (
        "\n".join(comparison.describe(game, found))
        == f"""\
3 actions, 1 context, tau 0.5

Equilibrium, within 0.0046 in total variation
(certified by the span 0.012 of log pi - log BR(pi),
7 Newton steps); exploitability {regularised:.3g} in the
regularised game, 0.11 in the original one.

action    equilibrium  reference
rock      0.5          0.25
paper     0.3          0.25
scissors  0.2          0.5

{EXPLOITED}"""
    )


def test_every_line_about_several_contexts():
    game = tabular.MatrixGame([[P], [Q]], tau=0.5, names=NAMES)
    policies = [[[0.5, 0.3, 0.2]], [[0.25, 0.25, 0.5]]]
    found = solution(policies, [[0.0123], [0.02]], [[0.00456], [0.006]])
    regularised = tabular.exploitability(game, found.policy)
    # the best pure policy is paper in one context; in the other rock, which nothing beats
    assert (
        "\n".join(comparison.describe(game, found))
        == f"""\
3 actions, 2 contexts, tau 0.5

Over all 2 contexts:
                                                            mean       largest
distance of the solution to the exact equilibrium, at most  0.00528    0.006
exploitability of the equilibrium, regularised game         {regularised.mean():.6g}  0.0665362
exploitability of the equilibrium, original game            0.1425     0.175
exploitability of the uniform policy, original game         0.0833333  0.133333
exploitability of the best pure policy, original game       0.1        0.2

The first context:
Equilibrium, within 0.0046 in total variation
(certified by the span 0.012 of log pi - log BR(pi),
7 Newton steps); exploitability {regularised[0].item():.3g} in the
regularised game, 0.11 in the original one.

action    equilibrium  reference
rock      0.5          0.333333
paper     0.3          0.333333
scissors  0.2          0.333333

{EXPLOITED}"""
    )


@pytest.mark.parametrize("actions", [20, 21])
def test_of_more_than_twenty_actions_the_first_twenty_are_shown(actions):
    """By how likely they are, and how little exploitable; those that are alike in their order."""
    share = [1.0 / (i % 5 + 1) for i in range(actions)]
    wins = [[0.5 + 0.1 * (i % 4 - j % 4) for j in range(actions)] for i in range(actions)]
    game = tabular.MatrixGame(wins, tau=0.5)
    found = solution([x / sum(share) for x in share], 0.1, 0.1)
    lines = list(comparison.describe(game, found))
    shown = [line.split()[0] for line in lines if line[:1].isdigit() and "actions" not in line]
    always = [line.split()[1] for line in lines if line.startswith("always")]
    likely, hard = range(actions), range(actions)
    said = [
        f"The 20 most likely of {actions} actions:",
        f"(the 20 least exploitable of {actions} pure policies)",
    ]
    if actions > 20:
        likely = sorted(likely, key=lambda i: i % 5)
        hard = sorted(hard, key=lambda i: -(i % 4))
    assert [line in lines for line in said] == [actions > 20] * 2
    assert shown[-20:] == [str(i) for i in likely][:20]
    assert always == [str(i) for i in hard][:20]


def curves():
    at = [0, 1, 10, 30]
    return [
        Curve(solver("walk", "mixture"), at, [1, 0.5, 0.25, 0.1], [0.3, 0.2, 0.1, 0.05], [0.4] * 4),
        Curve(solver("none", "iterates", queries=12), [0], [1.0], [0.3], [0.4], "no reward"),
        Curve(
            solver("other", "mixture"), at, [1, 0.4, 2e-7, 0.0], [0.2, 0.1, 0.05, 0.03],
            [0.5, 0.35, 0.5, 0.5],
        ),
    ]  # fmt: skip


def test_every_line_about_the_solvers():
    table = """\
after so many iterations, and exploitability after 30 (regularised, original).
solver  limit     queries  KL 10    regularised  original  from
walk    mixture   1        2.5e-01  5.0e-02      4.0e-01   walk et al.
none    iterates  12       -        -            -         none et al.
other   mixture   1        2.0e-07  3.0e-02      5.0e-01   other et al.

mixture: the policy whose mixture with the reference is the equilibrium at tau / (1 - b)
iterates: no policy where preferences are cyclic: only the average nears an equilibrium
none has no result: no reward"""
    for wins, several in ((P, ""), ([P], ", means over the contexts")):
        text = "\n".join(comparison.summary(tabular.MatrixGame(wins), curves()))
        assert text == f"Solvers from the reference{several}: KL(pi*, policy)\n{table}"
    # a column whose iteration is the last one is there
    text = "\n".join(
        comparison.summary(
            tabular.MatrixGame(P),
            [Curve(solver("a", "mixture"), [0, 10], [1.0] * 2, [1.0] * 2, [1.0] * 2)],
        )
    )
    assert "KL 10 " in text


# ---- the plot


def test_every_stroke_of_the_plot(tmp_path, monkeypatch):
    from matplotlib import pyplot

    closed = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    path = tmp_path / "curves.png"
    comparison.plot(curves(), "A game", path)
    monkeypatch.undo()
    (figure,) = closed
    try:
        drawn(figure)
    finally:
        pyplot.close(figure)
    # 14 x 6 inches of 110 points
    assert struct.unpack(">2I", path.read_bytes()[16:24]) == (1540, 660)
    before = pyplot.get_fignums()
    comparison.plot(curves(), "A game", path)
    assert pyplot.get_fignums() == before


def drawn(figure):
    assert figure.get_suptitle() == "A game (values below 1e-18 are drawn there)"
    assert figure._suptitle.get_fontsize() == 11
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    assert [axis.get_title() for axis in figure.axes] == [
        "KL(equilibrium, policy)",
        "exploitability, regularised game",
        "exploitability, original game",
    ]
    names = ["walk (mixture)", "none (iterates)", "other (mixture)"]
    lowest = {"kl": 1e-18, "regularised": 0.03, "original": 0.35}
    tab20 = [(31, 119, 180), (174, 199, 232), (255, 127, 14)]
    for axis, (measure, low) in zip(figure.axes, lowest.items(), strict=True):
        assert (axis.get_xscale(), axis.get_yscale(), axis.get_xlabel()) == (
            "log",
            "log",
            "iteration",
        )
        assert axis.get_ylim()[0] == pytest.approx(low / 2)
        grid = axis.get_xgridlines()[0]
        assert grid.get_visible()
        assert grid.get_alpha() == 0.3
        lines = axis.get_lines()
        assert [line.get_label() for line in lines] == names
        assert [line.get_linestyle() for line in lines] == ["--", "--", "--"]
        assert [line._unscaled_dash_pattern[1] for line in lines][1] == (1, 1)
        assert {line.get_linewidth() for line in lines} == {1.6}
        for line, curve, colour in zip(lines, curves(), tab20, strict=True):
            assert tuple(round(255 * x) for x in line.get_color()) == colour
            assert list(line.get_xdata()) == curve.iterations[1:]
            shown = [max(value, 1e-18) for value in getattr(curve, measure)[1:]]
            assert list(line.get_ydata()) == shown
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert {text.get_fontsize() for text in legend.get_texts()} == {9}
    assert legend._ncols == 4
    assert legend._outside_loc == "lower"


def test_more_solvers_than_colours_and_one_without_a_step(tmp_path, monkeypatch):
    from matplotlib import pyplot

    closed = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    comparison.plot(curves()[:2] * 11, "", tmp_path / "many.svg")
    comparison.plot(curves()[1:2], "", tmp_path / "none.svg")
    monkeypatch.undo()
    for figure, count in zip(closed, (22, 1), strict=True):
        assert len(figure.axes[0].get_lines()) == count
        pyplot.close(figure)
    # nothing is drawn, so the axis is that of 1
    assert {axis.get_ylim()[0] for axis in closed[1].axes} == {0.5}
