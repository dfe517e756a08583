"""Models as the commands name them: a folder, a run of nlhf train, LoRA adapters, a hub name."""

import difflib
import json
import warnings
from pathlib import Path

from nlhf.loading import check_weights, reading

CONFIG, ADAPTER, WEIGHTS = "config.json", "adapter_config.json", "adapter_model"


def find(text: str) -> str:
    """The folder or hub name to load; ValueError for a folder without a model, or none at all."""
    local = Path(text).expanduser()
    if local.is_dir():
        if found := inside(local):
            return str(found)
        raise ValueError(f"{text}: holds no model ({CONFIG}, {ADAPTER})")
    # as completions are
    file = local.is_file() or text.endswith((".jsonl", ".jsonl.gz", ".parquet"))
    if file or not is_hub_name(text) or ("/" in text and local.parent.is_dir()):
        raise ValueError(f"{text or repr(text)}: no such file or folder{beside(local)}")
    return text


def inside(folder: Path) -> Path | None:
    """The folder itself or its model/, as a run of nlhf train has it; None if neither is one."""
    places = ((folder, CONFIG), (folder, ADAPTER), (folder / "model", CONFIG))
    return next((place for place, file in places if (place / file).is_file()), None)


def is_hub_name(text: str) -> bool:
    """Whether it is one word, or two with a slash between them."""
    return bool(text) and text.count("/") < 2 and not text.startswith((".", "/", "~"))


def beside(path: Path) -> str:
    """What lies there with a name like that, as a suggestion."""
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; do you mean {path.parent / close[0]}?" if close else ""


def load(path: str, dtype, device, *, trust_remote_code: bool = False) -> tuple:
    """(model, tokenizer) of a folder or hub name, or of a folder of LoRA adapters on their base."""
    from nlhf import policy

    folder, code = Path(path), {"trust_remote_code": trust_remote_code}
    if (folder / CONFIG).is_file() or not (folder / ADAPTER).is_file():
        try:
            model = policy.load_model(path, dtype, device, **code)
            return model, policy.load_tokenizer(path, **code)
        except ValueError as error:
            hint = "" if folder.exists() else beside(folder)
            raise ValueError(f"{error}{hint}") from error
    with reading(path, ADAPTER):
        stated = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base, kind = stated["base_model_name_or_path"], stated["peft_type"]
    # a field of it names a module that peft would import
    if kind != "LORA" or not isinstance(base, str) or stated.get("megatron_config"):
        raise ValueError(f"{path}: {ADAPTER} must be of LoRA and name its base")
    check_weights(folder, WEIGHTS)
    import peft
    from safetensors import safe_open

    own = (folder / "tokenizer_config.json").is_file()
    try:
        tokenizer = policy.load_tokenizer(path if own else base, **code)
        model = policy.load_model(base, dtype, device, **code)
    except ValueError as error:
        raise ValueError(f"{path}: its base or tokenizer: {error}") from error
    with reading(path, "the adapters"), warnings.catch_warnings():
        # peft still asks transformers by a name that 5.23 deprecates
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing", category=FutureWarning
        )
        # of keys that are not there, which is an error below
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        model = peft.PeftModel.from_pretrained(model, path).eval()
        wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        with safe_open(folder / f"{WEIGHTS}.safetensors", "pt") as file:
            there = set(file.keys())
    # peft leaves at random what is missing, and leaves out what does not fit
    wrong = sorted(wanted.keys() ^ {name for name in there if "lora_" in name})
    if wrong:
        raise ValueError(
            f"{path}: the adapters are not those of {ADAPTER}, {wrong[0]} among {len(wrong)}"
        )
    return model, tokenizer
