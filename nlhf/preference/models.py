"""Preference and reward models on a causal language model, and their folders."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nlhf.data import replace_folder
from nlhf.loading import check_weights, reading, sha256
from nlhf.preference.protocol import check_texts, first_line
from nlhf.progress import Progress

CONFIG = "preference.json"


class PreferenceModel(nn.Module):
    """A linear head on the trunk of a causal LM; p = sigmoid(scale * (score a - score b)).

    A subclass says what the two texts a and b are: both orders of a pair, or its responses.
    p(first, second) + p(second, first) is exactly 1: the same batches are scored in either order.

    trunk: a causal LM of transformers, or its trunk; taken over: cut to `n_layers` and, with
        `freeze_trunk`, frozen in place. Pass a copy where the model is used elsewhere.
    pooling: "last" token, or the "mean" over tokens without pads and without `prepend_id`.
    prepend_id: a token put before every text (the tokenizer's bos by default; -1 for none).
    max_length: tokens, by default the trunk's context. Longer texts raise ValueError, or with
        `truncate` lose the beginning of their prompt; responses are never cut.
    batch_size: texts scored at once, sorted by length.
    """

    kind = ""
    scale = 1.0
    fields: tuple[str, ...] = ()

    def __init__(
        self,
        trunk: nn.Module,
        tokenizer: Any,
        *,
        template: str,
        pooling: str = "last",
        n_layers: int | None = None,
        freeze_trunk: bool = False,
        prepend_id: int | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if pooling not in ("last", "mean"):
            raise ValueError(f'{name}: pooling must be "last" or "mean", got {pooling!r}')
        if any("{" + field + "}" not in template for field in self.fields):
            wanted = ", ".join("{" + field + "}" for field in self.fields)
            raise ValueError(f"{name}: template must contain {wanted}, got {template!r}")
        try:
            template.format(**self.sides("", "", "")[0])
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{name}: template has a stray brace or field: {error}") from error
        if batch_size < 1:
            raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}")
        if prepend_id is None:
            prepend_id = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        pads = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
        if not pads:
            raise ValueError(f"{name}: the tokenizer has neither pad nor eos; set its pad_token")
        self.pad_id = pads[0]
        self.trunk = _cut(getattr(trunk, "base_model", trunk), n_layers, name)
        rows = self.trunk.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows or prepend_id >= rows:
            raise ValueError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens and the trunk embeds {rows}; "
                "give the trunk's own tokenizer"
            )
        context = getattr(self.trunk.config, "max_position_embeddings", None) or 10**9
        self.max_length = min(max_length or context, context)
        self.tokenizer = tokenizer
        self.settings = {
            "template": template,
            "pooling": pooling,
            "n_layers": n_layers,
            "freeze_trunk": freeze_trunk,
            "prepend_id": prepend_id,
            "max_length": max_length,
            "truncate": truncate,
            "batch_size": batch_size,
        }
        if freeze_trunk:
            self.trunk.requires_grad_(False)
        # float32 whatever the trunk's dtype; no bias: it cancels in the difference of two scores
        self.head = nn.Linear(self.trunk.config.hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        self.head.to(next(self.trunk.parameters()).device)
        self.eval()

    @property
    def frozen(self) -> bool:
        """Whether the trunk is fixed, so that its features can be computed once for training."""
        return self.settings["freeze_trunk"]

    def train(self, mode: bool = True) -> "PreferenceModel":
        """As in torch, but a frozen trunk stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def sides(self, prompt: str, first: str, second: str) -> tuple[dict, dict]:
        """The fields of the two texts whose scores are compared."""
        raise NotImplementedError

    def token_ids(self, fields: dict[str, str]) -> tuple[int, ...]:
        """The tokens of one filled template, at most max_length, the prompt cut from its left."""
        ids = self._ids(fields)
        if len(ids) > self.max_length and self.settings["truncate"] and fields.get("prompt"):
            kept = self.tokenizer(fields["prompt"], add_special_tokens=False)["input_ids"]
            while kept and len(ids) > self.max_length:
                # decoding and tokenizing again may move a boundary, so the cut is repeated
                kept = kept[len(ids) - self.max_length :]
                ids = self._ids(fields | {"prompt": self.tokenizer.decode(kept)})
        if len(ids) > self.max_length:
            hint = "shorten the responses" if self.settings["truncate"] else "or set truncate=True"
            raise ValueError(
                f"{type(self).__name__}: a prompt with its responses has {len(ids)} tokens and the "
                f"context {self.max_length}; use shorter texts, {hint}"
            )
        return tuple(ids)

    def _ids(self, fields: dict[str, str]) -> list[int]:
        text = self.settings["template"].format(**fields)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prepend = self.settings["prepend_id"]
        return ([] if prepend < 0 else [prepend]) + ids or [self.pad_id]

    def features(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Pooled last hidden states of the trunk: (len(batch), D) float32."""
        device = self.head.weight.device
        lengths = torch.tensor([len(ids) for ids in batch])
        longest = int(lengths.max())
        ids = torch.tensor([[*row, *[self.pad_id] * (longest - len(row))] for row in batch])
        mask = torch.arange(longest) < lengths[:, None]
        hidden = self.trunk(
            input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False
        ).last_hidden_state
        if self.settings["pooling"] == "last":
            return hidden[torch.arange(len(batch)), lengths - 1].float()
        if self.settings["prepend_id"] >= 0:
            mask[:, 0] = False
        weight = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bt,btd->bd", weight.to(device), hidden.float())

    def logits(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """log(p / (1 - p)): (B,) float32 on the model's device, differentiable in one batch."""
        unique, a, b = self._unique(prompts, first, second)
        grad = torch.is_grad_enabled() and self.training
        chunks = [unique] if grad else self._batches(unique, progress=False)
        scores = [self.head(self.features(chunk))[:, 0] for chunk in chunks if chunk]
        # the empty tensor serves B = 0
        score = torch.cat([self.head.weight.new_zeros(0), *scores])
        return self.scale * (score[a] - score[b])

    @torch.no_grad()
    def cached_features(
        self,
        prompts: list[str],
        first: list[str],
        second: list[str],
        *,
        progress: bool = False,
        compute: Callable[[list[tuple[int, ...]]], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features (U, D) of the distinct texts, and (B,) each: the rows that a pair compares.

        compute: in place of `features`, for what remembers them.
        """
        unique, a, b = self._unique(prompts, first, second)
        rows = [(compute or self.features)(batch) for batch in self._batches(unique, progress)]
        device = self.head.weight.device
        return torch.cat(rows), a.to(device), b.to(device)

    @torch.no_grad()
    def forward(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """P(first > second | prompt): (B,) float32 on the CPU."""
        logits = self.logits(prompts, first, second).cpu()
        # 1 - p is exact for p in [1/2, 1], so both orders of a pair sum to 1 to the last bit
        larger = torch.sigmoid(logits.abs())
        return torch.where(logits >= 0, larger, 1 - larger)

    def _unique(
        self, prompts: list[str], first: list[str], second: list[str]
    ) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
        """The distinct token rows, shortest first, and the two rows that each pair compares."""
        check_texts(prompts, first, second)
        seen: dict[tuple, tuple[int, ...]] = {}
        pairs = []
        for texts in zip(prompts, first, second, strict=True):
            keys = []
            for fields in self.sides(*texts):
                key = tuple(fields[name] for name in self.fields)
                keys.append(key)
                if key not in seen:
                    seen[key] = self.token_ids(fields)
            pairs.append(keys)
        # an order that depends on the texts alone: swapping the responses changes no batch
        unique = sorted(set(seen.values()), key=lambda ids: (len(ids), ids))
        position = {ids: i for i, ids in enumerate(unique)}
        rows = torch.tensor([[position[seen[key]] for key in keys] for keys in pairs]).view(-1, 2)
        return unique, rows[:, 0].long(), rows[:, 1].long()

    def _batches(self, rows: list[tuple[int, ...]], progress: bool) -> Iterator[list]:
        size = self.settings["batch_size"]
        with Progress("features, texts", len(rows), show=progress) as bar:
            for start in range(0, len(rows), size):
                yield rows[start : start + size]
                bar.advance(len(rows[start : start + size]))

    def save_pretrained(
        self, folder: str | os.PathLike, *, trunk_path: str | os.PathLike | None = None
    ) -> None:
        """Writes config and head, and the trunk unless it lies unchanged in `trunk_path`.

        The folder appears whole or not at all. ValueError if something else is there already.
        """
        config = {"kind": self.kind, "settings": self.settings, "trunk_path": None}
        config["trunk_dtype"] = str(next(self.trunk.parameters()).dtype).removeprefix("torch.")
        if trunk_path is not None:
            if not self.frozen:
                raise ValueError("save_pretrained: trunk_path needs a frozen trunk; leave it out")
            config["trunk_path"] = os.path.abspath(trunk_path)
            config["trunk_files"] = _weight_files(config["trunk_path"])
        with replace_folder(folder, marker=CONFIG) as new:
            save_file({"head": self.head.weight.detach().cpu()}, new / "head.safetensors")
            if trunk_path is None:
                self.trunk.save_pretrained(new / "trunk")
                self.tokenizer.save_pretrained(new / "trunk")
            _write_config(new, config)


class PairwiseModel(PreferenceModel):
    """A general preference: the LM reads the prompt and both responses, in both orders.

    p = sigmoid((s(y, y') - s(y', y)) / 2), s a linear head on the last token. It need not be
    transitive, which no reward model can express.
    """

    kind = "pairwise"
    scale = 0.5
    fields = ("prompt", "first", "second")

    TEMPLATE = (
        "Two responses to a prompt are compared.\n\nPrompt: {prompt}\n\nResponse 1: {first}\n\n"
        "Response 2: {second}\n\nThe preferred response is Response"
    )

    def __init__(self, trunk: nn.Module, tokenizer: Any, *, template: str = TEMPLATE, **options):
        super().__init__(trunk, tokenizer, template=template, **options)

    def sides(self, prompt: str, first: str, second: str) -> tuple[dict, dict]:
        """The pair in both orders."""
        return (
            {"prompt": prompt, "first": first, "second": second},
            {"prompt": prompt, "first": second, "second": first},
        )


class RewardModel(PreferenceModel):
    """Bradley-Terry: p = sigmoid(r(x, y) - r(x, y')), r a linear head on the pooled hidden states.

    A template without {prompt} gives a reward of the response alone.
    """

    kind = "reward"
    fields = ("response",)

    def __init__(
        self, trunk: nn.Module, tokenizer: Any, *, template: str = "{prompt}\n{response}", **options
    ):
        # texts that differ only in fields not in use are scored once
        self.fields = ("prompt", "response") if "{prompt}" in template else ("response",)
        super().__init__(trunk, tokenizer, template=template, **options)

    def sides(self, prompt: str, first: str, second: str) -> tuple[dict, dict]:
        """Each response after the prompt."""
        return {"prompt": prompt, "response": first}, {"prompt": prompt, "response": second}

    @torch.no_grad()
    def reward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """r(x, y): (B,) float32 on the CPU, known up to a constant."""
        unique, rows, _ = self._unique(prompts, responses, responses)
        scores = [self.head(self.features(c))[:, 0] for c in self._batches(unique, False)]
        return torch.cat(scores)[rows].cpu() if scores else torch.zeros(0)


class JoinPrompt:
    """Judges prompt + completion as one text: the response to a fixed instruction.

    For policies that continue the beginning of a text, where words and completion count together.
    The two are joined as they are, so a completion carries its own leading space.
    """

    def __init__(self, preference: PreferenceModel, instruction: str) -> None:
        self.preference = preference
        self.instruction = instruction

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        """As `Preference`."""
        check_texts(prompts, first, second)
        return self.preference(
            [self.instruction] * len(prompts),
            [p + y for p, y in zip(prompts, first, strict=True)],
            [p + y for p, y in zip(prompts, second, strict=True)],
        )

    def save_pretrained(
        self, folder: str | os.PathLike, *, trunk_path: str | os.PathLike | None = None
    ) -> None:
        """As `PreferenceModel.save_pretrained`."""
        config = {"kind": "join", "instruction": self.instruction}
        with replace_folder(folder, marker=CONFIG) as new:
            self.preference.save_pretrained(new / "model", trunk_path=trunk_path)
            _write_config(new, config)


KINDS = {model.kind: model for model in (PairwiseModel, RewardModel)}


def load_trunk(
    folder: str | os.PathLike, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """(trunk, tokenizer) of a folder of transformers, the LM head left out; no download.

    dtype: that of the file by default. ValueError for a missing, corrupt or incomplete folder.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no model (config.json is missing)")
    check_weights(folder)
    # without a word on code transformers asks who sits there, and waits
    here = {"local_files_only": True, "trust_remote_code": False}
    with reading(folder, "the model"):
        trunk, info = AutoModel.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            **here,
        )
    with reading(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **here)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"{folder}: weights are missing, {missing[0]} among {len(missing)}")
    return trunk, tokenizer


def load_preference(
    folder: str | os.PathLike, *, device: torch.device | str | None = None
) -> PreferenceModel | JoinPrompt:
    """What `save_pretrained` wrote, on `device`; ValueError names what is missing or corrupt."""
    folder = Path(folder)
    where = f"preference {folder}"
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{where}: holds no preference model ({CONFIG} is missing)")
    try:
        config = _read_config(folder, where)
        if config["kind"] == "join":
            inner = load_preference(folder / "model", device=device)
            return JoinPrompt(inner, str(config["instruction"]))
        kind, settings, trunk_path = KINDS[config["kind"]], config["settings"], config["trunk_path"]
        dtype = getattr(torch, config["trunk_dtype"])
        if trunk_path and _weight_files(trunk_path) != config["trunk_files"]:
            raise ValueError(
                f"{where}: its trunk {trunk_path} has moved or changed; train it again"
            )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {CONFIG} lacks or misstates {first_line(error)}") from error
    trunk, tokenizer = load_trunk(trunk_path or folder / "trunk", dtype)
    with reading(where, CONFIG):
        model = kind(trunk, tokenizer, **settings)
    try:
        head = load_file(folder / "head.safetensors")["head"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{where}: head.safetensors is missing or corrupt: {first_line(error)}"
        ) from error
    if head.shape != model.head.weight.shape or not torch.isfinite(head).all():
        raise ValueError(
            f"{where}: the head must be finite and {tuple(model.head.weight.shape)}, "
            f"got {tuple(head.shape)}; the folder is corrupt or its trunk another"
        )
    model.head.weight.data.copy_(head)
    return model.to(device)


def _write_config(folder: Path, config: dict) -> None:
    """With the hashes of all files beside it but those of another preference, and its own."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    own = {name for name in names if not name.startswith("model/")}
    hashes = {name: sha256(folder / name) for name in sorted(own)}
    config = {"format": 2} | config
    whole = config | {"sha256": hashes | {CONFIG: _config_hash(config)}}
    (folder / CONFIG).write_text(json.dumps(whole, indent=1), encoding="utf-8")


def _read_config(folder: Path, where: str) -> dict:
    """Checked against its hashes; format 1 had none."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {CONFIG} is corrupt: {first_line(error)}") from error
    if config["format"] not in (1, 2):
        raise ValueError(f"{where}: {CONFIG} has a format that is not known here; update nlhf")
    hashes = config.pop("sha256", None)
    if hashes is None and config["format"] == 1:
        return config
    if hashes[CONFIG] != _config_hash(config):
        raise ValueError(f"{where}: {CONFIG} has changed since it was saved; undo that")
    for name, wanted in hashes.items():
        path = folder / name
        if name != CONFIG and not (path.is_file() and sha256(path) == wanted):
            state = "has changed since it was saved" if path.exists() else "is missing"
            raise ValueError(f"{where}: {name} {state}; copy the folder again, or train it again")
    return config


def _config_hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _cut(trunk: nn.Module, n_layers: int | None, name: str) -> nn.Module:
    """The trunk with its first layers only; its final norm stays."""
    if n_layers is None:
        return trunk
    attribute = next((a for a in ("layers", "h") if hasattr(trunk, a)), None)
    if attribute is None:
        raise ValueError(f"{name}: n_layers: no list of layers found in {type(trunk).__name__}")
    layers = getattr(trunk, attribute)
    if not 1 <= n_layers <= len(layers):
        raise ValueError(f"{name}: n_layers must be 1 to {len(layers)}, got {n_layers}")
    trunk.config = copy.deepcopy(trunk.config)
    trunk.config.num_hidden_layers = n_layers
    if getattr(trunk.config, "layer_types", None):
        trunk.config.layer_types = list(trunk.config.layer_types)[:n_layers]
    setattr(trunk, attribute, layers[:n_layers])
    return trunk


def _weight_files(folder: str) -> dict[str, int]:
    """Name and size in bytes of every weight file: cheap, and enough to notice another trunk."""
    return {path.name: path.stat().st_size for path in Path(folder).glob("*.safetensors")}
