"""Is the rig what docs/lab.md says? Every claim that a test of the fleet rests on, in under a minute."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from rig import faults
from rig.lab import Lab
from rig.shell import LabError, wait_for
from rig.table import NODES, REGISTRY, REGISTRY_PASSWORD, REGISTRY_USER, REGISTRY_WITH_PASSWORD

ENGINES = ("rift", "orion", "hyperborea")
WITHIN_S = 15.0


def run(lab: Lab, node: str, image: str, name: str, *flags: str) -> None:
    lab.on(node, f"docker pull -q {REGISTRY}/{image} >/dev/null")
    lab.on(node, f"docker run -d --name {name} {' '.join(flags)} {REGISTRY}/{image}")


def get(lab: Lab, node: str, url: str, limit_s: int = 3) -> str:
    return lab.on(node, f"curl -s -m {limit_s} {url}", check=False)


def eventually(what: str, probe: Callable[[], object], within_s: float = WITHIN_S) -> None:
    wait_for(what, probe, within_s)


def answers(lab: Lab, source: str, target: str, words: str = "version=", limit_s: int = 3) -> bool:
    return words in get(lab, source, f"http://{target}:8080/", limit_s)


def running(lab: Lab, node: str) -> list[str]:
    return sorted(lab.on(node, "docker ps --format '{{.Names}}'").split())


def ended(lab: Lab, node: str, name: str) -> str:
    facts = "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}"
    return lab.on(node, f"docker inspect -f '{facts}' {name}")


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    yield
    faults.heal(lab)
    for node in ENGINES:
        lab.on(node, "docker ps -aq | xargs -r docker rm -f >/dev/null")


def test_every_node_can_run_the_checkout_with_its_python(lab: Lab) -> None:
    for node in (*ENGINES, "svc", "op"):
        lab.on(node, f"cd / && {sys.executable} -c 'import nats, aiodocker'")


def test_what_people_keep_on_this_machine_is_not_in_the_nodes(lab: Lab) -> None:
    for folder in ("/root", "/srv"):
        for own in Path(folder).iterdir():
            shown = [target for _, target in lab.binds if target.is_relative_to(own)]
            assert shown or own.name == ".ssh" or not (lab.root("op") / str(own)[1:]).exists(), own


def test_the_command_line_speaks_of_the_same_rig(lab: Lab) -> None:
    program = [str(Path(__file__).parent / "lab"), "--state", str(lab.cache.parent)]
    status = json.loads(subprocess.run([*program, "status"], capture_output=True, check=True).stdout)
    assert status["nodes"]["rift"]["docker"] == "active"
    said = subprocess.run([*program, "exec", "svc", "--", "hostname"], capture_output=True, check=True).stdout
    assert said == b"svc\n"


def test_the_edge_has_no_engine(lab: Lab) -> None:
    with pytest.raises(OSError):
        lab.engine("svc", "/_ping")


def test_each_node_has_an_engine_and_ports_of_its_own(lab: Lab) -> None:
    for node in ENGINES:
        run(lab, node, "web:v1", f"web-{node}", f"-e MCP_NODE={node} -p {NODES[node].address()}:8080:8080")
    for node in ENGINES:
        eventually(node, partial(answers, lab, "op", node, f"version=v1 node={node} "))
        assert running(lab, node) == [f"web-{node}"]
        assert [one["Names"] for one in lab.engine(node, "/containers/json")] == [[f"/web-{node}"]]
    assert get(lab, "world", f"http://{NODES['rift'].address()}:8080/") == ""


def test_the_images_behave_as_their_names_say(lab: Lab) -> None:
    run(lab, "rift", "crasher:v1", "crash")
    run(lab, "rift", "slow:v1", "slow", f"-p {NODES['rift'].address()}:8082:8080")
    run(lab, "rift", "stubborn:v1", "stubborn")
    run(lab, "rift", "hog:v1", "hog", "-m 32m")
    assert get(lab, "op", "http://rift:8082/") == ""
    begun_s = time.monotonic()
    lab.on("rift", "docker stop -t 1 stubborn")
    assert time.monotonic() - begun_s > 1, "stubborn gave in"
    eventually("crasher", lambda: ended(lab, "rift", "crash") == "exited 1 false")
    eventually("hog", lambda: ended(lab, "rift", "hog") == "exited 137 true")
    eventually("slow", lambda: "version=v1" in get(lab, "op", "http://rift:8082/"))


def test_a_tag_names_an_image_for_each_architecture(lab: Lab) -> None:
    lab.on("hyperborea", f"docker pull -q --platform linux/arm64 {REGISTRY}/web:v3")
    lab.on("hyperborea", f"docker run -d --name arm -p {NODES['hyperborea'].address()}:8083:8080 {REGISTRY}/web:v3")
    eventually("the arm64 entry", lambda: "image=arm64" in get(lab, "op", "http://hyperborea:8083/"))


def test_one_image_exists_for_amd64_only(lab: Lab) -> None:
    facts = lab.engine("hyperborea", f"/distribution/{REGISTRY}/amd64only:v1/json")
    assert [platform["architecture"] for platform in facts["Platforms"]] == ["amd64"]
    facts = lab.engine("hyperborea", f"/distribution/{REGISTRY}/web:v1/json")
    assert [platform["architecture"] for platform in facts["Platforms"]] == ["amd64", "arm64"]


def test_the_second_registry_wants_its_password(lab: Lab) -> None:
    assert "Digest" not in lab.on("orion", f"docker pull {REGISTRY_WITH_PASSWORD}/web:v2", check=False)
    login = f"echo {REGISTRY_PASSWORD} | docker login -u {REGISTRY_USER} --password-stdin {REGISTRY_WITH_PASSWORD}"
    lab.on("orion", f"{login} && docker pull -q {REGISTRY_WITH_PASSWORD}/web:v2 && rm -r /root/.docker")


def test_the_workstation_opens_every_node_by_ssh(lab: Lab) -> None:
    for node in (*ENGINES, "svc", "infra"):
        assert lab.on("op", f"ssh {node} hostname") == node


def test_systemd_restarts_what_was_killed(lab: Lab) -> None:
    unit = "[Service]\\nExecStart=/bin/sleep 1000\\nRestart=always\\nRestartSec=100ms\\n"
    lab.on("hyperborea", f"printf '{unit}' >/etc/systemd/system/probe.service && systemctl start probe")
    pid = lab.on("hyperborea", "systemctl show -p MainPID --value probe")
    lab.on("hyperborea", f"kill -9 {pid}")
    eventually(
        "a new process", lambda: lab.on("hyperborea", "systemctl show -p MainPID --value probe") not in (pid, "0")
    )
    lab.on("hyperborea", "systemctl stop probe; rm /etc/systemd/system/probe.service")


@pytest.mark.parametrize("node", ["rift", "orion"])
def test_units_cannot_be_written_where_nixos_is_meant(lab: Lab, node: str) -> None:
    assert "Read-only" in lab.on(node, "touch /etc/systemd/system/x 2>&1", check=False)


def test_a_partition_is_silent_and_heals(lab: Lab) -> None:
    for node in ("rift", "orion"):
        run(lab, node, "web:v1", "web", f"-p {NODES[node].address()}:8080:8080")
    reach = partial(answers, lab, limit_s=2)
    eventually("both answer", lambda: reach("op", "orion") and reach("op", "rift"))
    faults.partition(lab, "orion")
    begun_s = time.monotonic()
    assert not reach("op", "orion")
    assert time.monotonic() - begun_s > 1.5, "refused, where silence was wanted"
    assert reach("op", "rift")
    assert not reach("orion", "rift")
    faults.heal(lab, "orion")
    eventually("healed", lambda: reach("op", "orion"))
    faults.partition(lab, "orion", peer="rift")
    assert not reach("rift", "orion")
    assert reach("op", "orion")


def test_a_one_way_cut_lets_the_other_way_through(lab: Lab) -> None:
    faults.partition(lab, "orion", way="out")
    assert lab.exec("op", "ssh", "-o", "ConnectTimeout=1", "orion", "true").code != 0
    received = "cat /sys/class/net/eth0/statistics/rx_packets"
    before = int(lab.on("orion", received))
    lab.exec("op", "ssh", "-o", "ConnectTimeout=1", "orion", "true")
    assert int(lab.on("orion", received)) > before


def test_an_engine_hangs_stops_and_crashes(lab: Lab) -> None:
    faults.kill_engine(lab, "orion", "hang")
    with pytest.raises(TimeoutError):
        lab.engine("orion", "/_ping", timeout_s=1)
    faults.start_engine(lab, "orion")
    faults.kill_engine(lab, "orion", "stop")
    with pytest.raises(OSError, match="No such file"):
        lab.engine("orion", "/_ping")
    faults.start_engine(lab, "orion")
    run(lab, "orion", "web:v1", "keep", "--restart always")
    faults.kill_engine(lab, "orion", "crash")
    eventually("the engine and its container", lambda: "keep" in running(lab, "orion"), 30)


def test_a_power_cut_keeps_the_files_and_a_boot_brings_the_containers_back(lab: Lab) -> None:
    run(lab, "orion", "web:v1", "keep", "--restart always")
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    booted = lab.on("orion", f"echo kept >/srv/kept; {boot_id}")
    assert booted != lab.on("rift", boot_id)
    faults.crash(lab, "orion")
    assert lab.status()["nodes"]["orion"] == "off"
    faults.boot(lab, "orion")
    assert lab.on("orion", "cat /srv/kept") == "kept"
    assert lab.on("orion", boot_id) != booted
    eventually("the container", lambda: running(lab, "orion") == ["keep"])


def test_a_container_bound_to_a_late_address_stays_down_by_itself(lab: Lab) -> None:
    run(lab, "orion", "web:v1", "bound", f"--restart always -p {NODES['orion'].address()}:8080:8080")
    eventually("before", lambda: "version" in get(lab, "op", "http://orion:8080/"))
    faults.crash(lab, "orion")
    faults.boot(lab, "orion", has_address=False)
    # Its exit code is 255 after a power cut and 128 after a restart of dockerd: only the error tells.
    error = "docker inspect -f '{{.State.Status}} {{.State.Error}}' bound"
    eventually("the engine gives up", lambda: "cannot assign requested address" in lab.on("orion", error))
    assert lab.on("orion", error).startswith("exited ")
    faults.give_address(lab, "orion")
    lab.on("orion", "docker start bound")
    eventually("after", lambda: "version" in get(lab, "op", "http://orion:8080/"))


def test_dns_takes_signed_updates_only(lab: Lab) -> None:
    facts = json.loads(lab.on("op", "cat /lab/lab.json"))["dns"]
    order = r"server 100.64.0.10\nzone metacircular.net\nupdate add web.metacircular.net 60 A 203.0.113.4\nsend\n"
    assert "BADSIG" in lab.on("op", f"printf '{order}' | knsupdate -y hmac-sha256:lab:AAAA 2>&1", check=False)
    lab.on("op", f"printf '{order}' | knsupdate -y hmac-sha256:lab:{facts['secret']}")
    assert lab.on("world", "kdig +short @203.0.113.10 web.metacircular.net") == "203.0.113.4"
    assert lab.on("svc", "kdig +short @100.64.0.10 orion.mcp.metacircular.net") == "100.64.0.2"


def test_the_acme_server_answers_the_edge_with_a_certificate_that_verifies(lab: Lab) -> None:
    directory = json.loads(lab.on("svc", "curl -sf --cacert /lab/acme-ca.pem https://acme.metacircular.net:14000/dir"))
    assert "newOrder" in directory


def test_nodes_reach_neither_this_machine_nor_the_internet(lab: Lab) -> None:
    assert lab.on("op", "ip route").splitlines() == ["100.64.0.0/24 dev eth0 proto kernel scope link src 100.64.0.20"]
    with pytest.raises(LabError):
        lab.on("op", "curl -s -m 2 http://192.0.2.1/")
