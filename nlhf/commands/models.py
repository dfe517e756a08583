"""Models as the commands name them: a folder, a run of nlhf train, LoRA adapters, a hub name."""

import difflib
import json
import warnings
from pathlib import Path

CONFIG, ADAPTER = "config.json", "adapter_config.json"


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
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {ADAPTER} names no base model: {error}") from error
    import peft

    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = policy.load_tokenizer(path if own else base, **code)
    model = policy.load_model(base, dtype, device, **code)
    try:
        with warnings.catch_warnings():
            # peft still asks transformers by a name that 5.23 deprecates
            warnings.filterwarnings(
                "ignore", message=".*gradient_checkpointing", category=FutureWarning
            )
            return peft.PeftModel.from_pretrained(model, path).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: the adapters cannot be loaded: {first}") from error
