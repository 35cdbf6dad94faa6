"""Reading settings from every source: precedence, origins, and each bad input."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from mnemo.config import ResolvedConfig, Resume, load_config, overrides_to_environ
from mnemo.errors import ConfigError


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, so that messages show short paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_text(text: str | bytes, **environ: str) -> ResolvedConfig:
    data = text.encode() if isinstance(text, str) else text
    Path("mnemo.yaml").write_bytes(data)
    return load_config("mnemo.yaml", environ=environ)


def message_of(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def override_message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, overrides=overrides)
    return str(caught.value)


# --- sources and precedence ---------------------------------------------------------------


@pytest.mark.usefixtures("in_folder")
def test_long_configuration() -> None:
    loaded = load_text(
        """
run:      {name: gpt-7b, resume: required}
snapshot: {overhead: 2%, overrun: drop, verify: yes}
persist:  {to: "s3://ckpt/gpt-7b", every: 1h30m, keep: 5}
recover:  {exact_only: false, grace: 90}
"""
    )
    assert loaded.run.name == "gpt-7b"
    assert loaded.run.resume is Resume.required
    assert (loaded.snapshot.overhead, loaded.snapshot.verify) == (0.02, True)
    assert loaded.snapshot.overrun.value == "drop"
    assert (loaded.persist.to, loaded.persist.every, loaded.persist.keep) == (
        "s3://ckpt/gpt-7b",
        5400.0,
        5,
    )
    assert (loaded.recover.exact_only, loaded.recover.grace) == (False, 90.0)
    assert loaded.origins["persist.keep"] == "mnemo.yaml:4"
    assert loaded.origins["snapshot.shard_replicas"] == "default"


@pytest.mark.usefixtures("in_folder")
def test_precedence() -> None:
    Path("mnemo.yaml").write_text("persist:\n  keep: 1\n")
    environ = {"MNEMO_PERSIST__KEEP": "2"}
    argument = {"keep": 3}
    word = ["persist.keep=4"]

    def outcome(loaded: ResolvedConfig) -> tuple[int, str]:
        return loaded.persist.keep, loaded.origins["persist.keep"]

    assert outcome(load_config(environ={})) == (3, "default")
    assert outcome(load_config("mnemo.yaml", environ={})) == (1, "mnemo.yaml:2")
    assert outcome(load_config("mnemo.yaml", environ=environ)) == (2, "MNEMO_PERSIST__KEEP")
    loaded = load_config("mnemo.yaml", environ=environ, persist=argument)
    assert outcome(loaded) == (3, "argument")
    loaded = load_config("mnemo.yaml", environ=environ, overrides=word, persist=argument)
    assert outcome(loaded) == (4, "command line")


@pytest.mark.usefixtures("in_folder")
def test_file_named_by_the_environment() -> None:
    Path("mnemo.yaml").write_text("run: {name: a}")
    Path("other.yaml").write_text("run: {name: b}")
    environ = {"MNEMO_CONFIG": "mnemo.yaml"}
    assert load_config(environ=environ).run.name == "a"
    assert load_config(Path("other.yaml"), environ=environ).run.name == "b"
    assert load_config(environ={"MNEMO_CONFIG": ""}).run.name == ""


def test_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMO_RUN__NAME", "from-outside")
    assert load_config().run.name == "from-outside"


def test_variables_that_are_no_settings() -> None:
    environ = {"MNEMO_RUN_ID": "7", "MNEMO_SECRET_FILE": "/x", "MNEMO": "1", "OTHER__KEY": "2"}
    loaded = load_config(environ=environ)
    assert set(loaded.origins.values()) == {"default"}


def test_key_with_underscore_in_the_environment() -> None:
    assert load_config(environ={"MNEMO_SNAPSHOT__KEEP_ALIVE": "2h"}).snapshot.keep_alive == 7200


@pytest.mark.usefixtures("in_folder")
def test_null_puts_back_to_the_default() -> None:
    text = "snapshot: {every: 10, verify: }\npersist: {keep: 7}\nrun:\n"
    loaded = load_text(text, MNEMO_PERSIST__KEEP="null")
    assert loaded.persist.keep == 3
    assert loaded.origins["persist.keep"] == "default"
    assert loaded.snapshot.every == 10
    assert load_config("mnemo.yaml", environ={}, snapshot={"every": None}).snapshot.every is None
    assert load_config(environ={}, snapshot=None).origins["snapshot.every"] == "default"


def test_last_override_of_a_key_counts() -> None:
    loaded = load_config(environ={}, overrides=["snapshot.every=2", "snapshot.every=3"])
    assert loaded.snapshot.every == 3


def test_override_may_hold_an_equals_sign() -> None:
    loaded = load_config(environ={}, overrides=["persist.to=s3://bucket/a=b"])
    assert loaded.persist.to == "s3://bucket/a=b"


# --- frequency: every or overhead ---------------------------------------------------------


@pytest.mark.usefixtures("in_folder")
def test_every_and_overhead_in_one_source() -> None:
    message = message_of("snapshot:\n  every: 10\n  overhead: 1%\n")
    assert message == (
        "snapshot.every is '10' (in mnemo.yaml, line 2) and snapshot.overhead is '1%' "
        "(in mnemo.yaml, line 3), but each chooses how often a snapshot is taken. "
        "Give one of them."
    )


@pytest.mark.usefixtures("in_folder")
def test_every_and_overhead_in_two_sources() -> None:
    loaded = load_text("snapshot: {every: 10}", MNEMO_SNAPSHOT__OVERHEAD="2%")
    assert (loaded.snapshot.every, loaded.snapshot.overhead) == (None, 0.02)
    loaded = load_text("snapshot: {overhead: 2%}", MNEMO_SNAPSHOT__EVERY="10")
    assert (loaded.snapshot.every, loaded.snapshot.overhead) == (10, 0.01)
    loaded = load_text("snapshot: {overhead: 2%, every: null}")
    assert (loaded.snapshot.every, loaded.snapshot.overhead) == (None, 0.02)


def test_overrides_cross_to_another_process() -> None:
    carried = overrides_to_environ(["snapshot.every=5", "persist.to=", "recover.grace=null"])
    assert carried == {
        "MNEMO_SNAPSHOT__EVERY": "5",
        "MNEMO_SNAPSHOT__OVERHEAD": "null",
        "MNEMO_PERSIST__TO": "",
        "MNEMO_RECOVER__GRACE": "null",
    }
    loaded = load_config(environ={"MNEMO_SNAPSHOT__OVERHEAD": "3%"} | carried)
    assert loaded.snapshot.every == 5
    assert overrides_to_environ(["snapshot.every=null"]) == {"MNEMO_SNAPSHOT__EVERY": "null"}
    with pytest.raises(ConfigError, match="is not a setting"):
        overrides_to_environ(["snapshot.evry=5"])


# --- unknown keys -------------------------------------------------------------------------


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: {name: a}\nsnapshot: {overhed: 1%}",
            (
                "snapshot.overhed is not a setting (in mnemo.yaml, line 2). "
                "Did you mean snapshot.overhead?"
            ),
        ),
        (
            "snapshto:\n  every: 3",
            "snapshto is not a section (in mnemo.yaml, line 1). Did you mean snapshot?",
        ),
        (
            "every: 3",
            (
                "every is not a section (in mnemo.yaml, line 1). "
                "Write it inside its section: snapshot: {every: ...}."
            ),
        ),
        (
            "snapshot.every: 3",
            (
                "snapshot.every is not a section (in mnemo.yaml, line 1). "
                "Write it inside its section: snapshot: {every: ...}."
            ),
        ),
        (
            "xyz: {}",
            (
                "xyz is not a section (in mnemo.yaml, line 1). The sections are run, snapshot, "
                "protect, persist, recover, predict, monitor, network."
            ),
        ),
        (
            "snapshot: {keep: 3}",
            "snapshot.keep is not a setting (in mnemo.yaml, line 1). Did you mean persist.keep?",
        ),
        (
            "persist: {zzz: 3}",
            (
                "persist.zzz is not a setting (in mnemo.yaml, line 1). "
                "The settings of persist are to, every, keep."
            ),
        ),
        (
            "predict:\n  gate: 4",
            "predict.gate is not available in this version (in mnemo.yaml, line 2). Leave it out.",
        ),
    ],
)
def test_unknown_key_in_a_file(text: str, message: str) -> None:
    assert message_of(text) == message


def test_unknown_key_elsewhere() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"MNEMO_SNAPSHOT__OVERHED": "1%"})
    assert str(caught.value) == (
        "snapshot.overhed is not a setting (in the variable MNEMO_SNAPSHOT__OVERHED). "
        "Did you mean snapshot.overhead?"
    )
    with pytest.raises(ConfigError, match="MNEMO_FOO__BAR"):
        load_config(environ={"MNEMO_FOO__BAR": "1"})
    with pytest.raises(ConfigError, match=r"^run.nmae is not a setting \(in the arguments\)"):
        load_config(environ={}, run={"nmae": "x"})
    with pytest.raises(ConfigError, match=r"^snapshots is not a section \(in the arguments\)"):
        load_config(environ={}, snapshots={"every": 1})
    with pytest.raises(ConfigError, match=r"^monitor.port is not available in this version"):
        load_config(environ={}, monitor={"port": 1})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "snapshot.evry=3",
            "snapshot.evry is not a setting (on the command line). Did you mean snapshot.every?",
        ),
        ("every=3", "every is not a setting (on the command line). Did you mean snapshot.every?"),
        (
            "q.zz=3",
            "q.zz is not a setting (on the command line). `mnemo config show` lists the settings.",
        ),
        (
            "train.py",
            (
                "'train.py' is not an override (on the command line). "
                "Write section.key=value, such as snapshot.every=10."
            ),
        ),
        (
            "=3",
            (
                "'=3' is not an override (on the command line). Write section.key=value, such as "
                "snapshot.every=10."
            ),
        ),
    ],
)
def test_bad_override(word: str, message: str) -> None:
    assert override_message(word) == message


# --- files that cannot be read ------------------------------------------------------------


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the configuration file mnemo.yaml is empty. Write at least one section"),
        ("# nothing\n", "the configuration file mnemo.yaml is empty."),
        ("run: {name: a", "expected ',' or '}', but got '<stream end>' (in mnemo.yaml, line 1)."),
        ("run:\n\tname: a", "(in mnemo.yaml, line 2). Indent with spaces, not tabs."),
        ("run:\n  name: a\n bad: b", "(in mnemo.yaml, line 3). Correct the YAML."),
        ("run: {}\n---\nrun: {}", "but found another document (in mnemo.yaml, line 2)."),
        ("run: *x", "found undefined alias 'x' (in mnemo.yaml, line 1)."),
        ("run: {name: \x07}", "(in mnemo.yaml). Correct the YAML."),
        ("run: {name: a}\nrun: {id: b}", "run is given twice in the file (in mnemo.yaml, lines 1"),
        ("run:\n  name: a\n  name: b", "name is given twice in run (in mnemo.yaml, lines 2 and 3)"),
        ("- run", "the file is a list (in mnemo.yaml, line 1), where a mapping is needed."),
        ("just words", "the file is 'just words' (in mnemo.yaml, line 1), where a mapping"),
        ("run: gpt", "run is 'gpt' (in mnemo.yaml, line 1), where a mapping is needed."),
        ("run: [a]", "run is a list (in mnemo.yaml, line 1), where a mapping is needed."),
        ("[a]: 1", "(in mnemo.yaml, line 1)"),
        ("run: {? [a] : b}", "a key of run is a list or mapping (in mnemo.yaml, line 1)."),
        (b"run: {name: \xff\xfe}", "the configuration file mnemo.yaml is not UTF-8 (byte 12)."),
        ("run: {name: a}".encode("utf-16"), "is not UTF-8 (byte 0)."),
    ],
)
def test_bad_file(text: str | bytes, message: str) -> None:
    assert message in message_of(text)


def test_absent_file(in_folder: Path) -> None:
    expected = "the configuration file none.yaml cannot be read: No such file or directory."
    with pytest.raises(ConfigError, match=expected):
        load_config("none.yaml", environ={})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(in_folder, environ={})


@pytest.mark.usefixtures("in_folder")
def test_byte_order_mark_and_windows_lines() -> None:
    assert load_text(b"\xef\xbb\xbfrun:\r\n  name: a\r\n").run.name == "a"


@pytest.mark.usefixtures("in_folder")
def test_nothing_in_a_file_is_constructed() -> None:
    message = message_of("run: {name: !!python/object/apply:os.system ['touch hit']}")
    assert message.startswith("run.name is a list")
    assert not Path("hit").exists()


# --- values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *[("snapshot.overhead", text) for text in ("0", "0%", "-1%", "101%", "1", "nan", "a", "")],
        *[("snapshot.every", text) for text in ("0", "-3", "1.5", "10min", "nan", "inf", "true")],
        *[("snapshot.keep_alive", text) for text in ("0", "0s", "-1h", "nan", "inf", "1x", "")],
        *[("persist.every", text) for text in ("0", "10 steps", "1e999")],
        *[("persist.keep", text) for text in ("0", "-1", "three", "1%", "1e999")],
        *[("recover.exact_only", text) for text in ("maybe", "2", "")],
        *[("run.resume", text) for text in ("no", "Auto", "always", "")],
        *[("snapshot.overrun", text) for text in ("stop", "true")],
        *[("run.id", text) for text in ("../up", "a/b", "a b", "-x", ".x", "é", "x" * 65, "a\n")],
        *[("run.name", text) for text in ("a/b", "gpt 7b")],
        *[("run.journal", text) for text in ("", " ", "a\0b")],
        *[("run.dir", text) for text in ("a\nb", "~no-such-user/x")],
        *[("persist.to", text) for text in ("s3://a\nb",)],
    ],
)
def test_refused_value(key: str, text: str) -> None:
    message = override_message(f"{key}={text}")
    assert message.startswith(f"{key} is {text!r} (on the command line). Give ")
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=r"\(in the arguments\)\. Give "):
        load_config(environ={}, **{section: {name: text}})


@pytest.mark.usefixtures("in_folder")
def test_refused_value_names_the_line() -> None:
    assert message_of("run: {name: a}\nsnapshot:\n  every: often") == (
        "snapshot.every is 'often' (in mnemo.yaml, line 3). Give a whole number, at least 1."
    )
    assert message_of("persist: {keep: [1, 2]}") == (
        "persist.keep is a list (in mnemo.yaml, line 1). Give a whole number, at least 1."
    )
    assert message_of("persist: {to: {bucket: x}}").startswith("persist.to is a dict (in ")


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        ("run", "id", 42, "42"),
        ("run", "resume", Resume.never, Resume.never),
        ("run", "dir", Path("/scratch"), "/scratch"),
        ("run", "seed_samples", True, True),
        ("run", "seed_samples", 1, True),
        ("run", "seed_samples", "Off", False),
        ("snapshot", "overhead", 0.05, 0.05),
        ("snapshot", "every", 10.0, 10),
        ("snapshot", "every", "1e3", 1000),
        ("snapshot", "every", np.int64(7), 7),
        ("recover", "grace", 5, 5.0),
        ("recover", "grace", timedelta(minutes=2), 120.0),
        ("persist", "every", timedelta(microseconds=1), 1e-6),
        ("persist", "to", Path("/ckpt"), "/ckpt"),
        ("persist", "to", "sftp://user@host/ckpt", "sftp://user@host/ckpt"),
    ],
)
def test_argument_is_taken(section: str, name: str, value: object, expected: object) -> None:
    loaded = load_config(environ={}, **{section: {name: value}})
    found = getattr(getattr(loaded.config, section), name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("section", "name", "value", "shown"),
    [
        ("run", "id", True, "True"),
        ("snapshot", "every", True, "True"),
        ("snapshot", "every", float("nan"), "'nan'"),
        ("snapshot", "overhead", 1.0, "'1.0'"),
        ("persist", "to", ["s3://a"], "a list"),
        ("persist", "to", b"s3://a", "a bytes"),
        ("run", "name", print, "a builtin_function_or_method"),
        ("recover", "grace", timedelta(seconds=-1), "'-1.0s'"),
        ("recover", "grace", 1j, "'1j'"),
    ],
)
def test_argument_is_refused(section: str, name: str, value: object, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, **{section: {name: value}})
    assert str(caught.value).startswith(f"{section}.{name} is {shown} (in the arguments). Give ")


def test_section_argument_that_is_no_mapping() -> None:
    with pytest.raises(ConfigError, match=r"^snapshot is 10 \(in the arguments\)"):
        load_config(environ={}, snapshot=10)  # type: ignore[arg-type]


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize("text", ["042", "no", "1e5", "0x1f", "12:30:00", "2024-01-01", "null"])
def test_id_stays_as_written(text: str) -> None:
    quoted = text if ":" not in text and text != "null" else f'"{text}"'
    if ":" in text:
        assert f"'{text}'" in message_of(f"run: {{id: {quoted}}}")
    else:
        assert load_text(f"run: {{id: {quoted}}}").run.id == text


def test_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(environ={}, run={"dir": "~/runs"}).run.dir == "/home/somebody/runs"


@pytest.mark.parametrize("url", ["ftp://me:hunter2@host/x", "s3://:hunter2@bucket"])
def test_password_is_refused_and_not_shown(url: str) -> None:
    message = override_message(f"persist.to={url}")
    assert "hunter2" not in message
    assert "without a password" in message


# --- interpolation ------------------------------------------------------------------------


@pytest.mark.usefixtures("in_folder")
def test_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMO_TEST_BUCKET", "b-1")
    monkeypatch.setenv("MNEMO_TEST_EVERY", "20")
    loaded = load_text(
        "persist:\n"
        "  to: s3://${oc.env:MNEMO_TEST_BUCKET}/${run.name}\n"
        "  every: ${recover.grace}\n"
        "snapshot: {every: '${oc.decode:${oc.env:MNEMO_TEST_EVERY}}'}\n"
        "run: {name: a, id: '${oc.env:MNEMO_TEST_ABSENT,null}'}\n",
        MNEMO_RUN__NAME="b",
    )
    assert loaded.persist.to == "s3://b-1/b"
    assert loaded.persist.every == loaded.recover.grace == 30.0
    assert loaded.snapshot.every == 20
    assert (loaded.run.id, loaded.origins["run.id"]) == ("", "default")
    assert loaded.origins["persist.to"] == "mnemo.yaml:2"


def test_escaped_interpolation_is_text() -> None:
    loaded = load_config(environ={}, persist={"to": r"/ckpt/\${run.name}"})
    assert loaded.persist.to == "/ckpt/${run.name}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${oc.env:MNEMO_TEST_ABSENT}", "Environment variable 'MNEMO_TEST_ABSENT' not found"),
        ("${run.nope}", "'run.nope' not found"),
        ("${nope:1}", "nope"),
        ("${", "no viable alternative"),
        ("???", "Missing mandatory value"),
        ("${persist.to}", "(on the command line)"),
        ("${run.name}/${persist.to}", "(on the command line)"),
        ("${snapshot}", "persist.to is a DictConfig"),
    ],
)
def test_bad_interpolation(text: str, problem: str) -> None:
    assert "MNEMO_TEST_ABSENT" not in os.environ
    message = override_message(f"persist.to={text}")
    assert message.startswith("persist.to is ")
    assert problem in message
