"""The code in the README runs as it stands there."""

import json
import re
from pathlib import Path

import torch

from tests import tiny

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def block(first: str) -> str:
    (found,) = [b for b in BLOCKS if first in b]
    return found


def test_every_block_is_run_here():
    firsts = ("nk.mixture_sample", "MixtureLogitsProcessor", "PairwiseModel", "generate_pair")
    assert sorted(map(block, firsts)) == sorted(BLOCKS)


def test_the_ops_in_ten_lines():
    names = {}
    exec(block("nk.mixture_sample"), names)
    assert (names["draw"].tokens >= 0).all()
    assert names["logits"].grad.isfinite().all()
    assert names["out"].kl.shape == (4, 8)


def test_the_ops_in_transformers(one_thread):
    model, ref = tiny.llama(0, torch.float32), tiny.llama(1, torch.float32)
    ids, mask = tiny.prompts([3, 5])
    expected = model(ids, attention_mask=mask, labels=ids).loss
    names = {"model": model, "ref": ref, "ids": ids, "mask": mask}
    exec(block("MixtureLogitsProcessor"), names)
    out = model(ids, attention_mask=mask, labels=ids)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_a_preference_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.llama(dtype=torch.float32).save_pretrained("path/or/hub-name")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained("path/or/hub-name")
    row = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4", "probability": 0.9}
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    exec(block("PairwiseModel"), {})
    from nlhf import preference

    model = preference.as_preference("my-preference")
    p, q = (model(["w1"], [a], [b]) for a, b in (("w3", "w4"), ("w4", "w3")))
    assert (p + q).item() == 1


def test_the_loop_from_your_own():
    from nlhf import losses, rollout

    policy, ref = tiny.llama(0, torch.float32), tiny.llama(1, torch.float32)
    ids, mask = tiny.prompts([3, 5])
    names = {
        "rollout": rollout,
        "losses": losses,
        "policy": policy,
        "ref": ref,
        "ids": ids,
        "mask": mask,
        "prompts": ["", ""],
        "preference": lambda prompts, first, second: torch.tensor([0.9, 0.2]),
        "decode": lambda completion: completion.tokens.tolist(),
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1),
    }
    before = policy.lm_head.weight.clone()
    short = block("generate_pair").replace("max_new_tokens=64", "max_new_tokens=8")
    exec(short, names)
    assert isinstance(names["loss"], torch.Tensor)
    assert not torch.equal(policy.lm_head.weight, before)
