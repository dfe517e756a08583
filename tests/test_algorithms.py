"""Every algorithm on a tiny transformer: it learns, resumes to the bit, and copies what it must."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nlhf_kernels as nk
from nlhf import algorithms, cli, config, learner, parts, players, preference, train
from nlhf.algorithms import ALGORITHMS
from nlhf.reward import as_reward
from tests import tiny
from tests.test_train import folder, metrics, run_cli, settings, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

# what each needs beyond the defaults
NEEDS = {
    "nash_ema_pg": {"ema_decay": 0.9},
    "nash_mp": {"ema_decay": 0.9, "eta": 1.0},
    "nash_prox": {"inner_steps": 3, "eta": 1.0},
    "mpo": {"inner_steps": 3},
    "inpo": {"inner_steps": 3, "eta": 0.1},
    "onpo": {"inner_steps": 3, "eta": 0.1},
    "mnpo": {"inner_steps": 3, "eta": 0.1},
    "sppo": {"inner_steps": 3, "eta": 10.0},
    "dno": {"inner_steps": 3, "eta": 0.1},
}


def reward(prompts, responses):
    """8 times the share of even words."""
    shares = []
    for text in responses:
        words = text.split()
        shares.append(sum(int(w[1:]) % 2 == 0 for w in words) / max(len(words), 1))
    return 8 * torch.tensor(shares)


class Judge:
    """Prefers even words, by the reward."""

    reward = staticmethod(reward)

    def __call__(self, prompts, first, second):
        return (reward(prompts, first) - reward(prompts, second)).sigmoid()


JUDGE = Judge()


def chosen(folder, output, name, **changes):  # noqa: F811
    judged = {"preference": "tests.test_algorithms:JUDGE"}
    return settings(folder, output, algorithm=name, **judged | NEEDS.get(name, {}) | changes)


def test_every_row_of_the_table_can_be_had():
    for name in NEEDS:
        assert ALGORITHMS[name].needs
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.limit in algorithms.LIMITS
        assert "arXiv" in algorithm.citation
        assert f"| {name} " in algorithms.table()
        config.Config(algorithm=name)


def test_the_strengths_of_a_pair_loss_are_those_of_the_kernel():
    c = config.Config(tau=0.2, eta=0.7)
    for algorithm in ALGORITHMS.values():
        method = nk.PAIR_METHODS.get(algorithm.loss)
        if method is None or not method.anchors:
            continue
        for phase in algorithm.phases:
            found = [algorithms.STRENGTHS[strength](c) for _, strength in phase.anchors]
            assert found == pytest.approx(method.weights(c.tau, c.eta, len(found)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns(folder, tmp_path, name):  # noqa: F811
    pieces = parts.build(
        chosen(
            folder,
            tmp_path,
            name,
            steps=18,
            batch_size=48,
            learning_rate=0.01,
            max_new_tokens=3,
            tau=0.02,
            lora_r=0,
        )
    )
    learns = learner.Learner(pieces)
    rows = [learns.step(step) for step in range(18)]
    assert all(row["grad_norm"] > 0 for row in rows)
    pair = pieces.generate_pair(
        pieces.prompts[:40], parts.seeds(0, -9, list(range(40)), pieces.device), mixture_coef=1.0
    )
    texts = [pieces.decode(x) for x in (pair.y, pair.y_other)]
    gain = (reward([], texts[0]) - reward([], texts[1])).mean().item()
    assert gain > 1, gain


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", ["nash_mp", "egpo", "mnpo", "onpo"])
def test_resumed_equals_uninterrupted_to_the_bit(
    folder,  # noqa: F811
    tmp_path,
    name,
    lora_r,
):
    """Copies are part of a checkpoint; the cut is in the middle of a phase."""
    changes = {"lora_r": lora_r, "steps": 8, "checkpoint_every": 5, "eval_prompts": ""}
    changes |= {"keep_checkpoints": 9, "max_new_tokens": 3}
    whole = chosen(folder, tmp_path / "whole", name, **changes)
    train.run(whole)
    cut = chosen(folder, tmp_path / "cut", name, **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000008")
    shutil.rmtree(tmp_path / "cut" / "model")
    train.run(cut, resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["nash_ema_pg", "nash_mp"])
def test_averaged_weights_are_saved_beside_the_last(folder, tmp_path, name):  # noqa: F811
    train.run(chosen(folder, tmp_path / "run", name, steps=3, eval_prompts=""))
    last, averaged = (
        load_file(tmp_path / "run" / which / "model.safetensors")
        for which in ("model", "model-ema")
    )
    start = tiny.llama(dtype=torch.float32).state_dict()
    moved = [k for k in last if not torch.equal(last[k], start[k])]
    assert moved
    for k in moved:
        # an average of the start and of three iterates
        near, far = (averaged[k] - start[k]).norm(), (last[k] - start[k]).norm()
        assert 0 < near < far


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_copy_owns_what_is_trained_and_shares_the_rest(folder, tmp_path, name, lora_r):  # noqa: F811
    pieces = parts.build(chosen(folder, tmp_path, name, lora_r=lora_r))
    learns = learner.Learner(pieces)
    assert sorted(learns.copies) == ALGORITHMS[name].copies
    shared = {x.data_ptr() for x in pieces.policy.parameters() if not x.requires_grad}
    trained = players.trainable(pieces.policy)
    for copy in learns.players.copies.values():
        assert copy.names == list(trained)
        own = {x.data_ptr() for x in copy.model.parameters()} - shared
        assert len(own) == len(trained)
        assert not own & {x.data_ptr() for x in trained.values()}
        assert not any(x.requires_grad for x in copy.model.parameters())


def test_copies_may_be_in_bfloat16_but_what_goes_back_into_the_policy_is_exact(folder, tmp_path):  # noqa: F811
    for lora_r in (4, 0):
        halves = {"lora_r": lora_r, "copies_dtype": "bfloat16", "eval_prompts": ""}
        learns = learner.Learner(parts.build(chosen(folder, tmp_path, "egpo", **halves)))
        if not lora_r:
            assert learns.parts.ref.dtype == torch.bfloat16
        kinds = {n: {w.dtype for w in c.weights} for n, c in learns.players.copies.items()}
        assert kinds == {"half": {torch.bfloat16}, "start": {torch.float32}}
        before = {k: v.clone() for k, v in players.trainable(learns.policy).items()}
        learns.step(0)
        after = players.trainable(learns.policy)
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert learns.step(1)["grad_norm"] > 0
        exact = chosen(folder, tmp_path, "nash_md_pg", kl="exact", **halves)
        assert learner.Learner(parts.build(exact)).step(0)["grad_norm"] > 0
        averaged = learner.Learner(parts.build(chosen(folder, tmp_path, "nash_mp", **halves)))
        assert all(averaged.step(step)["grad_norm"] > 0 for step in range(2))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: a copy leaves it for the CPU"
)
def test_a_copy_on_another_device_comes_to_the_policy_and_goes_home():
    policy = tiny.llama(dtype=torch.float32).cuda()
    copy = players.Copy(policy, device="cpu")
    assert {w.device.type for w in copy.weights} == {"cpu"}
    with copy.present() as model:
        assert {w.device.type for w in model.parameters()} == {"cuda"}
    copy.average(list(policy.parameters()), 0.5, 0)
    assert {w.device.type for w in copy.weights} == {"cpu"}


def test_the_mixture_coefficient_goes_in_a_line_to_its_last_value():
    constant = config.Config(mixture_coef=0.5, steps=5)
    assert [algorithms.mixture_coef(constant, k) for k in range(5)] == [0.5] * 5
    falling = config.Config(mixture_coef=0.5, mixture_coef_last=0.1, steps=5)
    found = [algorithms.mixture_coef(falling, k) for k in range(5)]
    assert found == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert algorithms.mixture_coef(config.Config(mixture_coef_last=0.0, steps=1), 0) == 0.125


def test_phases_alternate_and_end_where_they_should():
    onpo = ALGORITHMS["onpo"]
    seen = [onpo.phase(step, 3) for step in range(7)]
    assert [phase is onpo.phases[0] for phase, _ in seen] == [True] * 3 + [False] * 3 + [True]
    assert [ended for _, ended in seen] == [False, False, True] * 2 + [False]
    egpo = ALGORITHMS["egpo"]
    assert [egpo.phase(step, 3)[0].opponent for step in range(4)] == ["policy", "half"] * 2


def test_rlhf_is_paid_by_the_reward_and_not_by_its_sigmoid(folder, tmp_path):  # noqa: F811
    pieces = parts.build(chosen(folder, tmp_path, "rlhf", lora_r=0))
    learns = learner.Learner(pieces)
    phase, _ = learns.algorithm.phase(0, 0)
    prompts = pieces.prompts[:8]
    pair, judges = learns.generate(phase, prompts, list(range(8)), 0)
    wins, other = learns.prefer(prompts, pair, judges)
    texts = [pieces.decode(x) for x in (pair.y, pair.y_other)]
    assert other is None
    assert torch.allclose(wins - 0.5, reward([], texts[0]) - reward([], texts[1]))
    assert texts[0] != texts[1]


BAD = [
    (["--algorithm", "nash-md-pg"], "do you mean nash_md_pg?"),
    (["--algorithm", "xyz"], "nlhf algorithms lists them"),
    (["--algorithm", "nash_ema_pg"], "ema_decay must be above 0 for the algorithm nash_ema_pg"),
    (["--algorithm", "nash_mp", "--ema-decay", "0.9"], "eta must be above 0"),
    (["--algorithm", "inpo", "--eta", "1"], "inner_steps must be above 0"),
    (["--algorithm", "online_ipo", "--tau", "0"], "tau must be above 0"),
    (["--algorithm", "inpo", "--eta", "0.01", "--inner-steps", "2"], "tau must be at most eta"),
    (["--algorithm", "mpo", "--inner-steps", "2", "--kl", "exact"], "kl must not be 'exact'"),
    (["--algorithm", "rlhf", "--preference", "tests.test_train:prefer_even"], "without a reward"),
    (["--ema-decay", "1.5"], "ema_decay must be in [0, 1]"),
    (["--mixture-coef-last", "2"], "mixture_coef_last must be in [0, 1], or -1"),
    (["--copies-dtype", "int8"], "copies_dtype must be one of"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(folder, tmp_path, capsys, wrong, message):  # noqa: F811
    base = chosen(folder, tmp_path / "run", "nash_md_pg", steps=1)
    names = ("model", "prompts", "preference", "output", "steps", "lora_r")
    flags = [x for n in names for x in ("--" + n.replace("_", "-"), str(getattr(base, n)))]
    assert message in run_cli(capsys, *flags, *wrong)
    assert not (tmp_path / "run").exists()


def test_nlhf_algorithms_lists_them(capsys):
    cli.main(["algorithms"])
    shown = capsys.readouterr().out
    for name, algorithm in ALGORITHMS.items():
        (line,) = [x for x in shown.splitlines() if x.startswith(f"| {name} ")]
        assert algorithm.citation in line
        assert algorithm.phases[0].opponent in line


def test_the_algorithm_is_a_field_of_the_configuration(folder, tmp_path):  # noqa: F811
    run = chosen(folder, tmp_path / "run", "self_play", steps=2, eval_prompts="")
    train.run(run)
    assert config.load(str(tmp_path / "run" / "config.yaml")).algorithm == "self_play"
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"preference", "kl", "entropy"} <= row.keys()


def test_the_page_has_the_table():
    page = Path(__file__).parent.parent / "docs" / "algorithms.md"
    assert algorithms.table() in page.read_text(encoding="utf-8")


def test_the_reward_of_a_joined_model_is_that_of_the_whole_text():
    model = preference.RewardModel(
        tiny.llama(dtype=torch.float32), tiny.tokenizer(), template="{response}"
    )
    model.head.weight.data.normal_()
    joined = preference.JoinPrompt(model, "w9")
    found = as_reward(preference.Checked(joined))(["w1 w2 ", "w3 "], ["w4", "w5"])
    assert torch.equal(found, model.reward(["", ""], ["w1 w2 w4", "w3 w5"]))
    # the preference is the sigmoid of its difference
    both = joined(["w1 w2 "], ["w4"], ["w5"])
    other = as_reward(joined)(["w1 w2 "], ["w5"])
    assert torch.allclose(both.logit(), found[:1] - other, atol=1e-3)
    pairwise = preference.PairwiseModel(tiny.llama(dtype=torch.float32), tiny.tokenizer())
    with pytest.raises(ValueError, match="PairwiseModel is a preference without a reward"):
        as_reward(preference.JoinPrompt(pairwise, "w9"))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], r"must return \(2,\) numbers, got \(1,\)"),
        ([[1.0, 2.0]], r"must return \(2,\) numbers, got \(1, 2\)"),
        ([1.0, float("nan")], "must be a finite number, got nan at index 1"),
    ],
)
def test_a_reward_that_is_no_number_a_response_is_refused(answer, said):
    class Odd(Judge):
        def reward(self, prompts, responses):
            return answer

    with pytest.raises(ValueError, match=said):
        as_reward(Odd())(["", ""], ["w1", "w2"])
