from __future__ import annotations

import pytest

from shoal.devices import Launched
from shoal.devices.slurm import PORTS, hosts_of, slurm_workers
from shoal.errors import ConfigurationError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29501",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """Sets what a launcher would, and nothing else of its kind."""
    for name in [*TORCHRUN, *SLURM]:
        monkeypatch.delenv(name, raising=False)

    def place(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return place


def test_without_a_launcher_there_is_one_process(place):
    assert Launched.here() is None


def test_torchrun_says_it_all(place):
    place(TORCHRUN)
    assert Launched.here() == Launched(
        rank=3, count=4, local_rank=1, local_count=2, address="node-a", port=29501
    )  # fmt: skip


def test_a_launcher_that_knows_one_machine_need_not_count_on_it(place):
    place({name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
    here = Launched.here()
    assert (here.local_rank, here.local_count) == (3, 4)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_of_torchruns_environment_is_refused(place, missing):
    place({name: value for name, value in TORCHRUN.items() if name != missing})
    with pytest.raises(ConfigurationError, match=f"RANK is set, .* incomplete: '{missing}'"):
        Launched.here()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_what_is_no_number_is_refused(place, name):
    place(TORCHRUN | {name: "first"})
    with pytest.raises(ConfigurationError, match="RANK is set, .* incomplete: .*'first'"):
        Launched.here()


def test_slurm_says_it_all(place):
    place(SLURM)
    here = Launched.here()
    assert (here.rank, here.count, here.local_rank, here.local_count) == (5, 7, 1, 2)
    assert here.address == "gpu07"
    assert here.port in PORTS


def test_steps_of_one_job_meet_at_ports_of_their_own(place):
    ports = set()
    for step in range(5):
        place(SLURM | {"SLURM_STEP_ID": str(step)})
        ports.add(Launched.here().port)
    assert len(ports) == 5


def test_the_users_own_meeting_place_goes_before_slurms(place):
    place(SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "40000"})
    here = Launched.here()
    assert (here.address, here.port) == ("10.0.0.7", 40000)


def test_torchrun_within_a_slurm_job_goes_before_slurm(place):
    place(SLURM | TORCHRUN)
    assert Launched.here().count == 4


@pytest.mark.parametrize("more", [{"SLURM_NTASKS": "1"}, {"SLURM_STEP_NODELIST": None}])
def test_one_task_or_a_batch_script_is_no_launch(place, monkeypatch, more):
    place({name: value for name, value in (SLURM | more).items() if value is not None})
    assert Launched.here() is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[7]", "gpu7"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("cpu1,gpu[07-09]", "cpu1"),
        ("gpu-a[001-100].cluster", "gpu-a001.cluster"),
        ("rack[0-7]node[01-16],rack9node01", "rack0node01"),
    ],
)
def test_the_first_host_of_a_list_is_where_ranks_meet(place, nodes, first):
    place(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert Launched.here().address == first


@pytest.mark.parametrize(
    ("counts", "each"), [("3", [3]), ("2(x2),1", [2, 2, 1]), ("1,4(x2)", [1, 4, 4]), ("2,3", [2, 3])]
)
def test_each_node_has_its_number_of_tasks(place, counts, each):
    found = []
    for node in range(len(each)):
        place(SLURM | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node)})
        found.append(Launched.here().local_count)
    assert found == each


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_JOB_ID": None},
        {"SLURM_PROCID": None},
        {"SLURM_LOCALID": None},
        {"SLURM_NODEID": None},
        {"SLURM_NODEID": "4"},
        {"SLURM_STEP_TASKS_PER_NODE": None},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x"},
        {"SLURM_STEP_NODELIST": ""},
        {"SLURM_PROCID": "first"},
    ],
    ids=str,
)
def test_an_environment_of_slurms_that_cannot_be_is_refused(place, change):
    place({name: value for name, value in (SLURM | change).items() if value is not None})
    with pytest.raises(ConfigurationError, match="Slurm's environment is incomplete: .*start the ranks with srun"):
        Launched.here()


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("cpu1", ["cpu1"]),
        ("gpu[07-09,12],cpu1", ["gpu07", "gpu08", "gpu09", "gpu12", "cpu1"]),
        ("rack[0-1]node[09-10]", ["rack0node09", "rack0node10", "rack1node09", "rack1node10"]),
        ("a[1,3]b,c", ["a1b", "a3b", "c"]),
    ],
)
def test_slurms_short_form_is_a_list_of_hosts(nodes, hosts):
    assert hosts_of(nodes) == hosts


def test_tensorflows_workers_have_a_port_each_which_all_tasks_agree_on(place):
    told = set()
    for rank, (node, local) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]):
        place(SLURM | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)})
        told.add(tuple(slurm_workers()))
    [workers] = told
    assert [worker.partition(":")[0] for worker in workers] == [
        "gpu07",
        "gpu07",
        "gpu08",
        "gpu08",
        "gpu09",
        "gpu09",
        "gpu12",
    ]
    assert len(set(workers)) == 7
    assert f"gpu07:{Launched.here().port}" not in workers


def test_tasks_of_slurm_that_have_no_ports_are_refused(place):
    for told in ({"SLURM_PROCID": "1"}, {"SLURM_STEP_TASKS_PER_NODE": "2(x2),40,1", "SLURM_PROCID": "5"}):
        place(SLURM | told)
        with pytest.raises(ConfigurationError, match="at most 16 tasks on a machine, dealt out machine by machine"):
            slurm_workers()


def test_outside_of_slurm_there_are_none(place):
    assert slurm_workers() is None
