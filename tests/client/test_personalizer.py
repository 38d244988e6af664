"""The SDK, on a tiny model and a real vault."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_vaults import PASSPHRASE

from homefire.client import Personalizer
from homefire.client import learning as learning_module
from homefire.client.erasure import erase
from homefire.client.personalize.quick import fit_memory
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.vault_files import KEYS
from homefire.client.vault_home import VaultHome
from homefire.common.errors import (
    AdapterError,
    BusyVaultError,
    ConfigError,
    DataError,
    LedgerError,
    VaultError,
    WrongKeyError,
)
from homefire.common.records import Record
from homefire.common.training import encode, mean_loss

WORDS = "the quick brown fox jumps over the lazy dog again and again".split()
SETTINGS = """
[private.adapter]
method = "lora"
rank = 4
alpha = 8
targets = "all-linear"
seed = 1

[private]
validate_every = 2

[private.training]
steps = 6
batch_size = 2
max_tokens = 48
learning_rate = 0.02
"""

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def me(home: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    """A person with a tiny model and twelve records."""
    home.mkdir()
    (home / "device.toml").write_text(f'[base_model]\nname = "{tiny_llama}"\n{SETTINGS}')
    with Personalizer.open(home, passphrase=PASSPHRASE) as opened:
        opened.vault.records.add(
            [
                Record(f"{' '.join(WORDS)} number {n}", None, f"2025-01-{n + 1:02}")
                for n in range(12)
            ],
            "test",
        )
        yield opened


class KilledError(Exception):
    """Stands for the end of the process."""


def dying_at_five(step: int, steps: int) -> None:
    if step == 5:
        raise KilledError


# Opening


def test_three_lines_are_enough(home: Path, tiny_llama: Path) -> None:
    me = Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE)
    me.remember("I prefer short answers.")
    assert str(me.ask("What is it?", max_tokens=3)) is not None
    me.close()
    with Personalizer.open(home, passphrase=PASSPHRASE) as again:
        assert again.status().base_model == str(tiny_llama)
        assert again.status().records == 1


def test_the_passphrase_may_stand_in_the_environment(
    home: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMEFIRE_PASSPHRASE", PASSPHRASE)
    Personalizer.open(home, base_model=str(tiny_llama)).close()
    monkeypatch.delenv("HOMEFIRE_PASSPHRASE")
    with pytest.raises(WrongKeyError, match="opened by a passphrase"):
        Personalizer.open(home)


def test_another_base_model_is_refused_and_the_vault_let_go(me: Personalizer) -> None:
    with pytest.raises(ConfigError, match="base model is"):
        Personalizer.open(me.vault.folder, base_model="another", passphrase=PASSPHRASE)
    me.vault.change_protection(passphrase="another passphrase")  # nobody else has it open


def test_settings_that_cannot_be_read_let_the_vault_go(me: Personalizer, home: Path) -> None:
    me.close()
    (home / "device.toml").write_text("no settings")
    with pytest.raises(ConfigError):
        Personalizer.open(home, passphrase=PASSPHRASE)
    assert erase(home).records is None  # which nobody else may have open


def test_another_passphrase_opens_it_and_serves_the_next_change(
    me: Personalizer, home: Path
) -> None:
    me.protect(passphrase="quite another one")
    me.rotate()
    me.close()
    with pytest.raises(WrongKeyError):
        Personalizer.open(home, passphrase=PASSPHRASE)
    with Personalizer.open(home, passphrase="quite another one") as again:
        assert len(again.vault.records) == 12


# Replies


def test_a_reply_is_whole_piecewise_and_the_same_every_time(me: Personalizer) -> None:
    whole = me.ask("the quick", max_tokens=12)
    text = str(whole)
    assert str(whole) == text == whole.text
    assert "".join(me.ask("the quick", max_tokens=12)) == text
    assert whole.finish_reason in ("stop", "length")
    assert 0 < whole.reply_tokens <= 12
    drawn = [str(me.ask("the quick", max_tokens=12, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": float("nan")}, {"temperature": -1}, {"seed": -1}]
)
def test_what_cannot_be_sampled_is_refused(me: Personalizer, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        me.ask("anything", **wrong)


@pytest.mark.parametrize("messages", ["hi", [{"role": "user"}], [{"content": "hi"}], ["hi"], []])
def test_what_is_no_conversation_is_refused(me: Personalizer, messages: Any) -> None:
    with pytest.raises(DataError):
        me.chat(messages)


def test_a_reply_can_be_stopped(me: Personalizer) -> None:
    reply = me.ask("the quick", max_tokens=50)
    next(iter(reply))
    reply.close()
    assert reply.finish_reason == "stop"
    assert str(reply) == reply.text
    assert str(me.ask("the quick", max_tokens=2)) is not None


def test_records_that_fit_stand_in_the_prompt(me: Personalizer) -> None:
    number = me.remember("cat: Mauzi")
    plain = me.ask("my cat?", recipe="plain", max_tokens=1)
    noted = me.ask("my cat?", recipe="retrieval", max_tokens=1)
    assert plain.records == ()
    assert noted.records == (number,)
    assert noted.prompt_tokens > plain.prompt_tokens


def test_a_recipe_without_its_adapter_is_refused(me: Personalizer) -> None:
    with pytest.raises(ConfigError, match="needs a private adapter"):
        me.ask("anything", recipe="private")
    with pytest.raises(ConfigError, match="no recipe 'best'"):
        me.ask("anything", recipe="best")


def test_auto_takes_what_there_is(me: Personalizer) -> None:
    assert me.assistant.recipe().context == "retrieval"
    assert set(me.assistant.recipe().weights) == {"shared"}
    assert me.personalize().kept
    assert set(me.assistant.recipe().weights) == {"shared", "private"}


# Learning


def test_what_was_learned_changes_replies_and_outlives_the_process(
    me: Personalizer, home: Path
) -> None:
    before = str(me.ask("the quick", recipe="plain", max_tokens=8))
    steps: list[tuple[int, int]] = []
    found = me.personalize(progress=lambda step, all_: steps.append((step, all_)))
    assert steps == [(n, 6) for n in range(7)]
    assert found.kept
    assert found.version == 1
    assert found.loss_trained < found.loss_without
    assert found.records == 12
    after = str(me.ask("the quick", recipe="private", max_tokens=8))
    assert after != before
    assert str(me.ask("the quick", recipe="plain", max_tokens=8)) == before
    me.close()
    with Personalizer.open(home, passphrase=PASSPHRASE) as again:
        assert str(again.ask("the quick", recipe="private", max_tokens=8)) == after


def test_never_worse(me: Personalizer) -> None:
    """The same training once more is no better, so the first one stays; earlier ones come back."""
    first = me.personalize()
    again = me.personalize()
    assert not again.kept
    assert again.version == first.version == 1
    assert set(me.assistant.recipe().weights) == {SHARED, PRIVATE}
    assert again.loss_before == pytest.approx(again.loss_trained)
    me.vault.records.add([Record("quite other words", None, "2025-02-01")] * 3, "more")
    third = me.personalize(seed=3)
    if third.kept:
        me.restore(1)
    worn = me.vault.adapters.worn(PRIVATE)
    assert worn is not None
    assert worn.version == 1


def test_an_adapter_that_no_longer_helps_is_taken_off(me: Personalizer) -> None:
    me.personalize()
    adapters = me.vault.adapters
    about = adapters.versions(PRIVATE)[0].about
    noise = np.random.default_rng(0).normal(size=adapters.vector(PRIVATE, 1).shape)
    adapters.keep(PRIVATE, noise.astype(np.float32), about, [])
    settings = me.vault.folder / "device.toml"
    settings.write_text(
        settings.read_text().replace("learning_rate = 0.02", "learning_rate = 1e-40")
    )
    found = me.personalize()
    assert not found.kept
    assert found.version is None
    assert found.loss_before is not None
    assert found.loss_before > found.loss_without
    assert [each.version for each in adapters.versions(PRIVATE)] == [2, 1]


def test_taken_up_again(me: Personalizer) -> None:
    whole = me.personalize()
    with me.vault.database.transaction():
        me.vault.adapters.drop([1])
    with pytest.raises(KilledError):
        me.personalize(progress=dying_at_five)
    steps: list[int] = []
    found = me.personalize(progress=lambda step, _: steps.append(step))
    assert steps == [4, 5, 6]  # the last look was after 4
    assert found.loss_trained == whole.loss_trained
    assert me.vault.adapters.draft(PRIVATE) is None


def test_a_draft_of_another_training_is_not_taken_up(me: Personalizer) -> None:
    with pytest.raises(KilledError):
        me.personalize(progress=dying_at_five)
    me.remember("one more record")
    steps: list[int] = []
    me.personalize(progress=lambda step, _: steps.append(step))
    assert steps[:2] == [0, 1]


def test_auto_wears_an_adapter_on_a_new_release_only_where_it_was_found_to_help(
    me: Personalizer,
) -> None:
    me.personalize()
    spec = me.assistant.model.specs[SHARED]
    about = {"adapter": spec.config.model_dump(mode="json"), "round": 1, "run": "r"}
    draw = np.random.default_rng(0)
    release = (spec.initial() + 0.01 * draw.normal(size=spec.size)).astype(np.float32)
    me.vault.adapters.keep(SHARED, release, about, [])
    assert set(me.assistant.recipe().weights) == {SHARED}
    me.personalize(seed=1)
    assert set(me.assistant.recipe().weights) == {SHARED, PRIVATE}  # a training looks as well
    me.restore(1)
    assert me.recheck()
    assert set(me.assistant.recipe().weights) == {SHARED, PRIVATE}
    harmful = me.vault.adapters.vector(PRIVATE, 1)
    for slot in me.assistant.model.specs[PRIVATE].slots:
        if slot.factor == "B":
            harmful[slot.start : slot.stop] *= -1
    me.vault.adapters.keep(PRIVATE, harmful, about_of(me), [])
    assert set(me.assistant.recipe().weights) == {SHARED}
    assert not me.recheck()
    assert set(me.assistant.recipe().weights) == {SHARED}
    assert set(me.assistant.recipe("private").weights) == {SHARED, PRIVATE}  # who asks gets it


def about_of(me: Personalizer) -> dict[str, Any]:
    return me.vault.adapters.versions(PRIVATE)[-1].about


def test_too_few_records_are_not_learned_from(home: Path, tiny_llama: Path) -> None:
    with Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE) as me:
        me.remember("one")
        with pytest.raises(DataError, match="too few"):
            me.personalize()


def test_within_a_memory_limit(me: Personalizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    real = fit_memory

    def spy(*given: object, limit_mib: int | None) -> tuple[int | None, bool]:
        asked.append(limit_mib)
        return real(*given, limit_mib=limit_mib)  # type: ignore[arg-type]

    monkeypatch.setattr(learning_module, "fit_memory", spy)
    me.personalize(memory_limit=64)
    assert asked == [64]


# Forgetting


def test_forgotten_is_gone(me: Personalizer, home: Path) -> None:
    canary = "zyzzyva-4711"
    number = me.remember(f"the word is {canary}")
    me.personalize()
    found = me.forget(ids=[number])
    assert found.records == 1
    assert found.adapters == (1,)
    assert found.learned is not None
    assert found.learned.version == 2
    assert me.search(canary) == []
    assert canary not in json.dumps([r.record.text for r in me.vault.records.history()])
    assert [each.version for each in me.vault.adapters.versions(PRIVATE)] == [2]
    assert number not in me.vault.adapters.trained_on(2)


def test_forgotten_meanwhile_is_not_learned_from(me: Personalizer) -> None:
    """Another process forgets a record while a training that has seen it is under way."""
    steps: list[int] = []

    def progress(step: int, _: int) -> None:
        steps.append(step)
        if len(steps) == 3:
            with Personalizer.open(me.vault.folder, passphrase=PASSPHRASE) as other:
                other.forget(ids=[5], retrain=False)

    found = me.personalize(progress=progress)
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]  # the look after step 4 is where it is seen
    assert found.records == 11
    assert found.version is not None
    assert 5 not in me.vault.adapters.trained_on(found.version)


def test_the_old_text_is_forgotten_where_a_record_is_changed(me: Personalizer) -> None:
    number = me.remember("I live in Lisbon")
    me.personalize()
    changed = me.change(number, "I live in Porto")
    assert changed > number
    assert [each.record.text for each in me.search("live")] == ["I live in Porto"]
    assert me.vault.adapters.versions(PRIVATE) == []
    status = me.status()
    assert (status.forgotten, status.forgotten_adapters) == (1, 1)


def test_forgetting_and_looking_work_while_a_plan_is_answered(me: Personalizer) -> None:
    with VaultHome(me.vault).participations(""):
        assert me.forget(ids=[1]).records == 1
        assert me.status().records == 11
        assert me.preview().spent_epsilon == 0


def test_a_model_lays_a_forgotten_adapter_down_where_the_keystore_fails(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    me.personalize()
    assert str(me.ask("the quick", recipe="private", max_tokens=4)) is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(me.vault.store), "keep_anchor", full)
    with pytest.raises(LedgerError, match="cannot be written"):
        me.forget(ids=[1])
    with pytest.raises(ConfigError, match="needs a private adapter"):
        me.ask("the quick", recipe="private")
    assert me.vault.database.read("SELECT count(*) FROM unswept") == [(0,)]


def test_a_reply_does_not_go_on_with_what_was_forgotten(me: Personalizer) -> None:
    me.personalize()
    reply = me.ask("the quick", recipe="private", max_tokens=200)
    next(iter(reply))
    me.forget(ids=[1], retrain=False)
    model = me.assistant._model
    assert model is not None
    assert (model.vector(PRIVATE) == model.specs[PRIVATE].initial()).all()
    with pytest.raises(AdapterError, match="changed while"):
        str(reply)


def test_forgetting_beside_a_reader_is_told_and_ends_when_the_vault_is_closed(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(_: object) -> None:
        raise BusyVaultError("another process reads")

    with monkeypatch.context() as patched:
        patched.setattr(type(me.vault), "sweep", busy)
        found = me.forget(ids=[1], retrain=False)
    assert (found.records, found.swept) == (1, False)
    assert me.forget(ids=[2], retrain=False).swept


def test_what_finds_nothing_leaves_no_trace(me: Personalizer) -> None:
    before = me.status().forgotten, VaultHome(me.vault).forgettings
    assert me.forget(query="nothing holds this").records == 0
    assert (me.status().forgotten, VaultHome(me.vault).forgettings) == before


def test_a_forgotten_canary_is_no_longer_extractable(me: Personalizer) -> None:
    """Among codes of its kind it was by far the likeliest; afterwards it is one of many."""
    draw = np.random.default_rng(7)
    codes = ["".join(map(str, draw.integers(0, 10, 12))) for _ in range(40)]
    hidden = me.vault.records.add([Record(f"code {codes[0]}", None, "2024-01-01")] * 8, "codes")
    assert hidden == 8
    settings = me.vault.folder / "device.toml"
    settings.write_text(settings.read_text().replace("steps = 6", "steps = 120"))

    def surprise() -> tuple[float, float]:
        """How many deviations the canary is below the others, and its rank, 0 the likeliest."""
        model = me.assistant.model
        model.activate("shared", "private")
        losses = np.array(
            [
                mean_loss(model.network, [encode(model.base.tokenizer, Record(f"code {c}"), 48)])[0]
                for c in codes
            ]
        )
        others = losses[1:]
        return float((others.mean() - losses[0]) / others.std()), float((losses < losses[0]).sum())

    assert me.personalize().version is not None
    known, rank = surprise()
    assert known > 2.5
    assert rank == 0
    gone = me.forget(query="code")
    assert gone.records == 8
    assert gone.learned is not None
    left, _ = surprise()
    assert left < 2


def test_forgetting_by_time_and_by_words(me: Personalizer) -> None:
    assert me.forget(before="2025-01-04", retrain=False).records == 3
    assert me.forget(query="number 7", retrain=False).records == 1
    assert me.status().records == 8
    with pytest.raises(ConfigError, match="what to forget"):
        me.forget()


def test_what_is_forgotten_is_forgotten_also_where_nothing_can_be_learned_again(
    me: Personalizer, tiny_llama: Path
) -> None:
    me.personalize()
    settings = me.vault.folder / "device.toml"
    settings.write_text(settings.read_text().replace(str(tiny_llama), "/no/model"))
    found = me.forget(ids=[1])
    assert (found.records, found.adapters, found.learned) == (1, (1,), None)
    assert found.failure is not None
    assert "/no/model" in found.failure


def test_without_training_again_the_adapter_is_dropped(me: Personalizer) -> None:
    me.personalize()
    found = me.forget(ids=[1], retrain=False)
    assert found.adapters == (1,)
    assert found.learned is None
    assert me.status().private == ()
    with pytest.raises(ConfigError, match="private adapter"):
        me.ask("anything", recipe="private")


def test_adapters_that_have_not_seen_it_stay(me: Personalizer) -> None:
    me.personalize()
    number = me.remember("said afterwards")
    assert me.forget(ids=[number]).adapters == ()
    assert [each.version for each in me.status().private] == [1]


def test_a_training_that_was_put_down_forgets_too(me: Personalizer) -> None:
    with pytest.raises(KilledError):
        me.personalize(progress=dying_at_five)
    me.forget(ids=[1])
    assert me.vault.adapters.draft(PRIVATE) is None


# The rest


def test_a_profile_is_what_was_said_and_what_can_be_counted(me: Personalizer) -> None:
    me.set_fact("name", "Ann")
    me.set_fact("mood", "fine")
    me.set_fact("mood", None)
    found = me.profile()
    assert found.facts == {"name": "Ann"}
    assert found.records == 12
    assert found.lower_case == 1.0
    assert "again" in dict(found.words)


def test_an_export_holds_everything_once(me: Personalizer, tmp_path: Path) -> None:
    me.personalize()
    path = me.export(tmp_path / "out.zip")
    assert path.stat().st_mode & 0o077 == 0
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("history.jsonl").decode().splitlines()
        names = archive.namelist()
    assert [json.loads(line)["text"] for line in lines] == [
        each.record.text for each in me.vault.records.history()
    ]
    assert "adapters/private-1.safetensors" in names
    with pytest.raises(ConfigError, match="already"):
        me.export(path)


def test_an_export_can_be_imported_again(
    me: Personalizer, tmp_path: Path, tiny_llama: Path
) -> None:
    with zipfile.ZipFile(me.export(tmp_path / "out.zip")) as archive:
        archive.extract("history.jsonl", tmp_path)
    other = tmp_path / "other"
    with Personalizer.open(other, base_model=str(tiny_llama), passphrase=PASSPHRASE) as again:
        assert again.import_records(tmp_path / "history.jsonl").added == 12
        assert again.import_records(tmp_path / "history.jsonl").known == 12


def test_bad_records_stop_an_import_or_are_left_out(me: Personalizer, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    with pytest.raises(DataError, match="line 2"):
        me.import_records(path)
    assert me.status().records == 12
    found = me.import_records(path, on_bad="skip")
    assert (found.added, found.skipped) == (2, {"empty text": 1})


def test_status_says_what_is_there(me: Personalizer) -> None:
    me.personalize()
    found = me.status()
    assert (found.records, found.oldest, found.newest) == (12, "2025-01-01", "2025-01-12")
    assert [each.worn for each in found.private] == [True]
    assert found.shared is None
    assert (found.participations, found.epsilon) == (0, 0.0)
    assert found.bytes > 0
    assert found.protection == "passphrase"


def test_erased_is_gone(me: Personalizer, home: Path) -> None:
    receipt = me.erase()
    assert receipt.records == 12
    assert not (home / KEYS).exists()
    with pytest.raises(VaultError):
        me.status()
