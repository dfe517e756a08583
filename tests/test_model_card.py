"""The card of a trained model, and pushing it to the hub, which never loses a run."""

import dataclasses
import re

import huggingface_hub
import pytest

from nlhf import algorithms, cli, config, model_card, train
from tests.test_train import flags, folder, run_cli, settings  # noqa: F401


def read(output):
    return huggingface_hub.ModelCard.load(output / "model" / "README.md")


def test_the_card_says_what_was_done(folder, tmp_path, one_thread):  # noqa: F811
    chosen = settings(folder, tmp_path / "my-run", steps=2, algorithm="nash_ema_pg", ema_decay=0.9)
    result = train.run(chosen)
    card = read(tmp_path / "my-run")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"nash-md", "nlhf", "nash-ema-pg"} <= set(card.data.tags)
    # a folder of this machine is no model of the hub
    assert card.data.base_model is None
    assert str(folder) not in card.content
    mean, half = result["win_judge"]
    assert f"{mean:.3f} ± {half:.3f}" in card.text
    assert "| ema_decay | 0.9 |" in card.text
    assert f"| tau | {chosen.tau} |" in card.text
    assert "| algorithm | nash_ema_pg |" in card.text
    assert "@inproceedings{munos2024nash," in card.text
    assert "eprint    = {2312.00886}" in card.text
    # held-out prompts may be private
    assert all(sample[2] not in card.content for sample in result["samples"] if sample[2])
    averaged = tmp_path / "my-run" / "model-ema" / "README.md"
    assert averaged.read_text() == (tmp_path / "my-run" / "model" / "README.md").read_text()


def test_a_card_names_models_and_data_sets_of_the_hub():
    chosen = config.Config(
        model="someone/base", prompts="trl-lib/tldr#train", push_to_hub="me/mine", algorithm="sppo"
    )
    card = huggingface_hub.ModelCard(model_card.card(chosen, {}))
    assert card.data.base_model == "someone/base"
    assert card.data.datasets == ["trl-lib/tldr"]
    assert card.data.tags == ["trl", "nash-md", "nlhf", "sppo"]
    assert 'from_pretrained("me/mine")' in card.text
    assert "## Results" not in card.text
    assert "Self-Play Preference Optimization" in card.text
    assert "Nash Learning from Human Feedback" in card.text
    quick = huggingface_hub.ModelCard(model_card.card(config.load("quickstart"), {}))
    assert quick.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_metadata_is_what_the_hub_takes():
    card = huggingface_hub.ModelCard(model_card.card(config.load("tldr"), {}))
    assert card.data.to_dict() == {
        "base_model": "trl-lib/pythia-1b-deduped-tldr-sft",
        "datasets": ["trl-lib/tldr"],
        "library_name": "transformers",
        "model_name": "tldr",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "nash-md", "nlhf", "nash-md-pg"],
    }


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_has_its_citation(name):
    text = model_card.citation(name)
    papers = {model_card.PAPER, *re.findall(r"arXiv (\d+\.\d+)", algorithms.get(name).citation)}
    assert set(re.findall(r"eprint\s*= \{(.*?)\}", text)) == papers
    # BibTeX wants its braces in pairs
    assert text.count("{") == text.count("}")
    assert text.count("@") == len(papers)


# ---- the hub


class Hub:
    """The calls of ``huggingface_hub.HfApi`` that a push makes."""

    calls: list
    error: Exception | None

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        Hub.calls.append(("create", repo_id, private))

    def upload_folder(self, *, repo_id, folder_path, commit_message=None):
        files = sorted(path.name for path in folder_path.iterdir())
        Hub.calls.append(("upload", repo_id, files))
        if Hub.error:
            raise Hub.error
        return f"hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    Hub.calls, Hub.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_the_model_is_pushed_with_its_card(folder, tmp_path, hub, one_thread):  # noqa: F811
    train.run(settings(folder, tmp_path / "run", steps=1, push_to_hub="me/mine", hub_private=True))
    (_, name, private), (_, again, files) = hub.calls
    assert (name, private, again) == ("me/mine", True, "me/mine")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)


def test_nothing_is_pushed_unasked(folder, tmp_path, hub, one_thread):  # noqa: F811
    train.run(settings(folder, tmp_path / "run", steps=1, eval_prompts=""))
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("401 Unauthorized\nlog in"),
        ValueError("no token"),
        huggingface_hub.errors.HTTPError("the connection was refused"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_push_that_fails_leaves_the_run_whole(
    folder,  # noqa: F811
    tmp_path,
    hub,
    capsys,
    one_thread,
    error,
):
    hub.error = error
    chosen = settings(folder, tmp_path / "run", steps=1)
    command = ["train", *flags(chosen), "--push-to-hub", "me/mine", "--report-samples", "4"]
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    # 2 would be bad input, of which there was none
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    reason = str(error).splitlines()[0]
    assert f"not pushed to me/mine: {reason}; it is in {tmp_path / 'run' / 'model'}" in line
    for name in ("model/model.safetensors", "model/README.md", "report.md", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    # the same command again, with --resume, only pushes
    hub.error = None
    cli.main([*command, "--resume"])
    assert hub.calls[-1][:2] == ("upload", "me/mine")


def test_a_name_that_the_hub_cannot_have_is_refused_at_once(folder, tmp_path, capsys):  # noqa: F811
    chosen = settings(folder, tmp_path / "run", steps=1)
    line = run_cli(capsys, *flags(chosen), "--push-to-hub", "a/b/c")
    assert "push_to_hub must be a name on the hub, user/model, got 'a/b/c'" in line
    assert not (tmp_path / "run").exists()


def test_what_does_not_concern_the_model_stays_out_of_its_card():
    here = {"output": "/home/me/run", "device": "cuda:3", "report_to": "wandb"}
    judges = {"preference": "/home/me/judge", "judge": "http://judge.internal:8000/v1"}
    chosen = dataclasses.replace(config.load("tldr"), **judges, **here)
    card = model_card.card(chosen, {})
    assert "/home/me" not in card
    assert "judge.internal" not in card
    assert "cuda:3" not in card
    assert "wandb" not in card
