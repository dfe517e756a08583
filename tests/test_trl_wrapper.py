"""The mixture as a model that generates, the patch without its host, and the examples."""

import dataclasses
import inspect
import json
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from nlhf import config, trl_compat
from nlhf.trl_compat import GeometricMixtureWrapper
from tests import tiny
from tests.trl_tiny import log_mixture

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent


def wrapper(lora: bool, **generation):
    model = tiny.with_lora(tiny.llama()) if lora else tiny.llama()
    # what TRL's trainer hands over, adapters inside
    ref = model.get_base_model() if lora else tiny.llama(seed=1)
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, "pad_token_id": 0} | generation)
    base = tiny.llama() if lora else ref
    return GeometricMixtureWrapper(model, ref, config, mixture_coef=0.3), base


@pytest.mark.parametrize("lora", [False, True])
def test_the_wrapper_returns_the_log_softmax_of_the_mixture(lora):
    mixture, base = wrapper(lora)
    ids, mask = tiny.prompts([3, 5])
    want = log_mixture(mixture.model, base, ids, mask, 0.3, 1.0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = mixture(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask != 0], want[mask != 0], rtol=0, atol=1e-12)
    assert mixture.config is mixture.model.config
    assert mixture.device == torch.device("cpu")
    assert mixture.dtype == torch.float64
    inputs = mixture.prepare_inputs_for_generation(ids, attention_mask=mask, use_cache=True)
    assert {"input_ids", "attention_mask"} <= set(inputs)
    assert not inputs["use_cache"]
    with pytest.raises(ValueError, match="two models"):
        mixture(ids, past_key_values=mixture)
    with pytest.raises(ValueError, match=r"mixture_coef must be in \[0, 1\], got 2"):
        GeometricMixtureWrapper(mixture.model, base, mixture.generation_config, 2.0)
    with pytest.raises(ValueError, match="ref must be a model"):
        GeometricMixtureWrapper(base, None, mixture.generation_config)(ids)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        mixture.nothing_of_the_kind()


def test_the_wrapper_generates_from_the_mixture():
    mixture, base = wrapper(True, max_new_tokens=1, eos_token_id=2, num_return_sequences=4000)
    ids, mask = tiny.prompts([3])
    torch.manual_seed(0)
    drawn = mixture.generate(input_ids=ids, attention_mask=mask)
    assert drawn.shape == (4000, 4)
    assert (drawn[:, :3] == ids).all()
    want = log_mixture(mixture.model, base, ids, mask, 0.3, 1.0)[0, -1].exp()
    got = torch.bincount(drawn[:, 3], minlength=tiny.V) / 4000
    policy = mixture.model(ids).logits[0, -1].softmax(-1)
    # the mean distance of 4,000 draws is about 0.09
    assert (got - want).abs().sum() < 0.15
    assert (policy - want).abs().sum() > 0.3


def test_the_wrapper_follows_torchs_generator_its_configuration_and_arguments():
    mixture, base = wrapper(False, max_new_tokens=6, eos_token_id=2)
    ids, mask = tiny.prompts([3, 5])
    torch.manual_seed(5)
    first, second = mixture.generate(ids), mixture.generate(ids)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(mixture.generate(ids, attention_mask=mask), first)
    # the most probable token of each prefix
    greedy = mixture.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=2)
    assert greedy.shape == (2, 7)
    exact = log_mixture(mixture.model, base, ids, mask, 0.3, 1.0)[:, -1].argmax(-1)
    assert torch.equal(greedy[:, 5], exact)
    other = GenerationConfig(max_new_tokens=1, do_sample=True)
    assert mixture.generate(ids, other, attention_mask=mask).shape == (2, 6)
    assert torch.equal(
        mixture.generate(ids, attention_mask=mask, seed=3),
        mixture.generate(ids, attention_mask=mask, seed=3),
    )
    # as a model has it, which says where it comes from
    mixture.generation_config = mixture.model.generation_config
    assert mixture.generate(ids, attention_mask=mask, max_new_tokens=2).shape == (2, 7)
    for wrong in ({"num_beams": 2}, {"stop_strings": ["x"]}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mixture.generate(ids, attention_mask=mask, **wrong)
    with pytest.raises(ValueError, match="no argument 'temprature'"):
        mixture.generate(ids, attention_mask=mask, temprature=1.0)


# ---- the patch without its host, and the examples


def fake_trl(monkeypatch, version):
    host = types.ModuleType("trl.experimental.nash_md")

    class Trainer:
        def __init__(self, reward_funcs=None):
            self.reward_funcs = reward_funcs

        def _generate_completions(self): ...
        def _compute_rewards(self): ...
        def _compute_logprobs(self): ...

        mixture_coef = property(lambda self: None)

    host.NashMDTrainer = Trainer
    top = types.ModuleType("trl")
    top.__version__ = version
    for name, module in (("trl", top), (host.__name__, host)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "trl.experimental", types.ModuleType("trl.experimental"))
    return Trainer


def test_the_patch_says_which_trl_it_knows(monkeypatch):
    cls = fake_trl(monkeypatch, "1.14.0")
    before = dict(vars(cls))
    with pytest.warns(UserWarning, match=r"tested with TRL 1\.9\.0 to 1\.13\.0, and this is 1\.14"):
        trl_compat.patch_nash_md()
    assert "beta" in vars(cls)
    trl_compat.patch_nash_md()
    trl_compat.unpatch_nash_md()
    trl_compat.unpatch_nash_md()
    assert {k: v for k, v in vars(cls).items() if k != "__doc__"} == {
        k: v for k, v in before.items() if k != "__doc__"
    }
    for name in ("trl", "trl.experimental.nash_md"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"1\.9\.0 to 1\.13\.0.*nlhf\.trl_compat\.NashMDTrainer"):
        trl_compat.patch_nash_md()


def test_the_table_of_arguments_names_what_there_is():
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    rows = text.split("## Arguments")[1].split("\n## ")[0].splitlines()
    rows = [row.split("|")[1:3] for row in rows if row.startswith("| `")]
    theirs, ours = (
        {name for row in rows for name in re.findall(r"`(\w+)`", row[i])} for i in (0, 1)
    )
    fields = {f.name for f in dataclasses.fields(trl_compat.NashMDConfig)}
    arguments = inspect.signature(trl_compat.NashMDTrainer).parameters
    assert theirs <= fields | set(arguments)
    assert ours <= {f.name for f in dataclasses.fields(config.Config)}
    own = {n for n in vars(trl_compat.NashMDConfig)["__annotations__"] if "vllm_" not in n}
    untouched = {"remove_unused_columns", "logging_steps", "lr_scheduler_kwargs"}
    untouched |= {"use_liger_kernel", "torch_empty_cache_steps", "ds3_gather_for_generation"}
    assert own - untouched - {"model_init_kwargs"} <= theirs


def run_example(monkeypatch, name: str, *arguments: str) -> None:
    """As a script, in a process for which TRL cannot be imported."""
    for hidden in ("trl", "trl.experimental.nash_md"):
        monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_example_of_a_script_with_one_import_changed(tmp_path, monkeypatch, capsys):
    run_example(monkeypatch, "trl_nash_md.py", "--output_dir", str(tmp_path))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["eval_rewards/probabilities"] > 0
    assert (tmp_path / "model.safetensors").exists()
    assert "munos2024nash" in (tmp_path / "README.md").read_text()


def test_the_example_of_the_patch_needs_trl_and_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_example(monkeypatch, "trl_patch_nash_md.py")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "TRL 1.9.0 to 1.13.0" in line
