from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import Config, load_file, validate
from serve_app.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, content: Any) -> Path:
    path = folder / "app.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def applications(**args: Any) -> dict[str, Any]:
    return {
        "applications": [
            {"name": "wan", "import_path": "serve_app.app:wan", "args": args},
            {"name": "gateway", "import_path": "serve_app.app:gateway", "route_prefix": "/", "args": args},
        ]
    }


def test_python_defaults_are_those_of_the_release() -> None:
    defaults = Config().defaults
    assert (defaults.width, defaults.height, defaults.num_frames, defaults.fps) == (1280, 720, 81, 16)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.guidance_scale_2) == (40, 4.0, 3.0)
    assert (defaults.flow_shift, defaults.boundary_ratio) == (12.0, None)  # None: the folder's
    assert defaults.negative_prompt.startswith("色调艳丽")


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().home = "x"


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WAN_SERVE_HOME", raising=False)
    assert Config().home_path == Path("data").absolute()
    monkeypatch.setenv("WAN_SERVE_HOME", str(tmp_path))
    assert Config().home_path == tmp_path
    config = Config(home=str(tmp_path / "other"))
    assert config.store_url == f"sqlite+aiosqlite:///{tmp_path}/other/jobs.db"
    assert config.storage_url == f"{tmp_path}/other/videos"
    config = validate({"store": {"url": "postgresql://db/jobs"}, "storage": {"url": "/videos"}})
    assert (config.store_url, config.storage_url) == ("postgresql://db/jobs", "/videos")


def test_storage() -> None:
    config = validate({"home": "/h", "storage": {"presign_s": 5}})
    assert (config.storage_options.url, config.storage_options.presign_s) == ("/h/videos", 5)
    storage = validate({"storage": {"url": "s3://bucket/some/prefix/"}}).storage_options
    assert (storage.bucket, storage.prefix) == ("bucket", "some/prefix")
    assert (validate({"storage": {"url": "s3://bucket"}}).storage.prefix, config.storage_options.bucket) == ("", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"typo": 1}, "args: unknown option 'typo', expected one of admission, ageing, auth, decoder"),
        ({"storge": {}}, "args: unknown option 'storge', did you mean 'storage'?"),
        ({"limits": {"pixel": 1}}, "args: unknown option 'limits.pixel', did you mean 'pixels'?"),
        ({"denoiser": {"parallel": {"tensr": 1}}}, "unknown option 'denoiser.parallel.tensr', did you mean 'tensor'?"),
        ({"mail": {"host": "h", "sender": "a@b.test", "prot": 1}}, "unknown option 'mail.prot', did you mean 'port'?"),
        ({"storage": "s3://bucket"}, "args: storage has value 's3://bucket', expected a mapping"),
        (
            {"store": "postgresql://me:secret@db/wan"},
            "args: store has value 'postgresql://me:***@db/wan', expected a m",
        ),
        ({"storage": None}, "args: storage has value None, expected a mapping"),
        ({"storage": {"url": "gs://b"}}, "storage: url has value 'gs://b', expected a folder or s3://bucket/prefix"),
        ({"storage": {"url": "s3://"}}, "storage: url has value 's3://', expected s3://bucket or s3://bucket/prefix"),
        ({"storage": {"url": "s3://b/../c"}}, "storage: url has value 's3://b/../c', expected s3://bucket"),
        (
            {"storage": {"url": "s3://bucket", "endpoint": "h:9000"}},
            "storage: endpoint has value 'h:9000', expected https://host:port or http://host:port",
        ),
        ({"storage": {"endpoint": "http://h"}}, "storage: endpoint has value 'http://h', expected none, because url"),
        ({"storage": {"presign_s": 604801}}, "storage.presign_s has value 604801"),
        ({"denoiser": {"batch": {"wait": 1}}}, "args: unknown option 'denoiser.batch.wait'"),
        (
            {"denoiser": {"parallel": {"tensor": 0}}},
            "args: denoiser.parallel.tensor has value 0, expected greater than 0",
        ),
        ({"denoiser": {"placement": "NEAR"}}, "args: denoiser.placement has value 'NEAR', expected 'PACK'"),
        ({"model": {"dtype": "fp8"}}, "args: model.dtype has value 'fp8', expected 'float32' or 'bfloat16'"),
        ({"dispatcher": {"running_jobs": "many"}}, "args: dispatcher.running_jobs has value 'many'"),
        ({"encoder": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas is 3, expected at most"),
        (
            {"webhooks": {"retention_s": 60}},
            "args: webhooks: retention_s is 60, expected more than 299316 (all of retries_s)",
        ),
        ({"webhooks": {"allow_networks": ["10.0.0.1/8"]}}, "args: webhooks.allow_networks.0 has value '10.0.0.1/8'"),
        ({"webhooks": {"timeout_s": 600}}, "args: webhooks.timeout_s has value 600"),
        ({"webhooks": {"retries_s": []}}, "args: webhooks.retries_s has value []"),
        ({"mail": {"sender": "a@b.test"}}, "args: mail.host: Field required"),
        ({"decoder": {"devices": 0}}, "args: decoder.devices has value 0, expected greater than 0"),
        ({"decoder": {"tile_memory_mib": -1}}, "args: decoder.tile_memory_mib has value -1, expected greater"),
        ({"decoder": {"devices": 2}}, "args: decoder: resources.num_gpus is 1 with 2 devices, expected as many"),
        (
            {"decoder": {"resources": {"num_gpus": 2}}},
            "args: decoder: resources.num_gpus is 2 with 1 devices, expected as many",
        ),
        (
            {"decoder": {"devices": 2, "resources": {"num_gpus": 0}}},
            "args: decoder: resources.num_gpus is 0 with 2 devices, expected as many, or a share of one",
        ),
        (
            {"decoder": {"devices": 2, "device": "cpu", "resources": {"num_gpus": 2}}},
            "args: decoder: devices is 2, expected 1, because device is 'cpu'",
        ),
        (
            {
                "encoder": {"resources": {"num_gpus": 0.4}},
                "denoiser": {"rank": {"num_gpus": 0.6}, "memory_fraction": 0.7},
            },
            "args: memory_fraction adds up to 1.6 on a GPU with 1 x encoder (0.9) and 1 x denoiser rank (0.7), "
            "which share it by num_gpus, expected at most 1",
        ),
        ({"denoiser": {"profile": "here"}}, "args: denoiser: profile is 'here', expected an absolute path"),
        (
            {"denoiser": {"offload": "cpu"}},
            "args: denoiser: experts is 'together' with offload 'cpu', expected 'swap' or 'split'",
        ),
        (
            {"denoiser": {"experts": "swap", "resident_blocks": 3}},
            "args: denoiser: resident_blocks is 3, expected with offload 'cpu' or 'disk' only",
        ),
        (
            {"denoiser": {"experts": "swap", "offload": "disk"}},
            "args: denoiser: offload is 'disk', expected with model.sharded, from whose files it reads",
        ),
        ({"encoder": {"memory_fraction": 1.2}}, "args: encoder.memory_fraction has value 1.2, expected less than or"),
        ({"defaults": {"num_frames": 200}}, "args: defaults: num_frames is 200, expected at most limits' 161"),
    ],
)
def test_refusals_name_option_value_and_expectation(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(args)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_each_fault_has_its_line() -> None:
    with pytest.raises(ConfigError) as error:
        validate({"typo": 1, "limits": {"fps": 0}})
    assert len(str(error.value).splitlines()) == 2


def test_file(tmp_path: Path) -> None:
    content, config = load_file(write(tmp_path, applications(limits={"fps": 30})))
    assert content["applications"][0]["name"] == "wan"
    assert config.limits.fps == 30


def test_a_second_pipeline_may_have_other_options(tmp_path: Path) -> None:
    content = applications(limits={"fps": 30})
    canary: dict[str, Any] = {
        "name": "wan-next",
        "import_path": "serve_app.app:wan",
        "args": {"model": {"path": "next"}},
    }
    content["applications"].append(canary)
    found, config = load_file(write(tmp_path, content))
    assert config.limits.fps == 30 and config.model.path != str(tmp_path / "next")
    assert found["applications"][-1]["args"]["model"] == {"path": str(tmp_path / "next")}
    canary["args"]["storage"] = {"url": "elsewhere"}
    with pytest.raises(
        ConfigError, match=r"'wan-next': storage.url has value '.*elsewhere', expected that of the other"
    ):
        load_file(write(tmp_path, content))
    canary["name"] = "wan"
    content["applications"] = [one for one in content["applications"] if one is canary or one["name"] != "wan"]
    with pytest.raises(ConfigError, match="`args` differ"):
        load_file(write(tmp_path, content))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"next": 1}, "pipelines has next, expected 'wan' (`pipeline`) and at most one more"),
        ({"wan": 1, "a": 1, "b": 1}, "pipelines has wan, a, b, expected 'wan' (`pipeline`) and at most one more"),
        ({"wan": 0, "a": 1}, "pipelines has no share for 'wan', expected one above 0"),
        ({"wan": -1}, "dispatcher.pipelines.wan has value -1, expected greater than or equal to 0"),
    ],
)
def test_shares_of_pipelines_that_cannot_be(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate({"dispatcher": {"pipelines": shares}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"application": []}, "unknown option 'application'"),
        ({"http_options": {"prot": 80}}, "http_options: unknown option 'prot', did you mean 'port'?"),
        ({"http_options": {"port": "abc"}}, "http_options: port has value 'abc', expected a valid integer"),
        ({"http_options": {"port": 70000}}, "http_options: port has value 70000, expected less than or equal to 65535"),
        ({"http_options": [1]}, "http_options has value [1], expected a mapping"),
        ({"proxy_location": "Head"}, "proxy_location has value 'Head', expected one of EveryNode, HeadOnly, Disabled"),
        ({"applications": [{"nam": "wan"}]}, "applications[0]: unknown option 'nam'"),
        ({"applications": [{}]}, "applications[0]: name has value None, expected one that no other application has"),
        ({"applications": [{"name": "a"}, {"name": "a"}]}, "application 'a': name has value 'a', expected one that no"),
        ({"applications": [{"name": "wan", "args": {"typo": 1}}]}, "application 'wan': unknown option 'typo'"),
        ({"applications": [{"name": "wan", "deployments": []}]}, "application 'wan': unknown option 'deployments'"),
        (
            {"applications": [{"name": "a", "args": {"home": "a"}}, {"name": "b", "args": {"home": "b"}}]},
            "the applications' `args` differ",
        ),
        ({"applications": ["wan"]}, "expected a mapping"),
        ({"applications": [{"name": "wan", "args": [1]}]}, "application 'wan' has value [1]"),
        ({"applications": []}, "of at least one"),
    ],
)
def test_file_refusals(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {**applications(), **change})
    with pytest.raises(ConfigError) as error:
        load_file(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not YAML"),
        ("a: 1\nb: [1, 2\nc: 3\n", "is not YAML: line 3, column 2: expected ',' or ']', but got ':'"),
        ("a:\n\tb: 1\n", r"is not YAML: line 2, column 1: found character '\\t'"),
        ("a: *config\n", "is not YAML: line 1, column 4: found undefined alias 'config'"),
        ("\x00", "is not YAML"),
        ("", "is empty, expected a mapping"),
        ("# nothing\n", "is empty, expected a mapping"),
        ("a: 1\nb: {c: 1, c: 2}\n", r"is not YAML: line 2, column 11: the key 'c' is there already, on line 2"),
        ("a: 1\nb: 2\na: 3\n", r"is not YAML: line 3, column 1: the key 'a' is there already, on line 1"),
        ("a: 2026-13-41\n", "is not YAML: line 1, column 4: month must be in 1..12"),
        ("a: 1\n---\nb: 1\n", "is not YAML: line 2, column 1: but found another document"),
        ("[" * 5000, "is nested too deeply"),
        ("- 1", "expected a mapping"),
        ("a: 1", "`applications`"),
    ],
)
def test_file_is_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_file(write(tmp_path, content))


@pytest.mark.parametrize(
    ("host", "auth", "fine"),
    [
        (None, {}, True),
        ("127.0.0.1", {}, True),
        ("localhost", {}, True),
        ("::1", {}, True),
        ("0.0.0.0", {}, False),
        ("::", {}, False),
        ("10.0.0.1", {"mode": "none"}, False),
        ("0.0.0.0", {"open": True}, True),
        ("0.0.0.0", {"mode": "keys"}, True),
    ],
)
def test_who_may_reach_it(tmp_path: Path, host: str | None, auth: dict[str, Any], fine: bool) -> None:
    path = write(tmp_path, {**applications(auth=auth), "http_options": {} if host is None else {"host": host}})
    if fine:
        load_file(path)
        return
    with pytest.raises(ConfigError) as error:
        load_file(path)
    assert "http_options.host has value" in str(error.value) and "auth.open" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_may_replace_that_of_a_merge(tmp_path: Path) -> None:
    text = """
applications:
  - name: wan
    import_path: serve_app.app:wan
    args: &first {limits: &limits {fps: 30, queued_jobs: 5}}
  - name: gateway
    import_path: serve_app.app:gateway
    args: {<<: *first, limits: {<<: *limits, fps: 30}}
"""
    config = load_file(write(tmp_path, text))[1]
    assert (config.limits.fps, config.limits.queued_jobs) == (30, 5)


def test_options_are_named_with_their_line(tmp_path: Path) -> None:
    text = """
applications:
  - name: wan
    args: &config
      limits:
        fps: many
  - name: gateway
    args: *config
"""
    with pytest.raises(ConfigError) as error:
        load_file(write(tmp_path, text))
    assert "limits.fps has value 'many'" in str(error.value) and str(error.value).endswith("(line 6)")
    with pytest.raises(ConfigError, match=r"did you mean 'applications'\? \(line 1\)"):
        load_file(write(tmp_path, "application: []\n" + text.replace("many", "1")))


def test_numbers_in_quotes_are_numbers_for_ray_too(tmp_path: Path) -> None:
    file = {**applications(limits={"fps": "30"}), "http_options": {"port": "8123", "host": "[::1]"}}
    content, config = load_file(write(tmp_path, file))
    assert content["http_options"] == {"port": 8123, "host": "::1"} and config.limits.fps == 30
    assert content["applications"][0]["args"]["limits"] == {"fps": 30}


def test_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_file(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files(path: Path) -> None:
    load_file(path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"patience": {"batch": 1}}, "args: unknown option 'patience', it is now 'ageing'"),
        ({"model": {"prepared": "x"}}, "args: unknown option 'model.prepared', it is now 'model.sharded'"),
        (
            {"denoiser": {"peer_memory": False}},
            "args: unknown option 'denoiser.peer_memory', it is now 'denoiser.symmetric_memory'",
        ),
        (
            {"denoiser": {"text_memory_mib": 1}},
            "args: unknown option 'denoiser.text_memory_mib', it is now 'denoiser.text_cache_mib'",
        ),
    ],
)
def test_an_option_that_was_renamed(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(args)
    assert str(raised.value) == message
