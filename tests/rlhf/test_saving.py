"""A folder is whole or not there, and anyone can load it."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hybrid_engine import HybridEngine, SamplingParams
from rlhf.data import load_tokenizer
from rlhf.files import finished_directory
from rlhf.models import load_causal_lm, load_critic, load_scorer, save_model

IDS = torch.tensor([[1, 5, 90, 7, 200, 33]])


def write(path: Path, *, error: type[BaseException] | None = None, **files: str) -> None:
    """Write the files, and fail then if told to."""
    with finished_directory(path) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        if error:
            raise error


def assert_same_model(found: Any, model: Any) -> None:
    """The same weights, bit for bit, in the same forward.

    Logits may differ in the last bit: where the file puts a weight in memory decides how the
    matrix library reads it.
    """
    weights, expected = found.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not weight.equal(expected[name])] == []
    torch.testing.assert_close(found(input_ids=IDS).logits, model(input_ids=IDS).logits)


def contents(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    with finished_directory(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    assert contents(path) == {"a": "1"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write(tmp_path / "model", error=error, a="1")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "model", a="old")
    with pytest.raises(ValueError):
        write(tmp_path / "model", error=ValueError, a="new")
    assert contents(tmp_path / "model") == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_new_folder_takes_the_old_ones_place(tmp_path: Path) -> None:
    write(tmp_path / "model", a="old", b="old")
    write(tmp_path / "model", a="new")
    assert contents(tmp_path / "model") == {"a": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_no_half_folder_is_ever_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing takes time and can be interrupted: by then the new folder stands."""
    path = tmp_path / "model"
    write(path, a="old", b="old")
    seen = []

    def interrupted(folder: Path, **options: Any) -> None:
        if Path(folder).exists():
            seen.append(contents(path))
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, a="new")
    assert seen == [{"a": "new"}]
    assert contents(path) == {"a": "new"}


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("notes")
    with pytest.raises(OSError):
        write(tmp_path / "model", a="new")
    assert (tmp_path / "model").read_text() == "notes"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The disk is full once a file has this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 5_000, 60_000])
def test_a_full_disk_is_an_os_error_and_leaves_nothing(
    causal_lm, tokenizer, tmp_path: Path, size: int
) -> None:
    """In the config, in the tokenizer or in the weights, whichever library writes them."""
    with pytest.raises(OSError), file_size_limit(size):
        save_model(causal_lm(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_tokenizer_is_an_os_error(causal_lm, tokenizer, tmp_path: Path) -> None:
    class OnlyTokenizer(torch.nn.Module):
        save_pretrained: Callable[..., None] = lambda self, folder, **options: None

    with pytest.raises(OSError, match=r"cannot write .*File too large"), file_size_limit(5_000):
        save_model(OnlyTokenizer(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_saved_actor_loads_in_plain_transformers(
    causal_lm, tokenizer, tmp_path: Path, family: str, tied: bool
) -> None:
    model = causal_lm(family, tie_word_embeddings=tied)
    save_model(model, tokenizer, tmp_path / "actor")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "actor").eval()
    assert_same_model(plain, model)
    ours = load_causal_lm(str(tmp_path / "actor"), tokenizer, dtype=torch.float32)
    assert_same_model(ours.eval(), model)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "actor")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_saved_reward_and_critic_load_in_plain_transformers(
    scorer, tokenizer, tmp_path: Path, family: str
) -> None:
    model = scorer(family)
    save_model(model, tokenizer, tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert plain.config.num_labels == 1
    assert_same_model(plain, model)
    ours = load_scorer(str(tmp_path / "reward"), tokenizer, dtype=torch.float32).eval()
    assert_same_model(ours, model)


@torch.no_grad()
def test_a_response_ends_at_the_tokenizers_eos(causal_lm, tokenizer, tmp_path: Path) -> None:
    """One chosen with model.eos_token, that the model's own configs do not know."""
    model = causal_lm()
    save_model(model, tokenizer, tmp_path / "base")
    greedy = SamplingParams(max_new_tokens=8, temperature=0.0, stop_token_ids=())
    expected = HybridEngine(model).generate(IDS.tolist(), greedy).response(0)
    end = expected.index(expected[3])
    chosen = load_tokenizer(
        tmp_path / "base", eos_token=tokenizer.convert_ids_to_tokens(expected[end])
    )
    loaded = load_causal_lm(str(tmp_path / "base"), chosen, dtype=torch.float32)
    save_model(loaded, chosen, tmp_path / "sft")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval()
    for settings in (plain.config, plain.generation_config):
        assert settings.eos_token_id == [expected[end], tokenizer.eos_token_id]
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    assert HybridEngine(plain).generate(IDS.tolist(), params).response(0) == expected[: end + 1]
    found = plain.generate(IDS, max_new_tokens=8, do_sample=False)
    assert found[0, IDS.shape[1] :].tolist() == expected[: end + 1]


@torch.no_grad()
def test_scorer_from_a_causal_model_has_its_body(causal_lm, tokenizer, tmp_path: Path) -> None:
    model = causal_lm()
    save_model(model, tokenizer, tmp_path / "sft")
    found = load_scorer(
        str(tmp_path / "sft"), tokenizer, dtype=torch.float32, fresh_head=True
    ).eval()
    hidden = found.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(hidden, model.base_model(input_ids=IDS).last_hidden_state)
    assert found.score.weight.shape == (1, 32)


def test_a_model_of_the_other_kind_is_refused(causal_lm, scorer, tokenizer, tmp_path: Path) -> None:
    """Neither scores come from a random head, nor tokens."""
    for name, model in (("sft", causal_lm()), ("reward", scorer())):
        save_model(model, tokenizer, tmp_path / name)
    with pytest.raises(ValueError, match=r"sft is no reward model: .* train one with `rlhf rew"):
        load_scorer(str(tmp_path / "sft"), tokenizer, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"reward is no causal language model: it scores"):
        load_causal_lm(str(tmp_path / "reward"), tokenizer, dtype=torch.float32)
    critic: Any = load_critic(str(tmp_path / "sft"), tokenizer, dtype=torch.float32)
    assert not critic.score.weight.any()


@pytest.mark.parametrize("labels", [2, 3])
def test_scorer_with_several_labels_is_refused(
    scorer, tokenizer, tmp_path: Path, labels: int
) -> None:
    model = scorer()
    config = model.config
    config.num_labels = labels
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, tmp_path / "x")
    with pytest.raises(ValueError, match=f"{labels} labels, a reward model has 1"):
        load_scorer(str(tmp_path / "x"), tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("load", [load_causal_lm, load_scorer], ids=lambda f: f.__name__)
def test_a_folder_without_a_model_is_said(load, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no .* model .*empty.*\(tried the folder\)"):
        load(str(tmp_path / "empty"), tokenizer, dtype=torch.float32)


def killed_while_writing(path: Path, *, in_the_swap: bool) -> None:
    """In a process of its own, which is gone afterwards."""
    pid = os.fork()
    if pid == 0:
        if in_the_swap:
            replace = os.replace
            os.replace = lambda a, b: os._exit(0) if Path(b) == path else replace(a, b)
        with finished_directory(path) as folder:
            (folder / "a").write_text("new")
            if not in_the_swap:
                os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_leftovers_of_killed_processes_go_with_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for _ in range(2):
        killed_while_writing(path, in_the_swap=False)
        assert len(list(tmp_path.iterdir())) == 1
    write(path, a="1")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_lost_in_the_swap_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, a="old")
    killed_while_writing(path, in_the_swap=True)
    assert not path.exists()
    with pytest.raises(ValueError):
        write(path, error=ValueError, a="newer")
    assert contents(path) == {"a": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_unfinished_folder_of_a_killed_process_is_hidden(tmp_path: Path) -> None:
    """What a kill leaves behind does not carry the name that anyone would load."""
    manager = finished_directory(tmp_path / "model")
    folder = manager.__enter__()
    assert folder.name.startswith(".")
    assert folder.name.endswith(".unfinished")
    shutil.rmtree(folder)
