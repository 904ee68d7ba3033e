"""The examples to run elsewhere: each file is one that its tool reads, each command line one that the trainer takes.

JobSet and Kubernetes: the models that Kubeflow publishes of both interfaces, made from their own definitions; a field
that they do not have is refused. Slurm: the options that `sbatch --help` of 22.05.8 lists, and the script itself, run
by bash beside an `srun` that only writes down what it is given. SkyPilot: a schema of the fields that are used, for the
package asks for a hundred others; examples/README.md says what its own reader was given.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from jsonschema import Draft202012Validator
from kubeflow_trainer_api.models.io_k8s_api_core_v1_persistent_volume_claim import IoK8sApiCoreV1PersistentVolumeClaim
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from spec import command_line, processes
from spec.errors import UserError
from spec.sweep import ManyFlags

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGE = (EXAMPLES / "README.md").read_text("utf-8")
TRAINER = ["-m", "jax_impl.train"]

MODELS = {"PersistentVolumeClaim": IoK8sApiCoreV1PersistentVolumeClaim, "JobSet": JobsetV1alpha2JobSet}
# The models hold these two as classes of their own; in a file they are a word or a number.
UNIONS = {
    "IoK8sApimachineryPkgApiResourceQuantity": {"type": ["string", "number"]},
    "IoK8sApimachineryPkgUtilIntstrIntOrString": {"type": ["string", "integer"]},
}

# `sbatch --help`, Slurm 22.05.8, and --open-mode of its manual: options with a value, with one that may be
# left out, and without.
VALUED = """
    array account bb bbf begin comment cpu-freq cpus-per-task dependency deadline delay-boot chdir error export-file gid
    gres gres-flags input job-name licenses clusters container distribution mail-type mail-user mcs-label ntasks
    ntasks-per-node nodes output partition power priority profile qos core-spec signal switches thread-spec time
    time-min uid wckey wrap cluster-constraint constraint nodefile mem mincpus reservation tmp nodelist exclude
    mem-per-cpu sockets-per-node cores-per-socket threads-per-core extra-node-info ntasks-per-core ntasks-per-socket
    cpus-per-gpu gpus gpu-bind gpu-freq gpus-per-node gpus-per-socket gpus-per-task mem-per-gpu open-mode
"""
OPTIONAL = "export nice propagate exclusive get-user-env"
BARE = """
    hold ignore-pbs no-kill no-requeue overcommit parsable quiet reboot requeue oversubscribe spread-job use-min-nodes
    verbose wait contiguous
"""

# Of sky.utils.schemas of SkyPilot 0.14.1, what the file uses and what it is likely to be changed to.
STRINGS = {"type": "string"}
AMOUNT = {"type": ["string", "integer", "number"]}
CODES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}


def _closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


SKYPILOT = _closed(
    name={"type": "string", "pattern": "^[a-zA-Z0-9]+(?:[._-]{1,2}[a-zA-Z0-9]+)*$"},
    num_nodes={"type": "integer", "minimum": 1},
    resources=_closed(
        infra=STRINGS,
        cloud=STRINGS,
        cpus=AMOUNT,
        memory=AMOUNT,
        accelerators={"type": ["string", "object", "array"]},
        image_id=STRINGS,
        disk_size=AMOUNT,
        use_spot={"type": "boolean"},
        job_recovery=_closed(
            strategy=STRINGS, max_restarts_on_errors={"type": "integer", "minimum": 0}, recover_on_exit_codes=CODES
        ),
    ),
    workdir=STRINGS,
    file_mounts={
        "type": "object",
        "patternProperties": {"^/": _closed(name=STRINGS, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]})},
        "additionalProperties": False,
    },
    envs={"type": "object", "additionalProperties": STRINGS},
    setup=STRINGS,
    run=STRINGS,
)


# JobSet and Kubernetes


def jobset_file() -> dict[str, Any]:
    """Return the file's documents, by kind."""
    documents = list(yaml.safe_load_all((EXAMPLES / "jobset.yaml").read_text("utf-8")))
    assert len(documents) == len(MODELS)
    return {document["kind"]: document for document in documents}


def strict(schema: Any) -> Any:
    """Return a pydantic model's schema as a cluster reads it: no field that is not there, none that is null."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$defs" in schema:
        schema = schema | {"$defs": schema["$defs"] | UNIONS}
    schema = {key: strict(part) for key, part in schema.items()}
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1:
        return {key: part for key, part in schema.items() if key not in ("anyOf", "default")} | kinds[0]
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema["additionalProperties"] = False
    return schema


STRICT = {kind: Draft202012Validator(strict(model.model_json_schema(by_alias=True))) for kind, model in MODELS.items()}


def misfits(documents: Mapping[str, Any]) -> list[str]:
    """Return where documents are not what the models of their kind say."""
    return [
        f"{kind}{error.json_path[1:]}: {error.message}"
        for kind, document in documents.items()
        for error in STRICT[kind].iter_errors(document)
    ]


def test_the_jobset_file_is_what_the_models_of_jobset_and_kubernetes_say():
    assert misfits(jobset_file()) == []


POD = "JobSet.spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("JobSet.spec", "failPolicy", {}),
        ("JobSet.spec.failurePolicy", "maxRestarts", "20"),
        ("JobSet.spec.failurePolicy.rules.0", "onJobFailureReason", []),
        ("JobSet.spec.coordinator", "replicatedJob", None),
        ("JobSet.spec.network", "enableDnsHostnames", True),
        ("JobSet.spec.replicatedJobs.0", "parallelism", 4),
        ("JobSet.spec.replicatedJobs.0.template.spec", "completionmode", "Indexed"),
        (POD, "terminationGracePeriod", 60),
        (f"{POD}.containers.0", "name", 1),
        (f"{POD}.containers.0.env.0", "valuefrom", {}),
        (f"{POD}.containers.0.resources", "limit", {}),
        (f"{POD}.volumes.0.persistentVolumeClaim", "claim", "lockstep-runs"),
        ("PersistentVolumeClaim.spec", "accessModes", "ReadWriteMany"),
        ("PersistentVolumeClaim.spec.resources.requests", "storage", []),
    ],
)
def test_a_field_that_is_not_there_or_has_another_type_is_refused(place, name, value):
    documents = changed(jobset_file(), place, name, value)
    (wrong,) = misfits(documents)
    assert name in wrong


def changed(documents: Mapping[str, Any], place: str, name: str, value: Any) -> dict[str, Any]:
    """Return documents with one field changed or added."""
    documents = copy.deepcopy(dict(documents))
    here: Any = documents
    for part in place.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    here[int(name) if isinstance(here, list) else name] = value
    return documents


def contradictions(documents: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a run of several processes needs of the file and no schema asks for."""
    claim, spec = documents["PersistentVolumeClaim"], documents["JobSet"]["spec"]
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    first = parsed(arguments_of(container, process=0))
    ports = [port["containerPort"] for port in container["ports"]]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    (rule,) = job["podFailurePolicy"]["rules"]
    checks = {
        "a process for each pod": job["parallelism"] == job["completions"] == first.num_processes,
        "one job, for the numbers are a job's own": workers["replicas"] == 1,
        "pods have numbers": job["completionMode"] == "Indexed",
        "process 0 is the coordinator": spec["coordinator"]
        == {"replicatedJob": workers["name"], "jobIndex": 0, "podIndex": 0},
        "the coordinator's port is open": ports == [int(first.coordinator.rsplit(":", 1)[1])],
        "one pod that ends ends all": job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never",
        "there are restarts": spec["failurePolicy"]["maxRestarts"] > 0,
        "a mistake is no reason for one": rule["onExitCodes"]
        == {"containerName": container["name"], "operator": "In", "values": [UserError.status]}
        and rule["action"] == "FailJob"
        and [(rule["action"], rule["onJobFailureReasons"]) for rule in spec["failurePolicy"]["rules"]]
        == [("FailJobSet", ["PodFailurePolicy"])],
        "time to save": pod["terminationGracePeriodSeconds"] >= 30,
        "the run is kept on the claim": claims.get(mounts.get(str(first.out.parent))) == claim["metadata"]["name"],
        "all pods reach it": claim["spec"]["accessModes"] == ["ReadWriteMany"],
        "the image is the Dockerfile's": f"--tag {container['image']} " in (EXAMPLES / "Dockerfile").read_text("utf-8"),
    }
    yield from (claim for claim, holds in checks.items() if not holds)


def arguments_of(container: Mapping[str, Any], *, process: int) -> list[str]:
    """Return a container's arguments, what stands for a variable replaced as a cluster would."""
    annotations = {
        "metadata.annotations['jobset.sigs.k8s.io/coordinator']": "lockstep-workers-0-0.lockstep",
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(process),
    }
    values = {entry["name"]: annotations[entry["valueFrom"]["fieldRef"]["fieldPath"]] for entry in container["env"]}
    return [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], argument) for argument in container["args"]]


def test_the_jobsets_pods_are_the_processes_of_one_run_that_survives():
    assert list(contradictions(jobset_file())) == []


JOB = "JobSet.spec.replicatedJobs.0.template.spec"


@pytest.mark.parametrize(
    ("place", "name", "value", "claim"),
    [
        (JOB, "parallelism", 3, "a process for each pod"),
        (f"{POD}.containers.0.args", "2", "--num-processes=5", "a process for each pod"),
        ("JobSet.spec.replicatedJobs.0", "replicas", 2, "one job, for the numbers are a job's own"),
        (JOB, "completionMode", "NonIndexed", "pods have numbers"),
        ("JobSet.spec.coordinator", "replicatedJob", "leader", "process 0 is the coordinator"),
        (f"{POD}.containers.0.ports.0", "containerPort", 55528, "the coordinator's port is open"),
        (JOB, "backoffLimit", 6, "one pod that ends ends all"),
        ("JobSet.spec.failurePolicy", "maxRestarts", 0, "there are restarts"),
        (f"{JOB}.podFailurePolicy.rules.0.onExitCodes", "values", [1], "a mistake is no reason for one"),
        (POD, "terminationGracePeriodSeconds", 5, "time to save"),
        (f"{POD}.containers.0.args", "6", "--out=/cnn", "the run is kept on the claim"),
        ("PersistentVolumeClaim.spec", "accessModes", ["ReadWriteOnce"], "all pods reach it"),
        (f"{POD}.containers.0", "image", "lockstep:latest", "the image is the Dockerfile's"),
    ],
)
def test_a_jobset_of_which_one_part_contradicts_another_is_noticed(place, name, value, claim):
    documents = changed(jobset_file(), place, name, value)
    assert misfits(documents) == []
    assert list(contradictions(documents)) == [claim]


# Slurm


class Started(NamedTuple):
    """What a script did: its status, and the words of each command that it gave to a stand-in."""

    status: int
    commands: list[list[str]]


def directives(script: str) -> list[str]:
    """Return the words of a script's #SBATCH lines, as sbatch reads them: down to the first command."""
    lines = script.splitlines()
    commands = [number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    return [word for line in lines[: commands[0]] if line.startswith("#SBATCH") for word in shlex.split(line)[1:]]


def refused(script: str) -> Iterator[str]:
    """Yield what sbatch would not take of a script's directives, or not see."""
    seen = directives(script)
    for word in seen:
        name, equals, value = word.removeprefix("--").partition("=")
        known = (name in VALUED.split() and value) or name in OPTIONAL.split() or (name in BARE.split() and not equals)
        if not word.startswith("--") or not known:
            yield word
    if len(re.findall("^#SBATCH", script, re.MULTILINE)) != len(seen):
        yield "an #SBATCH line that holds no option, or stands below the first command"


@pytest.fixture
def slurm_script() -> str:
    return (EXAMPLES / "slurm.sh").read_text("utf-8")


def test_sbatch_has_every_option_of_the_slurm_script(slurm_script):
    assert list(refused(slurm_script)) == []
    assert {"--nodes=2", "--ntasks-per-node=1", "--requeue", "--signal=TERM@60"} <= set(directives(slurm_script))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("--requeue", "--requeue-on-failure", "--requeue-on-failure"),
        ("--requeue", "--requeue=yes", "--requeue=yes"),
        ("--ntasks-per-node=1", "--tasks-on-node=1", "--tasks-on-node=1"),
        ("--mem=4G", "--mem", "--mem"),
        ("--mem=4G", "-mem=4G", "-mem=4G"),
        ("#SBATCH --requeue\n", "true\n#SBATCH --requeue\n", "an #SBATCH line that"),
        ("#SBATCH --requeue\n", "#SBATCH\n", "an #SBATCH line that"),
    ],
)
def test_an_option_that_sbatch_has_not_or_does_not_see_is_refused(slurm_script, right, wrong, said):
    assert any(word.startswith(said) for word in refused(slurm_script.replace(right, wrong, 1)))


def run_script(path: Path, script: str, *, status: int = 0, arguments: Sequence[str] = (), **said: str) -> Started:
    """Run a script beside an srun, a scontrol and a python that write down their words; the first and the last leave
    with `status`."""
    path.mkdir(exist_ok=True)
    log = path / "log"
    log.write_text("")
    home = path / "lockstep" / "bin"
    home.mkdir(parents=True, exist_ok=True)
    for place, leave in ((path / "srun", status), (path / "scontrol", 0), (home / "python", status)):
        words = f'printf "%s\\0" {place.name} "$@" >> {shlex.quote(str(log))}; printf "\\n" >> {shlex.quote(str(log))}'
        place.write_text(f"#!/bin/bash\n{words}\nexit {leave}\n")
        place.chmod(0o755)
    (path / "script").write_text(script)
    environment = {"PATH": f"{path}:/usr/bin:/bin", "HOME": str(path)} | said
    ended = subprocess.run(["bash", path / "script", *arguments], env=environment, capture_output=True, text=True)
    assert ended.stderr == ""
    return Started(ended.returncode, [line.split("\0")[:-1] for line in log.read_text().splitlines()])


def run_slurm(path: Path, script: str, *, arguments: Sequence[str] = (), status: int = 0, restarts: int = 0) -> Started:
    """Run the Slurm script as Slurm would on the first node."""
    said = {"SLURM_SUBMIT_DIR": str(path), "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "2"}
    said |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    return run_script(path, script, status=status, arguments=arguments, **said)


def trained(words: Sequence[str]) -> ManyFlags:
    """Return the flags of a command that starts the trainer."""
    start = next(at for at in range(len(words)) if words[at : at + 2] == TRAINER)
    return parsed(words[start + 2 :])


def parsed(arguments: Sequence[str]) -> ManyFlags:
    """Return the flags as the trainer reads them."""
    flags = command_line.parse(arguments, program="train", description="-", kind=ManyFlags)
    processes.check(flags)
    return flags


def test_the_slurm_script_starts_a_trainer_that_asks_slurm_who_it_is(tmp_path, slurm_script):
    started = run_slurm(tmp_path, slurm_script, arguments=["--recipe", "cnn", "--epochs", "7"])
    ((program, *words),) = started.commands
    flags = trained(words)
    assert (program, started.status) == ("srun", 0)
    assert "--kill-on-bad-exit=0" in words
    assert flags.distributed
    assert (flags.coordinator, flags.num_processes, flags.process_id) == (None, None, None)
    assert (flags.recipe, flags.config.epochs, str(flags.out)) == ("cnn", 7, "runs/slurm-17")


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (75, 0, True),
        (134, 1, True),
        (137, 3, True),
        (143, 19, True),
        (143, 20, False),
    ],
)
def test_the_slurm_job_is_queued_again_after_what_may_end_otherwise(tmp_path, slurm_script, status, restarts, again):
    started = run_slurm(tmp_path, slurm_script, status=status, restarts=restarts)
    assert started.status == status
    assert started.commands[1:] == [["scontrol", "requeue", "17"]] * again


def test_the_slurm_job_of_a_run_that_is_done_is_not_queued_again(tmp_path, slurm_script):
    (tmp_path / "runs" / "slurm-17").mkdir(parents=True)
    assert len(run_slurm(tmp_path, slurm_script, status=143).commands) == 2
    (tmp_path / "runs" / "slurm-17" / "summary.json").write_text("{}")
    assert len(run_slurm(tmp_path, slurm_script, status=143).commands) == 1


# SkyPilot


@pytest.fixture
def skypilot() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text("utf-8"))


def unknown(task: Mapping[str, Any]) -> list[str]:
    """Return what SkyPilot does not know of a task, or knows otherwise."""
    return [error.message for error in Draft202012Validator(SKYPILOT).iter_errors(task)]


def test_the_skypilot_file_has_only_fields_that_skypilot_knows(skypilot):
    assert unknown(skypilot) == []


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("task", "nodes", 2),
        ("task", "num_nodes", "2"),
        ("task", "num_nodes", 0),
        ("task.resources", "spot", True),
        ("task.resources", "use_spot", "yes"),
        ("task.resources.job_recovery", "recover_on_exit_codes", [256]),
        ("task.resources.job_recovery", "max_restarts", 3),
        ("task.file_mounts./runs", "mode", "CACHED"),
        ("task", "run", ["python"]),
    ],
)
def test_a_field_that_skypilot_does_not_know_is_refused(skypilot, place, name, value):
    assert len(unknown(changed({"task": skypilot}, place, name, value)["task"])) == 1


def test_each_of_skypilots_machines_starts_its_own_process_of_the_run(tmp_path, skypilot):
    addresses = "10.0.0.4\n10.0.0.5"
    for rank in range(skypilot["num_nodes"]):
        said = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": addresses}
        started = run_script(tmp_path, skypilot["run"], status=75, **said)
        (words,) = started.commands
        flags = trained(words)
        assert started.status == 75
        assert (flags.coordinator, flags.num_processes, flags.process_id) == ("10.0.0.4:55527", 2, rank)
        assert str(flags.out.parent) in skypilot["file_mounts"]
    assert {75, 134, 143} <= set(skypilot["resources"]["job_recovery"]["recover_on_exit_codes"])


# All of them


def test_a_flag_that_the_trainer_has_not_is_refused(tmp_path, slurm_script, skypilot):
    misspelt = slurm_script.replace("--connect-timeout", "--connection-timeout")
    with pytest.raises(UserError, match=r"connection-timeout is not an option \(did you mean --connect-timeout\?\)"):
        trained(run_slurm(tmp_path, misspelt).commands[0])
    alone = skypilot["run"].replace('--process-id "$SKYPILOT_NODE_RANK"', "")
    said = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4"}
    with pytest.raises(UserError, match="--coordinator needs --process-id beside it"):
        trained(run_script(tmp_path, alone, **said).commands[0])
    args = changed(jobset_file(), f"{POD}.containers.0.args", "5", "--recipe=cnnn")
    with pytest.raises(UserError, match="did you mean 'cnn'"):
        list(contradictions(args))


@pytest.mark.parametrize("name", ["slurm.sh", "skypilot.yaml: setup", "skypilot.yaml: run"])
def test_bash_can_read_every_script(tmp_path, name, skypilot):
    file, _, field = name.partition(": ")
    script = skypilot[field] if field else (EXAMPLES / file).read_text("utf-8")
    assert bash_reads(script)
    assert not bash_reads(script + "\nif true; then\n")


def bash_reads(script: str) -> bool:
    """Say whether bash can parse a script; it is not run."""
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).returncode == 0


def lacking(dockerfile: str) -> Iterator[str]:
    """Yield what the Dockerfile names and the checkout has not, and instructions that there are not."""
    for line in re.sub(r"\\\n", " ", dockerfile).splitlines():
        if line and not line.startswith("#"):
            instruction, *words = line.split()
            if instruction not in ("FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "ENTRYPOINT"):
                yield instruction
            if instruction == "COPY":
                yield from (name for name in words[:-1] if not (ROOT / name).exists())
            yield from (name for name in re.findall(r"constraints/\S+", line) if not (ROOT / name).exists())


def test_the_dockerfile_takes_what_the_checkout_has_and_starts_the_trainer():
    text = (EXAMPLES / "Dockerfile").read_text("utf-8")
    assert list(lacking(text)) == []
    assert list(lacking(text.replace("COPY spec spec", "COPY specs spec"))) == ["specs"]
    assert list(lacking(text.replace("USER", "USERS"))) == ["USERS"]
    assert list(lacking(text.replace("constraints/main.txt", "constraints/cpu.txt"))) == ["constraints/cpu.txt"]
    assert json.loads(text.rsplit("ENTRYPOINT", 1)[1]) == ["python", *TRAINER]


def commands_of(page: str) -> list[list[str]]:
    """Return the commands of a page's blocks that start the trainer, options alone."""
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    starts = (re.search(r"-m jax_impl\.train(.*)", line) for line in blocks.splitlines())
    return [shlex.split(start[1], comments=True) for start in starts if start]


def test_the_page_names_every_example_and_its_commands_are_the_trainers():
    assert all(f"`{path.name}`" in PAGE for path in EXAMPLES.iterdir() if path.name != "README.md")
    commands = commands_of(PAGE)
    assert len(commands) >= 3
    assert all(parsed(command).distributed for command in commands)
