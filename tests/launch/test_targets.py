"""Checks of `wan-serve check` and `up` before anything starts, without a Ray."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import load_file
from serve_app.errors import ConfigError
from serve_app.launch.targets import Targets, build, serve_options
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.writer import prepare

CONFIGS = Path(__file__).parents[2] / "configs"
Args = dict[str, Any]
Change = Callable[[Args, Args], object]


@pytest.fixture
def checked(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Targets]:
    """Return a function that builds a changed configs/tiny.yaml. The change gets the file and the shared `args`."""
    for name in ("WAN_SERVE_HOME", "WAN_SERVE_QUEUE_URL", "WAN_SERVE_MAIL_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "my.yaml"

    def run(change: Change) -> Targets:
        content = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
        wan, gateway = content["applications"]
        args = wan["args"]
        args["model"].update(path=str(checkpoint))
        args["home"] = "home"
        change(content, args)
        wan["args"], gateway["args"] = copy.deepcopy(args), copy.deepcopy(args)
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        return build(path, *load_file(path))

    return run


def both(change: Callable[[Args], object]) -> Change:
    """Return a change of each application of the file."""
    return lambda content, _: [change(application) for application in content["applications"]]


def environment(**variables: object) -> Change:
    return both(lambda application: application.update(runtime_env={"env_vars": variables}))


def test_nothing_to_say(checked: Callable[[Change], Targets], tmp_path: Path) -> None:
    targets = checked(lambda *_: None)
    assert (targets.notes, targets.runtime_env, targets.gateways) == ([], None, ["/"])
    assert [(target.name, target.route_prefix) for target in targets.run] == [("wan", None), ("gateway", "/")]
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content, _: content["applications"][0].update(import_path="serve_app.app:wam"), "did you mean 'serve_"),
        (lambda content, _: content["applications"][1].update(import_path="x:y"), "'x:y', expected one of serve_app"),
        (lambda content, _: content["applications"][1].pop("import_path"), "import_path has value None, expected"),
        (lambda _, args: args["defaults"].update(width=100), "defaults: 'width' is 100, expected a positive multiple"),
        (lambda _, args: args["defaults"].update(num_frames=34), "defaults: 'num_frames' is 34, expected"),
        (
            lambda _, args: args["defaults"].update(guidance_scale=101),
            "defaults.guidance_scale has value 101, expected less than or equal to 100",
        ),
        (lambda _, args: args["defaults"].update(negative_prompt="x" * 5000), "'negative_prompt' has 5000 characters"),
        (
            lambda _, args: args["limits"].update(prompt_chars=3),
            "'negative_prompt' has 40 characters, expected at most",
        ),
        (
            lambda _, args: args["denoiser"].update(parallel={"tensor": 3}),
            "denoiser.parallel.tensor has value 3, expected",
        ),
        (lambda _, args: args["denoiser"].update(parallel={"sequence": 5}), "denoiser.parallel.sequence has value 5"),
        (lambda _, args: args["denoiser"].update(parallel={"ranks": 7}), "denoiser.parallel.ranks has value 7"),
        (lambda _, args: args["model"].update(path="nowhere"), "nowhere: is not a folder"),
        (
            lambda _, args: args["model"].update(sharded="nowhere"),
            "nowhere/manifest.json: is missing, expected a fold",
        ),
        (lambda _, args: args.update(store={"url": "postgresql+x//db"}), "store.url has value 'postgresql+x//db', exp"),
        (lambda _, args: args.update(store={"url": "mysql://db/x"}), "expected a file of SQLite or a PostgreSQL data"),
        (
            lambda _, args: args.update(store={"url": "postgres://me:secret@db/wan?channel_binding=require"}),
            "store.url has value 'postgres://me:***@db/wan?channel_binding=require': has the option 'channel_binding'",
        ),
        (
            lambda _, args: args.update(store={"url": "postgres://db/x?sslmode=on"}),
            "has sslmode 'on', expected one of ",
        ),
        (
            lambda _, args: args.update(store={"url": "postgres://db:70000/x"}),
            "has the port 70000, expected 1 to 65535",
        ),
        (lambda _, args: args.update(queue={"transport": "rabbitmq"}), "queue.url has value '', expected amqp://"),
        (
            lambda _, args: args.update(queue={"transport": "rabbitmq", "url": "amqp://me:secret@mq:port/"}),
            "queue.url has value 'amqp://me:***@mq:port/', expected amqp://",
        ),
        (lambda _, args: args.update(storage={"url": "s3://b"}), "url has value 's3://b', expected s3://bucket"),
        (lambda _, args: args["encoder"]["resources"].update(num_gpus=1.5), "num_gpus is 1.5, expected a whole number"),
        (
            lambda _, args: args["encoder"]["resources"].update(num_cpus=1e-5),
            "num_cpus is 1e-05, expected 0 or at least",
        ),
        (lambda _, args: args["denoiser"]["rank"].update(resources={"GPU": 1}), "resources has 'GPU', expected the na"),
        (lambda _, args: args["encoder"]["resources"].update(labels={"pool": "in("}), "application 'wan': "),
        (lambda _, args: args["denoiser"]["rank"].update(labels={"a b": "x"}), "application 'wan': "),
        (lambda _, args: args["limits"].update(num_frames=True), "num_frames is true, expected a number"),
        (
            lambda _, args: args.update(dispatcher={"lease_s": float("inf")}),
            "dispatcher.lease_s has value inf, expected",
        ),
        (
            lambda _, args: args.update(dispatcher={"pipeline": "van"}),
            "expected the name of the application that has it",
        ),
        (
            lambda content, _: content["applications"][0].pop("route_prefix"),
            "route_prefix is missing, which is '/', ex",
        ),
        (lambda content, _: content["applications"][0].update(route_prefix="/wan"), "'/wan', expected null: the pipel"),
        (lambda content, _: content["applications"][1].update(route_prefix=None), "None, expected a path such as '/'"),
        (lambda content, _: content["applications"][1].update(route_prefix="api"), "expected a path that begins with"),
        (lambda content, _: content["applications"][1].update(route_prefix="/api/"), "and does not end with it"),
        (lambda content, _: content["applications"][1].update(route_prefix="/a b"), "expected a path of letters, digi"),
        (
            lambda content, _: content["applications"].append({**content["applications"][1], "name": "second"}),
            "expected one that no other application has: 'gateway' has it",
        ),
        (
            lambda content, _: content["applications"][0].update(runtime_env={"env_vars": {"A": "1"}}),
            "the applications' `runtime_env` differ",
        ),
        (environment(WAN_SERVE_HOM="/x"), "has 'WAN_SERVE_HOM', which nothing reads, did you mean 'WAN_SERVE_HOME'?"),
        (
            environment(RAY_DEDUP_LOGS=0),
            "runtime_env.env_vars.RAY_DEDUP_LOGS is of type int, expected a text in quotes",
        ),
        (environment(**{"A B": "x"}), "runtime_env.env_vars has 'A B', expected the name of a variable"),
        (both(lambda one: one.update(runtime_env={"env_var": {}})), "unknown option 'runtime_env.env_var'"),
        (both(lambda one: one.update(runtime_env=["x"])), "runtime_env has value ['x'], expected a mapping"),
        (lambda content, _: content["http_options"].update(host=""), "http_options: host has value ''"),
        (
            lambda content, _: content["http_options"].update(keep_alive_timeout_s=2.5),
            "keep_alive_timeout_s has value ",
        ),
        (lambda content, _: content.update(logging_config={"log_level": 7.5}), "logging_config.log_level"),
    ],
)
def test_refusals(checked: Callable[[Change], Targets], change: Change, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(change)
    assert said in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value)


def test_serve_gets_the_options_of_the_file(checked: Callable[[Change], Targets], tmp_path: Path) -> None:
    given = {"logging_config": {"log_level": "DEBUG"}, "grpc_options": {"port": 9100}}
    targets = checked(lambda content, _: content.update(given))
    assert [target.logging_config for target in targets.run] == [{"log_level": "DEBUG"}] * 2
    content, _ = load_file(tmp_path / "my.yaml")
    options = serve_options(content)
    assert given.items() <= options.items() and options["proxy_location"] == "HeadOnly"
    assert options["http_options"]["port"] == 8000 and "controller_options" in options
    assert serve_options({"applications": []}) == {"proxy_location": "EveryNode"}


def test_notes(checked: Callable[[Change], Targets]) -> None:
    (note,) = checked(lambda content, _: content.update(proxy_location="Disabled")).notes
    assert note.startswith("proxy_location has value 'Disabled': the gateway answers no HTTP")
    mail = {"host": "h", "sender": "a@b.test", "user": "me"}
    (note,) = checked(lambda _, args: args.update(mail=mail)).notes
    assert note.startswith("mail.user has value 'me': WAN_SERVE_MAIL_PASSWORD is not set here")


def test_a_pipeline_that_another_file_deploys(tmp_path: Path) -> None:
    content = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    content["applications"] = content["applications"][1:]
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(content))
    targets = build(path, *load_file(path))
    assert [need.deployment for need in targets.needs] == ["gateway", "dispatcher"]
    assert targets.notes[0].startswith("dispatcher.pipeline has value 'wan', which is no application of this file")


def test_a_misspelled_variable(checked: Callable[[Change], Targets], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SERVE_SERVICE_HOST", "10.0.0.1")  # Kubernetes, of a service called wan-serve
    monkeypatch.setenv("WAN_SERVE_HOMES", "/x")
    (note,) = checked(lambda *_: None).notes
    assert note == "the environment variable WAN_SERVE_HOMES is not read: did you mean WAN_SERVE_HOME?"


def test_shards_of_another_mesh_or_type(checked: Callable[[Change], Targets], checkpoint: Path, tmp_path: Path) -> None:
    prepare(Checkpoint(checkpoint), tmp_path / "shards", 1, "float32", [], False, lambda *_: None)

    def change(tensor: int, dtype: str) -> Change:
        def apply(_: Args, args: Args) -> None:
            args["model"].update(sharded="shards", dtype=dtype)
            args["denoiser"].update(parallel={"tensor": tensor})

        return apply

    assert checked(change(1, "float32")).notes == []
    for tensor, dtype, said in ((2, "float32", "tensor 1, expected 2"), (1, "bfloat16", "dtype float32, expected bfl")):
        with pytest.raises(ConfigError, match=f"was prepared with {said}"):
            checked(change(tensor, dtype))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_no_shipped_file_uses_what_ray_gives_up(
    path: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_SERVE_QUEUE_URL", "amqp://wan:secret@broker:5672/")  # which a14b-hosts does not hold
    content = yaml.safe_load(path.read_text())
    for application in content["applications"]:
        application["args"]["model"].update(path=str(checkpoint))
        application["args"]["model"].pop("sharded", None)
    copied = tmp_path / path.name
    copied.write_text(yaml.safe_dump(content, allow_unicode=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(build(copied, *load_file(copied)).run) == 2


def test_check_says_what_it_left_out() -> None:
    command: list[Any] = [Path(sys.executable).parent / "wan-serve", "check", CONFIGS / "tiny.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith(f"{CONFIGS / 'tiny.yaml'}: fine\n") and done.stderr == ""
    assert "not looked at: database, broker, bucket" in done.stdout and "/data/jobs.db, videos in " in done.stdout
