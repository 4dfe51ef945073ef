"""The fold of streaks against a simple model of the metric reference, with results in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.collectors.failing_hosts import RUNS_KEPT, FailingHosts, HostResult, Streak, consecutive, families, since
from exporter.model import Host

HOSTS = (
    Host("0", "101", "10.0.0.1"),
    Host("0", "102", "10.0.0.2"),
    Host("3", "", "10.0.0.1"),
    Host("0", "", "fd00::1"),
    Host("0", "", "10.0.0.1"),
)
A, B, NAMELESS = HOSTS[0], HOSTS[1], HOSTS[4]
"""NAMELESS is host A in a result without an id."""
DAY = 86_400.0


def failed(host: Host, run: int, end: float, code: str = "104", group: str = "plan:1") -> HostResult:
    return HostResult(host, run, group, end, (code, f"reason {code}"))


def succeeded(host: Host, run: int, end: float, group: str = "plan:1") -> HostResult:
    return HostResult(host, run, group, end, None)


def fold(*batches: Iterable[HostResult], ttl: float = math.inf, now: float = 0.0, settled: float = 0.0) -> FailingHosts:
    """All batches, one poll each, with nothing settled before the last."""
    hosts = FailingHosts()
    for batch in batches:
        hosts = hosts.fold(batch, now=now, ttl=ttl, settled=settled)
    return hosts


def model(results: Iterable[HostResult]) -> dict[str, tuple[str, float, float, int, object, str]]:
    """Failing hosts: (identity, since, last, consecutive, labels, group). The naive reading: what failed after the
    newest success, counted by execution. One address has one host here, whose id is known once any result carries it.
    """
    failing: dict[str, tuple[str, float, float, int, object, str]] = {}
    listed = list(results)
    named = {result.host.address: result.host for result in listed if result.host.bk_host_id}
    for address in {result.host.address for result in listed}:
        mine = [result for result in listed if result.host.address == address]
        cleared = max((result.end for result in mine if result.labels is None), default=-math.inf)
        failures = [result for result in mine if result.labels is not None and result.end > cleared]
        if failures:
            newest = max(failures, key=lambda result: (result.end, result.run))
            first = min(result.end for result in failures)
            runs = {result.run for result in failures}
            identity = named.get(address, newest.host).identity
            failing[identity] = (identity, first, newest.end, len(runs), newest.labels, newest.group)
    return failing


def shown(streak: Streak) -> tuple[Host, float, float, int, object, str]:
    return (streak.host, streak.since, streak.last, streak.count, streak.labels, streak.group)


def kept(hosts: FailingHosts) -> dict[str, tuple[str, float, float, int, object, str]]:
    """What `model` gives, of the fold."""
    return {identity: (identity, *shown(streak)[1:]) for identity, streak in hosts.streaks.items()}


def numbered(picks: Sequence[tuple[Host, bool, float]], retries: bool) -> list[HostResult]:
    """Results of runs: a run of its own each, or three runs that are tried again and again."""
    made = []
    for number, (host, ok, end) in enumerate(picks):
        run = number % 3 if retries else number
        code = str(100 + number)
        made.append(succeeded(host, run, end) if ok else failed(host, run, end, code, f"plan:{number}"))
    return made


# Ends of one host differ: JOB tells them in milliseconds, and one host runs one thing at a time.
PICKS = st.lists(
    st.tuples(st.sampled_from(HOSTS), st.booleans(), st.integers(1, 60).map(float)),
    max_size=RUNS_KEPT,
    unique_by=lambda pick: (pick[0].address, pick[2]),
)
CUTS = st.lists(st.integers(0, RUNS_KEPT), max_size=4).map(sorted)


def batches(results: Sequence[HostResult], cuts: Sequence[int]) -> list[Sequence[HostResult]]:
    edges = [0, *cuts, len(results)]
    return [results[begin:end] for begin, end in pairwise(edges)]


@given(PICKS, st.randoms(use_true_random=False), CUTS)
def test_4_1_8_any_order_and_any_polls_give_what_the_newest_results_say(
    picks: list[tuple[Host, bool, float]], rng: Random, cuts: list[int]
) -> None:
    """However the results are spread over polls, the failing hosts are those of the naive model."""
    results = numbered(picks, retries=False)
    expected = model(results)
    rng.shuffle(results)
    hosts = fold(*batches(results, cuts))
    assert kept(hosts) == expected


@given(PICKS, st.randoms(use_true_random=False), CUTS)
def test_4_1_8_retries_of_a_run_do_not_lengthen_a_streak(
    picks: list[tuple[Host, bool, float]], rng: Random, cuts: list[int]
) -> None:
    """Three executions tried again and again count as three, in any order of arrival.

    Of the attempts of one execution a streak remembers the newest, so when a success between two of them becomes
    known late, the streak may be said to begin with a later attempt than the first one after it.
    """
    results = numbered(picks, retries=True)
    expected = model(results)
    rng.shuffle(results)
    hosts = fold(*batches(results, cuts))
    assert hosts.streaks.keys() == expected.keys()
    for identity, streak in hosts.streaks.items():
        _, first, *others = expected[identity]
        assert [streak.last, streak.count, streak.labels, streak.group] == others
        assert first <= streak.since <= streak.last


@given(PICKS, CUTS)
def test_4_1_8_in_order_of_time_the_beginning_is_exact_with_retries(
    picks: list[tuple[Host, bool, float]], cuts: list[int]
) -> None:
    """As long as results come in the order of their ends, retries included, the beginning of a streak is exact."""
    results = sorted(numbered(picks, retries=True), key=lambda result: result.end)
    hosts = fold(*batches(results, cuts))
    assert kept(hosts) == model(results)


@given(PICKS, st.integers(0, 60).map(float), st.floats(1, 60))
def test_4_1_8_a_host_is_forgotten_a_ttl_after_its_newest_failure(
    picks: list[tuple[Host, bool, float]], now: float, ttl: float
) -> None:
    """Exactly the streaks whose newest failure is older than the ttl are gone."""
    results = numbered(picks, retries=False)
    hosts = fold(results, now=now, ttl=ttl)
    assert hosts.streaks.keys() == {identity for identity, failing in model(results).items() if failing[2] >= now - ttl}
    assert set(hosts.ids.values()) <= hosts.streaks.keys() | hosts.cleared.keys()


@given(PICKS)
def test_the_same_results_twice_change_nothing(picks: list[tuple[Host, bool, float]]) -> None:
    """A page that is read again leaves the very same object, so nothing is rendered or compared in vain."""
    results = numbered(picks, retries=False)
    once = fold(results)
    assert once.fold(results, now=0.0, ttl=math.inf, settled=0.0) is once


@given(PICKS, st.integers(0, 60).map(float))
def test_successes_are_remembered_until_settled(picks: list[tuple[Host, bool, float]], settled: float) -> None:
    """The memory of successes holds one time per host, none from before `settled`."""
    hosts = fold(numbered(picks, retries=False), settled=settled)
    assert hosts.cleared.keys() <= {host.identity for host in HOSTS}
    assert all(end >= settled for end in hosts.cleared.values())


def test_4_1_8_a_late_success_inside_a_streak_shortens_it() -> None:
    """A success that becomes known after newer failures leaves only what failed after it."""
    hosts = fold([failed(A, 1, 10), failed(A, 2, 20), failed(A, 3, 30)], [succeeded(A, 9, 15)])
    assert shown(hosts.streaks["101"]) == (A, 20.0, 30.0, 2, ("104", "reason 104"), "plan:1")


def test_4_1_8_a_late_failure_older_than_a_success_changes_nothing() -> None:
    """What failed before the newest success does not fail any more, whenever it becomes known."""
    hosts = fold([succeeded(A, 2, 20)], [failed(A, 1, 10)])
    assert hosts.streaks == {}


def test_4_1_8_a_success_elsewhere_clears_and_the_count_begins_anew() -> None:
    """Any execution may clear a host; the same execution failing again later is the first of a new streak."""
    hosts = fold([failed(A, 1, 10), failed(A, 2, 11)], [succeeded(A, 3, 12)], [failed(A, 1, 13)])
    assert (hosts.streaks["101"].since, hosts.streaks["101"].count) == (13.0, 1)


def test_4_1_8_a_success_at_the_same_millisecond_wins() -> None:
    """A failure must be newer than the success to count against the host, in either order."""
    assert fold([failed(A, 1, 10), succeeded(A, 2, 10)]).streaks == {}
    assert fold([succeeded(A, 2, 10)], [failed(A, 1, 10)]).streaks == {}


def test_4_1_8_the_newest_address_of_a_host_is_shown() -> None:
    """A host is its id: another address of it continues with the streak."""
    moved = Host("0", "101", "10.9.9.9")
    hosts = fold([failed(A, 1, 10)], [failed(moved, 2, 20)])
    assert shown(hosts.streaks["101"])[:4] == (moved, 10.0, 20.0, 2)


def test_4_1_8_hosts_without_id_are_cloud_and_address() -> None:
    """The same address in two clouds is two hosts, and neither is a host with that id."""
    here, there = Host("0", "", "10.0.0.7"), Host("3", "", "10.0.0.7")
    hosts = fold([failed(here, 1, 10), failed(there, 1, 10)], [succeeded(there, 2, 20)])
    assert hosts.streaks.keys() == {"0:10.0.0.7"}


@pytest.mark.parametrize(("first", "second"), [(A, NAMELESS), (NAMELESS, A)])
def test_F69_a_host_with_and_without_its_id_is_one_host(first: Host, second: Host) -> None:
    """Whether the failure or the success carries the id, the success clears, and two failures are one streak."""
    assert fold([failed(first, 1, 10)], [succeeded(second, 2, 20)]).streaks == {}
    assert fold([succeeded(second, 2, 20)], [failed(first, 1, 10)]).streaks == {}, "it came late"
    (streak,) = fold([failed(first, 1, 10)], [failed(second, 2, 20)]).streaks.values()
    assert (streak.host, streak.since, streak.count) == (A, 10.0, 2)


def test_F69_results_without_an_id_belong_to_the_host_that_was_last_seen_there() -> None:
    """An address that went from one host to another: the earlier one still fails by itself."""
    successor = Host("0", "999", A.ip)
    hosts = fold([failed(A, 1, 10)], [failed(successor, 2, 20)], [succeeded(NAMELESS, 3, 30)])
    assert hosts.streaks.keys() == {"101"}
    elsewhere = Host("4", "", A.ip)
    assert fold([failed(A, 1, 10)], [succeeded(elsewhere, 2, 20)]).streaks.keys() == {"101"}


def test_F69_a_success_inside_streaks_that_become_one_counts() -> None:
    """Failures without an id before and after a success of the host that turns out to be the same: only the later
    ones are its streak."""
    moved = Host("0", "101", "10.9.9.9")
    hosts = fold([failed(NAMELESS, 1, 10), failed(NAMELESS, 2, 30)], [succeeded(moved, 3, 20)], [failed(A, 4, 40)])
    assert shown(hosts.streaks["101"]) == (A, 30.0, 40.0, 2, ("104", "reason 104"), "plan:1")


def test_F69_streaks_of_an_earlier_build_are_found_by_their_address() -> None:
    """States without the index of ids, and those of NodeMan that were kept under the address."""
    before = fold([failed(A, 1, 10)])
    for key in ("101", A.address):
        old = FailingHosts({key: before.streaks["101"]})
        for host in (A, NAMELESS):
            assert old.fold([succeeded(host, 2, 20)], now=0.0, ttl=math.inf, settled=0.0).streaks == {}


def test_4_1_8_detail_is_capped_to_the_oldest_streaks_and_counts_stay_exact() -> None:
    """Of ten failing hosts the three that failed first are shown, and ten are counted by code."""
    many = [Host("0", str(number), f"10.0.1.{number}") for number in range(10)]
    hosts = fold([failed(host, 1, 100.0 - number, str(number % 2)) for number, host in enumerate(many)])
    assert list(since(hosts, 3).values()) == [91.0, 92.0, 93.0]
    assert list(consecutive(hosts, 3)) == [("0", "9", "10.0.1.9"), ("0", "8", "10.0.1.8"), ("0", "7", "10.0.1.7")]
    assert hosts.by_labels() == {("0", "reason 0"): 5.0, ("1", "reason 1"): 5.0}


def test_groups_are_those_of_the_newest_failures_with_the_beginning_of_their_oldest_streak() -> None:
    """Successes of a plan are worth asking for from the first failure of the hosts whose newest failure it caused."""
    hosts = fold([failed(A, 1, 10, group="plan:1"), failed(A, 2, 30, group="plan:2"), failed(B, 2, 20, group="plan:2")])
    assert hosts.groups() == {"plan:2": 10.0}


def test_4_1_8_a_retry_of_a_run_that_is_no_longer_kept_does_not_lengthen_a_streak() -> None:
    """Twenty others have failed on the host since; it is distinguished from a new run by having been read in the
    streak."""
    hosts = fold([failed(A, number, 10.0 + number) for number in range(20)])
    again = msgspec.structs.replace(failed(A, 0, 50.0), read_before=12.0)
    retried = hosts.fold([again], now=0.0, ttl=math.inf, settled=0.0)
    assert (retried.streaks["101"].count, retried.streaks["101"].last) == (20, 50.0)
    earlier = msgspec.structs.replace(failed(A, 99, 50.0), read_before=9.0)
    assert hosts.fold([earlier], now=0.0, ttl=math.inf, settled=0.0).streaks["101"].count == 21


def test_a_long_streak_keeps_its_beginning_and_its_length_but_not_every_run() -> None:
    """A host that fails for years costs no more state than one that failed sixteen times."""
    hosts = FailingHosts()
    for number in range(1, 101):
        hosts = hosts.fold([failed(A, number, float(number))], now=0.0, ttl=math.inf, settled=0.0)
    streak = hosts.streaks["101"]
    assert (streak.since, streak.last, streak.count, streak.run) == (1.0, 100.0, 100, 100)
    assert len(streak.runs) == RUNS_KEPT


# Bounds


def many(count: int, first: int = 1) -> list[Host]:
    return [Host("0", str(number), f"10.1.{number >> 8}.{number & 255}") for number in range(first, first + count)]


def bounded(*batches: Iterable[HostResult], most: int, now: float = 0.0, ttl: float = math.inf) -> FailingHosts:
    hosts = FailingHosts()
    for batch in batches:
        hosts = hosts.fold(batch, now=now, ttl=ttl, settled=0.0, most=most)
    return hosts


def test_F44_4_1_13_hosts_beyond_the_bound_are_counted_and_not_tracked() -> None:
    """Those that failed first are tracked. One that is, continues; a place that becomes free is taken by the next."""
    hosts = bounded([failed(host, 1, 10.0 + number) for number, host in enumerate(many(25))], most=10)
    assert hosts.streaks.keys() == {host.identity for host in many(10)}
    assert hosts.hosts_untracked() == 15
    hosts = hosts.fold([failed(host, 2, 50.0) for host in many(2)], now=0.0, ttl=math.inf, settled=0.0, most=10)
    assert hosts.streaks["1"].count == 2
    later = [succeeded(many(1)[0], 3, 60.0), failed(many(25)[24], 3, 61.0), failed(many(25)[23], 3, 62.0)]
    hosts = hosts.fold(later, now=0.0, ttl=math.inf, settled=0.0, most=10)
    assert "25" in hosts.streaks
    assert "24" not in hosts.streaks


def test_F44_untracked_hosts_are_those_of_the_newest_run() -> None:
    """A run that is tried again adds none, the next one of its plan replaces them, and a ttl forgets them."""
    first = [failed(host, 1, 10.0) for host in many(25)]
    assert bounded(first, [failed(host, 1, 20.0) for host in many(25)[:20]], most=10).hosts_untracked() == 15
    assert bounded(first, [failed(host, 2, 20.0) for host in many(25)[:12]], most=10).hosts_untracked() == 2
    assert bounded(first, [succeeded(host, 2, 20.0) for host in many(25)], most=10).hosts_untracked() == 0
    assert bounded([failed(host, 2, 20.0) for host in many(12)], first, most=10).hosts_untracked() == 2, "came late"
    other = [failed(host, 5, 11.0, group="plan:2") for host in many(3, 100)]
    assert bounded(first, other, most=10).hosts_untracked() == 18
    assert bounded(first, [], most=10, now=100.0, ttl=80.0).hosts_untracked() == 0
    one_by_one = [[failed(host, host_run, 10.0, group="")] for host_run, host in enumerate(many(15))]
    assert bounded(*one_by_one, most=10).hosts_untracked() == 5, "by run, where there are no groups"


def test_F44_as_many_successes_are_remembered_the_newest() -> None:
    """A failure that comes late is recognised as long as the success after it is among them."""
    good = [succeeded(host, 1, 100.0 + number) for number, host in enumerate(many(50))]
    hosts = bounded(good, most=10)
    assert hosts.cleared.keys() == {host.identity for host in many(10, 41)}
    assert set(hosts.ids.values()) == hosts.cleared.keys()
    assert bounded(good, [failed(many(50)[49], 2, 50.0)], most=10).streaks == {}


@given(PICKS, st.integers(1, 4))
def test_F44_a_bound_of_any_size_holds(picks: list[tuple[Host, bool, float]], most: int) -> None:
    """And what is tracked is what would be tracked without it."""
    results = numbered(picks, retries=False)
    hosts = bounded(*([result] for result in results), most=most)
    assert len(hosts.streaks) <= most
    assert len(hosts.cleared) <= most
    assert len(hosts.addresses) <= 2 * most


# In a state


@given(PICKS, CUTS)
def test_a_state_holds_all_that_the_fold_knows(picks: list[tuple[Host, bool, float]], cuts: list[int]) -> None:
    """A restart between any two polls changes nothing."""
    hosts = restarted = FailingHosts()
    for batch in batches(numbered(picks, retries=True), cuts):
        hosts = hosts.fold(batch, now=0.0, ttl=math.inf, settled=0.0)
        stored = msgspec.msgpack.encode(restarted.fold(batch, now=0.0, ttl=math.inf, settled=0.0))
        restarted = msgspec.msgpack.decode(stored, type=FailingHosts)
        assert restarted.streaks == hosts.streaks
        assert restarted.cleared == hosts.cleared
        assert restarted.addresses == hosts.addresses


def test_F44_very_many_hosts_take_little_in_a_state() -> None:
    """Under 40 bytes a host, compressed in pieces."""
    rng = Random(1)
    crowd = [Host("0", str(number), f"10.{number % 250}.{number >> 8}.{number & 255}") for number in range(1, 20_001)]
    hosts = fold([failed(host, 20_000_000_001, 1.79e9 + rng.randrange(10**6) / 1000) for host in crowd])
    stored = msgspec.msgpack.encode(hosts)
    assert len(stored) < 40 * len(crowd)
    assert len(hosts.rows) > 4
    assert msgspec.msgpack.decode(stored, type=FailingHosts).streaks == hosts.streaks


def test_a_state_of_an_earlier_build_is_read() -> None:
    """It lists the streaks one by one, and knows neither ids nor untracked hosts."""
    host, other = ["0", "101", "10.0.0.1"], ["0", "", "10.0.0.9"]
    written = {
        "streaks": {
            "101": [host, 10.0, 20.0, 2, ["104", "script_nonzero_exit"], "plan:1", [[1, 10.0], [2, 20.0]]],
            "0:10.0.0.9": [other, 5.0, 5.0, 1, ["1", "agent_abnormal"], "name:x", [[3, 5.0]]],
        },
        "cleared": {"102": 30.0},
    }
    hosts = msgspec.msgpack.decode(msgspec.msgpack.encode(written), type=FailingHosts)
    assert shown(hosts.streaks["101"]) == (A, 10.0, 20.0, 2, ("104", "script_nonzero_exit"), "plan:1")
    assert hosts.cleared == {"102": 30.0}
    hosts = hosts.fold([failed(NAMELESS, 4, 40)], now=0.0, ttl=math.inf, settled=0.0)
    assert hosts.streaks["101"].count == 3
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(hosts), type=FailingHosts)
    assert again.streaks == hosts.streaks
    assert not again.listed


def test_a_poll_without_news_touches_no_host() -> None:
    """Who fails, and what is derived from it, are the same objects until something changes or grows too old."""
    hosts = fold([failed(host, 1, 10.0) for host in many(50)], [succeeded(B, 2, 20.0)])
    for now in (11.0, 60.0):
        assert hosts.fold((), now=now, ttl=50.0, settled=19.0) is hosts
    assert hosts.by_labels() is hosts.by_labels()
    assert hosts.oldest(5) is hosts.oldest(5)
    assert hosts.fold((), now=60.5, ttl=50.0, settled=19.0).streaks == {}
    assert hosts.fold((), now=60.0, ttl=50.0, settled=20.5).cleared == {}


def test_both_families_of_failing_hosts_carry_the_labels_of_a_failure() -> None:
    """The count has the failure's labels, the detail the host's before them."""
    count, detail = families("blueking_x", ("code", "reason"), "X", "某")
    assert (count.name, count.labels, count.sticky) == ("blueking_x_hosts_failing", ("code", "reason"), True)
    assert detail.labels == ("bk_cloud_id", "bk_host_id", "ip", "code", "reason")
    assert detail.detail
