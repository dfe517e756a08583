"""The decode loop's buffers, its attention, its looks at the device, and its graphs without one."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AttentionInterface, DynamicCache

from nlhf import caches, decoding, rollout
from nlhf.graphs import Graphs
from nlhf.rollout import Side
from nlhf_kernels.testing.compare import poisoned_memory
from tests import tiny
from tests.conftest import DEVICES

# many, so that rows end early and at different times
EOS = [2, *range(30, 34)]
SETTINGS = {"max_new_tokens": 13, "eos_token_id": EOS}
# what a host can only know by waiting for the device, or has to copy to it
HOST = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "lift_fresh"}


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a step: operators and the memory that they read and write.

    Played back, each operator runs on the recorded tensors and writes into the recorded results;
    a number is what it was. Recording must leave no trace, so ``undo`` puts back what was written.
    """

    def __init__(self, banned):
        super().__init__()
        self._banned = banned
        self._calls, self._before, self._own = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        assert name not in self._banned, f"a graph cannot hold {name}"
        masks = [x for x in tree_flatten(args[1:])[0] if getattr(x, "dtype", None) == torch.bool]
        assert not (name in ("index", "index_put_") and masks), "a graph cannot hold a bool index"
        known = {_memory(x) for x in _tensors((args, kwargs))}
        given = [*args, *(None,) * (len(func._schema.arguments) - len(args))]
        for value, argument in zip(given, func._schema.arguments, strict=True):
            if argument.alias_info and argument.alias_info.is_write:
                value = kwargs.get(argument.name, value)
                if _memory(value) not in self._own:
                    self._before.append((value, value.clone()))
        results = func(*args, **kwargs)
        self._own |= {_memory(x) for x in _tensors(results)} - known
        self._calls.append((func, args, kwargs, results))
        return results

    def undo(self) -> None:
        for x, before in reversed(self._before):
            x.copy_(before)

    def play(self) -> None:
        for func, args, kwargs, results in self._calls:
            for new, kept in zip(_tensors(func(*args, **kwargs)), _tensors(results), strict=True):
                if new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


def _tensors(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def _memory(x):
    return x.untyped_storage().data_ptr()


class Logged(Graphs):
    """``log`` says what became of each token after the first."""

    def __init__(self, bucket=4):
        super().__init__(bucket)
        self.log = []

    def warm_up(self, step):
        self.log.append("run")
        super().warm_up(step)

    def record(self, step):
        self.log.append("record")
        play = super().record(step)
        return lambda: self.log.append("play") or play()


class _OnTape(Graphs):
    device = "cpu"
    banned = HOST

    def warm_up(self, step):
        step()

    def record(self, step):
        tape = Tape(self.banned)
        with tape:
            step()
        tape.undo()
        return tape.play


class Emulated(Logged, _OnTape):
    """Graphs on the CPU."""


def same(answers, others, tolerance=1e-12):
    for a, b in zip(answers, others, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.mask, b.mask)
        for name, x in vars(a).items():
            if name.endswith("logprobs") or name == "log_kept_mass":
                torch.testing.assert_close(x, getattr(b, name), rtol=0, atol=tolerance)


def plain_and_recorded(sides, ref, batch, graphs, **settings):
    settings = SETTINGS | {"seed": 5} | settings
    plain = rollout.generate(sides, ref, *batch, **settings)
    same(rollout.generate(sides, ref, *batch, cuda_graphs=graphs, **settings), plain)
    return plain


# ---- graphs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [True, False], ids=["lora", "two models"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_recorded_equals_plain(build, shared, device):
    model = tiny.with_lora(build(0)) if shared else build(0)
    ref = None if shared else build(1).to(device)
    model.to(device)
    sides = [Side(model), Side(model, 0.3, n_samples=2)]
    graphs = Emulated() if device == "cpu" else Logged()
    batch = [x.to(device) for x in tiny.prompts([3, 6, 2, 4])]
    answers = plain_and_recorded(sides, ref, batch, graphs)
    assert torch.cat([x.mask.sum(-1) for x in answers]).unique().numel() > 2
    T = answers[0].tokens.shape[1]
    assert T > 7
    # the first token is of the prompts; columns 7 and 8, 9 to 12, 13 to 16 and 17, 18
    fates = [
        "run",
        "record play",
        *["run", "record play", "play", "play"] * 2,
        "run",
        "record play",
    ]
    # the host looks after every token on the CPU, and on a GPU after more than there are
    assert " ".join(graphs.log) == " ".join(fates[: T - 1] if device == "cpu" else fates)


def test_recorded_equals_plain_without_padding_or_ref_and_with_several_models():
    a, b = tiny.llama(0), tiny.gpt2(1)
    full = tiny.prompts([4, 4])
    plain_and_recorded([Side(a)], None, full, Emulated(), with_ref=False)
    sides = [Side(a, 0.0, 2), Side(b, 0.5), Side(a, 0.25)]
    filters = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    # eager, which has filters, makes constants on the host; on a GPU they go along with the launch
    graphs = Emulated()
    graphs.banned = HOST - {"lift_fresh"}
    plain_and_recorded(sides, tiny.llama(2), full, graphs, **filters)


def test_a_second_call_plays_what_the_first_recorded():
    model = tiny.with_lora(tiny.llama(0))
    graphs = Emulated(bucket=8)
    sides = [Side(model), Side(model, 0.4)]
    settings = SETTINGS | {"seed": 5, "eos_token_id": 2, "cuda_graphs": graphs}
    first = rollout.generate(sides, None, *tiny.prompts([3, 6]), **settings)
    kept = [x.tokens.clone() for x in first]
    # columns 7 and 8, 9 to 16, 17 and 18
    assert graphs.log.count("run") == graphs.log.count("record") == 3
    graphs.log.clear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    # other prompts, of another width too, another seed and other coefficients
    sides = [Side(model, 0.9), Side(model, 0.1)]
    plain_and_recorded(sides, None, tiny.prompts([2, 7], 1), graphs, eos_token_id=2, seed=6)
    assert graphs.log == ["play"] * 12
    assert all(torch.equal(x.tokens, y) for x, y in zip(first, kept, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"max_new_tokens": 12}, {"eos_token_id": [5]}, {"pad_token_id": 7}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_recorded_anew(change):
    model, batch = tiny.llama(0), tiny.prompts([4, 2])
    graphs = Emulated()
    plain_and_recorded([Side(model)], None, batch, graphs, with_ref=False)
    counts = [graphs.log.count(fate) for fate in ("run", "record")]
    plain_and_recorded([Side(model)], None, batch, graphs, with_ref=False, **change)
    for fate, count in zip(("run", "record"), counts, strict=True):
        assert graphs.log.count(fate) > count


def test_a_model_that_changed_is_recorded_anew():
    model, batch, graphs = tiny.with_lora(tiny.llama(0)), tiny.prompts([4, 2]), Emulated()
    on = plain_and_recorded([Side(model)], None, batch, graphs, with_ref=False)
    with model.disable_adapter():
        off = plain_and_recorded([Side(model)], None, batch, graphs, with_ref=False)
    assert not torch.equal(on[0].policy_logprobs, off[0].policy_logprobs)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    plain_and_recorded([Side(model)], None, batch, graphs, with_ref=False)


def test_nothing_of_a_bad_call_is_left():
    model, batch, graphs = tiny.llama(0), tiny.prompts([4, 2]), Emulated()
    settings = SETTINGS | {"seed": 5, "with_ref": False, "cuda_graphs": graphs}
    weight = model.model.layers[1].self_attn.v_proj.weight.data
    before = weight.clone()
    rollout.generate([Side(model)], None, *batch, **settings)
    weight.fill_(math.nan)
    with pytest.raises(ValueError, match="prompt 0, side 0, token 0"):
        rollout.generate([Side(model)], None, *batch, **settings)
    # columns that the next call masks have NaN now, had its start not cleaned them
    held = graphs._held._decoders[0].cache.layers
    for layer in held:
        for buffer in layer._buffers:
            buffer.fill_(math.nan)
    weight.copy_(before)
    plain_and_recorded([Side(model)], None, batch, graphs, with_ref=False)
    assert held is graphs._held._decoders[0].cache.layers


def test_graphs_are_refused_where_they_cannot_be():
    model, batch = tiny.llama(0), tiny.prompts([4, 2])
    settings = SETTINGS | {"seed": 5, "with_ref": False}
    with pytest.raises(ValueError, match=r"cuda_graphs needs .* on CUDA, got them on cpu"):
        rollout.generate([Side(model)], None, *batch, cuda_graphs=True, **settings)
    with pytest.raises(ValueError, match="check=True"):
        rollout.generate(
            [Side(model)], None, *batch, check=True, cuda_graphs=Emulated(), **settings
        )
    for other in (tiny.mistral(0), tiny.gemma2(0), tiny.llama(0, attn_implementation="eager")):
        with pytest.raises(ValueError, match=f"got a {other.config.model_type} model"):
            rollout.generate([Side(other)], None, *batch, cuda_graphs=Emulated(), **settings)


# ---- looks


@pytest.mark.parametrize("every", [2, 5, 16])
def test_looking_less_often_changes_nothing(monkeypatch, every):
    model, ref = tiny.llama(0), tiny.gpt2(1)
    sides = [Side(model, 0.0, 4), Side(ref, 0.5, 3)]
    batch = tiny.prompts([5, 3, 4])
    settings = {"max_new_tokens": 40, "eos_token_id": list(range(2, 20)), "seed": 0}
    looks = []
    look = decoding.Batch._look
    monkeypatch.setattr(
        decoding.Batch, "_look", lambda self, rows: looks.append(self._step) or look(self, rows)
    )
    always = rollout.generate(sides, ref, *batch, **settings)
    T = always[0].tokens.shape[1]
    assert looks == list(range(1, T + 1))
    assert T < 40
    looks.clear()
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", every)
    same(rollout.generate(sides, ref, *batch, **settings), always)
    assert looks == list(range(every, T + every, every))


@pytest.mark.parametrize("when", [0, 3, 8])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_late_look_names_the_first_bad_row(monkeypatch, when, graphs):
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", 4)
    model = tiny.llama(0)
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == when + 1:
            output.logits[1:3] = torch.nan
        if len(calls) == when + 2:
            output.logits[0] = torch.nan

    model.register_forward_hook(spoil)
    settings = {"max_new_tokens": 12, "eos_token_id": 2, "seed": 0, "with_ref": False}
    # buckets of one column, so that the hook runs for every token
    settings["cuda_graphs"] = Emulated(bucket=1) if graphs else False
    with pytest.raises(ValueError, match=rf"prompt 1, side 0, token {when} \(2 rows in all\)"):
        rollout.generate([Side(model)], None, *tiny.prompts([3, 4, 2]), **settings)


# ---- caches


def test_what_was_not_written_is_not_read():
    model, ref = tiny.llama(0), tiny.gpt2(1)
    sides, batch = [Side(model), Side(model, 0.5, 2)], tiny.prompts([3, 6, 2])
    settings = SETTINGS | {"seed": 1}
    clean = rollout.generate(sides, ref, *batch, **settings)
    with poisoned_memory():
        same(rollout.generate(sides, ref, *batch, **settings), clean)


def test_a_column_is_written_in_place():
    cache = caches.new_cache(tiny.llama(0).config, 8)
    states = torch.randn(2, 2, 5, 4)
    layer = cache.layers[0]
    keys, values = layer.update(states, -states)
    assert torch.equal(keys, states)
    assert torch.equal(values, -states)
    cache.layers[0].batch_select_indices(torch.tensor([1, 0, 1]))
    place = layer.keys.data_ptr()
    rows = states[[1, 0, 1]]
    for step in range(3):
        new = torch.full((3, 2, 1, 4), float(step))
        keys, values = layer.update(new, -new)
        rows = torch.cat([rows, new], 2)
        assert torch.equal(keys, rows)
        assert torch.equal(values, -rows)
        assert keys.data_ptr() == place
        assert cache.get_seq_length() == rows.shape[2]
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer.keys, rows[[0, 2]])


def test_only_plain_full_attention_is_buffered():
    for build, kind in ((tiny.llama, caches.Buffered), (tiny.gpt2, caches.Buffered)):
        assert {type(x) for x in caches.new_cache(build(0).config, 8).layers} == {kind}
    for build in (tiny.mistral, tiny.gemma2):
        config = build(0).config
        before = [type(x) for x in DynamicCache(config=config).layers]
        assert [type(x) for x in caches.new_cache(config, 8).layers] == before


# ---- attention


def attend(function, K, count=1, mask=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    like = {"generator": generator, "dtype": torch.float64}
    query = torch.randn(3, 4, count, 6, **like)
    key, value = (torch.randn(3, K, 7, 6, **like) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // K
    return function(module, query, key, value, mask, scaling=0.3, **kwargs)[0]


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "bool", "float32", "float64"])
def test_grouped_attention(K, kind, monkeypatch):
    seen = torch.arange(7) >= torch.tensor([0, 3, 5])[:, None]
    mask = None if kind == "none" else seen[:, None, None]
    if "float" in kind:
        mask = torch.zeros(mask.shape, dtype=getattr(torch, kind)).masked_fill(~mask, -math.inf)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def kept(*args, attn_mask, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", kept)
        got = attend(caches.attention, K, mask=mask, position_ids=seen, use_cache=True)
    # a GPU takes no mask of another dtype
    assert getattr(masks[0], "dtype", None) == getattr(wide, "dtype", None)
    want = attend(AttentionInterface()["sdpa"], K, mask=wide)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_anything_unusual_goes_to_transformers(monkeypatch):
    calls = []

    def sdpa(*args, **kwargs):
        calls.append(kwargs)
        return "theirs", None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa)
    wide = torch.ones(3, 4, 1, 7, dtype=torch.bool)
    unusual = [{"count": 2}, {"mask": wide}, {"dropout": 0.1}, {"softcap": 5.0}, {"s_aux": wide}]
    for kwargs in unusual:
        assert attend(caches.attention, 2, **kwargs) == "theirs"
        assert {"scaling": 0.3}.items() <= calls[-1].items()
        assert {k: v for k, v in kwargs.items() if k not in ("count", "mask")}.items() <= (
            calls[-1].items()
        )
    attend(caches.attention, 2, softcap=None, output_attentions=False)
    assert len(calls) == len(unusual)


def test_keys_are_not_expanded(monkeypatch):
    shapes = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, **kwargs):
        shapes.append((tuple(query.shape), tuple(key.shape), kwargs["attn_mask"]))
        return attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    settings = {"max_new_tokens": 4, "eos_token_id": 2, "seed": 1, "with_ref": False}
    y = rollout.generate([Side(tiny.llama(0))], None, *tiny.prompts([5, 3, 4]), **settings)[0]
    assert y.mask.all()
    # two layers, 4 query heads, 2 of keys; the first two calls read the prompts
    assert [x[:2] for x in shapes[2:]] == [
        ((3, 2, 2, 4), (3, 2, columns, 4)) for columns in (6, 7, 8) for _ in range(2)
    ]
    # the mask is made once, not for every token and layer
    assert len({x[2].data_ptr() for x in shapes[2:]}) == 1
    assert all(x[2].dtype == torch.float64 for x in shapes[2:])


def test_the_attention_of_a_model_is_put_back():
    model, ref = tiny.with_lora(tiny.llama(0)), tiny.llama(1, attn_implementation="eager")
    inside = []
    hook = model.register_forward_pre_hook(
        lambda *_: inside.append(
            (model.config._attn_implementation, ref.config._attn_implementation)
        )
    )
    settings = SETTINGS | {"seed": 0, "mixture_coef": 0.5}
    rollout.generate_pair(model, ref, *tiny.prompts([4, 4]), **settings)
    assert set(inside) == {(caches.GROUPED, "eager")}
    assert model.config._attn_implementation == "sdpa"
    assert ref.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="temperature"):
        rollout.generate_pair(model, ref, *tiny.prompts([4, 4]), temperature=-1.0, **settings)
    assert len(inside) > 1
    assert model.config._attn_implementation == "sdpa"
    hook.remove()
