"""The card of a trained model, and its way to the hub."""

import dataclasses
import logging
import re
from pathlib import Path

from nlhf import algorithms, evaluate
from nlhf.config import Config
from nlhf.data import SUFFIXES

PAPER = "2312.00886"
# where quickstart's model comes from
_BASE = {"quickstart": "HuggingFaceTB/SmolLM2-135M-Instruct"}
# of the machine or of the way to the hub, not of the model
_PRIVATE = {"output", "device", "copies_device", "report_to", "push_to_hub", "hub_private"}
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

Trained with `nlhf` by Nash learning from human feedback
([Munos et al. 2023](https://arxiv.org/abs/2312.00886)). The algorithm is `{{ algorithm }}`
({{ source }}); where it leads: {{ limit }}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ path }}")
tokenizer = AutoTokenizer.from_pretrained("{{ path }}")
```

Sample at temperature {{ temperature }}: the trained policy is the one at this temperature.
{% if results %}
## Results

{{ results }}
{% endif %}
## Settings

{{ model_settings }}
## Citation

```bibtex
{{ citation }}
```
"""


class PushError(RuntimeError):
    """The run is whole and saved; the hub did not take the model."""


def write(folder: Path, settings: Config, result: dict) -> None:
    """``README.md`` in the folder of a model; ``result`` is the report of the run, or empty."""
    (folder / "README.md").write_text(card(settings, result), encoding="utf-8")


def card(settings: Config, result: dict) -> str:
    """A model card in the hub's format: metadata, how to load, results, settings and citations.

    Held-out prompts are not quoted. Fields of the settings at their defaults, paths of this
    machine, addresses and what does not concern the model are left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    algorithm = algorithms.get(settings.algorithm)
    base = _BASE.get(settings.assets) or _hub_name(settings.model)
    data = ModelCardData(
        base_model=base,
        datasets=[name] if (name := _hub_name(settings.prompts)) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=_name(settings),
        tags=tags(settings.algorithm),
    )
    made = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=_name(settings),
        path=settings.push_to_hub or "path/to/this/folder",
        algorithm=settings.algorithm,
        source=algorithm.citation,
        limit=algorithms.LIMITS[algorithm.limit][0],
        temperature=f"{settings.temperature:g}",
        results="\n".join(evaluate.measures(result)) if result else "",
        model_settings=_settings(settings),
        citation=citation(settings.algorithm),
    )
    return f"{made}\n"


def tags(algorithm: str) -> list[str]:
    """The two by which TRL marked such models, and the hub finds them; ours; the algorithm's."""
    return list(dict.fromkeys(["trl", "nash-md", "nlhf", algorithm.replace("_", "-")]))


def citation(algorithm: str) -> str:
    """BibTeX of Nash learning from human feedback, and of the algorithm where it is another's."""
    text = (Path(__file__).parent / "citations.bib").read_text(encoding="utf-8")
    entries = {re.search(r"eprint\s*= \{(.*?)\}", e).group(1): e for e in text.split("\n\n")}
    own = re.search(r"arXiv (\d+\.\d+)", algorithms.get(algorithm).citation).group(1)
    return "\n\n".join(entries[paper].strip() for paper in dict.fromkeys((PAPER, own)))


def check_hub_name(name: str) -> None:
    """ValueError if the hub could not have a model of this name; "" is none."""
    from huggingface_hub.utils import validate_repo_id

    try:
        if name:
            validate_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"config: push_to_hub must be a name on the hub, user/model, got {name!r}: {error}"
        ) from error


def push(folder: Path, name: str, private: bool) -> str:
    """Upload the folder of a model, and return its address.

    Raises:
        PushError: it did not work; the folder is as it was.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        hub = huggingface_hub.HfApi()
        # None is the organisation's own rule for new models
        hub.create_repo(name, private=private or None, exist_ok=True)
        info = hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Train with nlhf")
    # the hub's own errors are subclasses of these
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise PushError(
            f"train: the model was not pushed to {name}: {reason}; it is in {folder}: push it "
            f"with: hf upload {name} {folder}"
        ) from error
    logging.getLogger(__name__).info("the model is on the hub: %s", info)
    return str(info)


def _name(settings: Config) -> str:
    return settings.push_to_hub or Path(settings.output).absolute().name


def _hub_name(source: str) -> str | None:
    """A hub name without its #split, None for a file or folder of this machine."""
    name = source.partition("#")[0]
    local = not name or Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    return None if local or name.count("/") > 1 or name.endswith(SUFFIXES) else name


def _settings(settings: Config) -> str:
    """A table of what is not at its default, with what every algorithm depends on."""
    always = {"algorithm", "mixture_coef", "tau", "temperature", "steps", "batch_size", "seed"}
    always |= {"learning_rate", "max_new_tokens"}
    rows = ["| setting | value |", "|---|---|"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        # a folder or a server of somebody's own
        own = isinstance(value, str) and ("://" in value or Path(value).expanduser().is_absolute())
        if field.name in _PRIVATE or own:
            continue
        if field.name in always or value != field.default:
            shown = str(value).replace("|", "\\|")
            rows.append(f"| {field.name} | {shown} |")
    return "\n".join(rows) + "\n"
