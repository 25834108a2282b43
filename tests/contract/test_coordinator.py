"""What the coordinator must guarantee on every store."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.values import replica_key
from flwr_ha.errors import CheckpointError, ConfigError, FencedError
from flwr_ha.model import Position

# `lose_session` opens a second connection for a session, and ZooKeeper may give the first one the answers to both:
# kazoo's thread ends with an error then, and the store starts kazoo again.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception in thread .*zk_loop:pytest.PytestUnhandledThreadExceptionWarning"
)
RECORD = {"address": "127.0.0.1:8000"}


@pytest.fixture
def pair(cluster):
    """Return two replicas of one cluster: their coordinators, and the first one's store."""
    store = cluster.store()
    return Coordinator(store, replica_id=0, instance="first"), cluster.coordinator(1, "second"), store


def test_the_first_campaign_takes_term_one(pair):
    """The winner is the leader in every replica's view, and the others' campaigns are refused."""
    first, second, _ = pair
    first.join(RECORD, wait_timeout_s=0)
    second.join(RECORD, wait_timeout_s=0)

    leadership = first.campaign("nobody leads")

    assert leadership.term == 1
    assert second.campaign("nobody leads") is None
    view = second.view()
    assert (view.term, view.leader.replica_id, view.leader.instance, view.leader.term) == (1, 0, "first", 1)
    assert set(view.replicas) == {0, 1}
    assert view.replicas[0]["address"] == RECORD["address"]


def test_a_cluster_has_one_identity_for_good(pair):
    """All replicas read the same, whoever came first; what uses it tells clusters of one name apart."""
    first, second, _ = pair

    with ThreadPoolExecutor(2) as pool:
        found = {future.result() for future in [pool.submit(each.identity) for each in (first, second)]}

    assert found == {first.identity()}
    assert len(first.identity()) == 32


def test_terms_never_go_back(pair):
    """Each leadership has the next term, and the history tells who and why."""
    first, second, _ = pair

    for term in range(1, 8):
        candidate = (first, second)[term % 2]
        leadership = candidate.campaign(f"reason {term}")
        assert leadership.term == term
        candidate.resign(leadership)

    assert [(change.term, change.leader, change.reason) for change in first.history()] == [
        (term, term % 2, f"reason {term}") for term in range(1, 8)
    ]
    assert first.view().term == 7
    assert first.view().leader is None


def test_history_keeps_the_newest_changes(pair, monkeypatch):
    """Elections without end must not fill the coordinator; a second replica may shorten the history at once."""
    monkeypatch.setattr("flwr_ha.coordination.coordinator.KEPT_CHANGES", 3)
    first, second, _ = pair
    for _ in range(5):
        leadership = first.campaign("again")
        first.resign(leadership)
    first.forget_history(5)
    second.forget_history(5)
    assert [change.term for change in second.history()] == [3, 4, 5]


def test_old_leader_cannot_overwrite_new_leader(pair, cluster, make_head, insist):
    """The frozen-leader case: term 1 wakes up after term 2 has committed."""
    first, second, store = pair
    old = first.campaign("start")
    first.commit(old, make_head(1, 1, "a"))
    cluster.lose_session(store)
    new = insist(_campaign, second)
    committed = second.commit(new, make_head(2, 2, "b"))

    with pytest.raises(FencedError, match="term 1 is fenced off by term 2"):
        insist(first.commit, old, make_head(1, 2, "c"))
    with pytest.raises(FencedError, match="term 1 is fenced off by term 2"):
        insist(first.commit, old, make_head(1, 3, "c"))
    with pytest.raises(FencedError, match="term 1 is fenced off by term 2"):
        insist(first.commit_control, old, "sha256:" + "c" * 64, (0,))

    assert second.head("17") == committed
    assert second.control_head() is None
    assert [head.position.digest[-1] for head in second.commit_log("17")] == ["a", "b"]


def test_an_old_leader_cannot_commit_before_a_new_one_is_elected(pair, cluster, make_head, insist):
    """The session is lost and nobody leads yet: even so its commit is refused."""
    first, second, store = pair
    old = first.campaign("start")
    cluster.lose_session(store)

    with pytest.raises(FencedError, match="term 1 has ended"):
        insist(first.commit, old, make_head(1, 0))

    assert second.head("17") is None


def test_a_leadership_of_an_old_session_is_not_revived_by_a_new_one(pair, cluster, make_head, insist):
    """The same process leads again after losing its session: its old term stays fenced off."""
    first, _, store = pair
    old = first.campaign("start")
    cluster.lose_session(store)
    new = insist(_campaign, first)

    assert new.term == 2
    with pytest.raises(FencedError):
        insist(first.commit, old, make_head(1, 0))
    with pytest.raises(FencedError):
        insist(first.renew, old, RECORD)
    first.resign(old)
    assert first.view().leader.term == 2
    assert first.commit(new, make_head(2, 0)).position.term == 2


def test_a_leadership_that_nobody_heard_of_is_disowned(pair):
    """Its holder knows the term from the coordinator alone; without this nobody leads while its session lives."""
    first, second, _ = pair
    assert first.campaign("its answer is lost").term == 1

    first.disown(1)

    assert first.view().leader is None
    assert second.campaign("the leader is gone").term == 2


def test_only_the_own_leadership_of_that_very_term_is_disowned(pair, cluster):
    """What a late look at the coordinator says may be about a term that is over, or about another start."""
    first, second, _ = pair
    first.disown(1)
    first.resign(first.campaign("start"))
    first.campaign("again")

    first.disown(1)
    first.disown(3)
    second.disown(2)
    cluster.coordinator(0, "an earlier start").disown(2)

    assert first.view().leader.term == 2


def test_a_head_of_another_term_than_the_leadership_is_refused(pair, make_head):
    """A round that was trained under an old term is never committed under a new one."""
    first, _, _ = pair
    first.resign(first.campaign("start"))
    leadership = first.campaign("again")

    with pytest.raises(FencedError, match="term 1 is fenced off by term 2"):
        first.commit(leadership, make_head(1, 0))

    assert first.head("17") is None


@pytest.mark.parametrize("is_applied", [True, False])
def test_a_commit_whose_answer_is_lost_is_made_once(pair, make_head, is_applied):
    """Lost before or after it was applied: it is read again, then decided."""
    first, second, store = pair
    leadership = first.campaign("start")
    first.commit(leadership, make_head(1, 0))

    store.lose_next = [is_applied]
    committed = first.commit(leadership, make_head(1, 1, "b"))
    store.lose_next = [is_applied]
    control = first.commit_control(leadership, "sha256:" + "d" * 64, (0, 1))

    assert committed == second.head("17")
    assert committed.position == Position(1, 1, "sha256:" + "b" * 64)
    assert second.commit_log("17") == (committed,)
    assert control == second.control_head()
    assert control.serial == 1


def test_a_lost_answer_of_a_fenced_leader_is_not_retried_into_the_new_term(pair, cluster, make_head, insist):
    """Its commit was not applied, then somebody else led: it is refused, not made late."""
    first, second, store = pair
    old = first.campaign("start")
    cluster.lose_session(store)
    insist(_campaign, second)

    store.lose_next = [False]
    with pytest.raises(FencedError):
        insist(first.commit, old, make_head(1, 0))

    assert second.head("17") is None


@pytest.mark.parametrize("is_applied", [True, False])
def test_a_campaign_whose_answer_is_lost_is_decided_by_reading(pair, is_applied):
    """The winner finds its own leader entry; no term is skipped."""
    first, second, store = pair
    store.lose_next = [is_applied]

    leadership = first.campaign("start")

    assert leadership.term == 1
    assert second.view().leader.term == 1
    assert len(second.history()) == 1
    assert first.renew(leadership, RECORD) > time.monotonic()


def test_a_leadership_given_up_unheard_is_replaced_by_a_newer_term(pair):
    """A campaign of the same start never takes up a term that it may have acted and stopped under."""
    first, _, _ = pair
    old = first.campaign("start")

    new = first.campaign("again")

    assert (old.term, new.term) == (1, 2)
    with pytest.raises(FencedError, match="term 1 is fenced off by term 2"):
        first.renew(old, RECORD)
    assert first.renew(new, RECORD) > time.monotonic()


def test_a_round_is_committed_once(pair, make_head):
    """Repeating a commit answers what is committed; other content is refused."""
    first, second, _ = pair
    leadership = first.campaign("start")
    first.commit(leadership, make_head(1, 0))
    one = first.commit(leadership, make_head(1, 1, "b"))
    two = first.commit(leadership, make_head(1, 2, "c"))

    assert first.commit(leadership, make_head(1, 1, "b")) == one
    assert first.commit(leadership, make_head(1, 2, "c")) == two
    for server_round in (0, 1, 2):
        with pytest.raises(CheckpointError):
            first.commit(leadership, make_head(1, server_round, "e"))
    with pytest.raises(CheckpointError, match="round 3 is the next one"):
        first.commit(leadership, make_head(1, 4))

    assert second.head("17") == two
    assert second.commit_log("17") == (one, two)


def test_a_new_leader_goes_on_where_the_old_one_committed(pair, make_head):
    """Rounds of two terms make one log; the new leader gets the old one's commit for the same content."""
    first, second, _ = pair
    old = first.campaign("start")
    one = first.commit(old, make_head(1, 1, "a"))
    first.resign(old)
    new = second.campaign("the leader resigned")

    assert second.commit(new, make_head(2, 1, "a")) == one
    two = second.commit(new, make_head(2, 2, "b"))

    assert second.commit_log("17") == (one, two)
    assert [head.position.term for head in first.commit_log("17")] == [1, 2]


def test_the_first_commit_of_a_run_is_round_zero_or_one(pair, make_head):
    """A run cannot begin in the middle."""
    first, _, _ = pair
    leadership = first.campaign("start")

    with pytest.raises(CheckpointError):
        first.commit(leadership, make_head(1, 2, run_id="5"))
    first.commit(leadership, make_head(1, 0, run_id="6"))
    first.commit(leadership, make_head(1, 1, run_id="7"))

    assert set(first.heads()) == {"6", "7"}
    assert first.commit_log("6") == ()


def test_metrics_that_would_not_fit_are_refused_with_a_sentence(pair, make_head):
    """ZooKeeper would cut the connection, again and again."""
    first, _, _ = pair
    leadership = first.campaign("start")
    head = make_head(1, 0)
    object.__setattr__(head, "metrics", {"losses": [0.5] * 200_000})

    with pytest.raises(CheckpointError, match="metrics of round 0"):
        first.commit(leadership, head)


def test_control_snapshots_are_counted(pair):
    """Each new snapshot has the next serial; repeating the newest makes none."""
    first, second, _ = pair
    leadership = first.campaign("start")

    first.commit_control(leadership, "sha256:" + "a" * 64, (0,))
    again = first.commit_control(leadership, "sha256:" + "a" * 64, (0,))
    newer = first.commit_control(leadership, "sha256:" + "b" * 64, (0, 1))

    assert (again.serial, newer.serial) == (1, 2)
    assert second.control_head() == newer


def test_two_candidates_have_one_winner(pair):
    """Many elections at the same moment: one leader each, terms without a gap."""
    candidates = pair[:2]
    barrier = threading.Barrier(2)

    def run(candidate):
        barrier.wait(10)
        return candidate.campaign("race")

    with ThreadPoolExecutor(2) as pool:
        for term in range(1, 21):
            results = list(pool.map(run, candidates))
            winners = [
                (candidate, leadership)
                for candidate, leadership in zip(candidates, results, strict=True)
                if leadership is not None
            ]
            assert [leadership.term for _, leadership in winners] == [term]
            winners[0][0].resign(winners[0][1])


def test_renewing_proves_the_lease_and_publishes(pair):
    """The lease counts from before the request; the record is there for others to read."""
    first, second, store = pair
    first.join(RECORD, wait_timeout_s=0)
    leadership = first.campaign("start")

    before_s = time.monotonic()
    until_s = first.renew(leadership, {"lag": 3})
    after_s = time.monotonic()

    assert before_s + store.session_timeout_s / 3 < until_s <= after_s + store.lease_s
    assert second.replicas()[0]["lag"] == 3


def test_renewing_writes_only_what_has_changed(pair, cluster):
    """Each write wakes all other replicas; a check in the same transaction proves as much."""
    first, second, _ = pair
    watcher = cluster.store()
    first.join(RECORD, wait_timeout_s=0)
    leadership = first.campaign("start")
    first.renew(leadership, RECORD)
    before = watcher.get(replica_key(0))

    for _ in range(3):
        first.renew(leadership, RECORD)
        first.publish(RECORD)
    assert watcher.get(replica_key(0)) == before
    first.renew(leadership, {"lag": 4})
    assert watcher.get(replica_key(0)).version == before.version + 1
    assert second.replicas()[0]["lag"] == 4


def test_an_unchanged_record_is_published_anew_after_a_lost_session(pair, cluster, insist, eventually):
    """The check finds that it is gone."""
    first, second, store = pair
    first.join(RECORD, wait_timeout_s=0)
    cluster.lose_session(store)
    eventually(lambda: second.replicas() == {}, what="the end of the record")

    insist(first.publish, RECORD)

    assert second.replicas()[0]["address"] == RECORD["address"]


def test_renewing_after_the_session_was_lost_is_fenced(pair, cluster, insist):
    """Nobody else needs to lead for it; the lost leader publishes nothing."""
    first, second, store = pair
    first.join(RECORD, wait_timeout_s=0)
    leadership = first.campaign("start")
    cluster.lose_session(store)

    with pytest.raises(FencedError, match="term 1 has ended"):
        insist(first.renew, leadership, RECORD)

    assert second.replicas() == {}


def test_a_replica_publishes_itself_anew_after_a_lost_session(pair, cluster, insist, eventually):
    """Its entry went with the session."""
    first, second, store = pair
    first.join(RECORD, wait_timeout_s=0)
    first.publish({"lag": 1})
    cluster.lose_session(store)
    eventually(lambda: second.replicas() == {}, what="the end of the record")

    insist(first.publish, {"lag": 2})

    assert second.replicas()[0]["lag"] == 2


def test_resigning_frees_the_leadership_at_once(pair):
    """A standby can lead; resigning twice, or when fenced, does no harm."""
    first, second, _ = pair
    old = first.campaign("start")

    first.resign(old)
    new = second.campaign("the leader resigned")
    first.resign(old)

    assert new.term == 2
    assert second.renew(new, RECORD) > time.monotonic()


def test_joining_a_running_id_is_refused(cluster, pair):
    """One sentence tells the user which id; the running replica stays as it is."""
    first, second, _ = pair
    first.join(RECORD, wait_timeout_s=0)
    double = cluster.coordinator(0, "double")

    with pytest.raises(ConfigError, match="replica 0 is already running"):
        double.join({"address": "other"}, wait_timeout_s=0.3)
    with pytest.raises(ConfigError, match="replica 0 is already running"):
        double.publish({"address": "other"})

    first.publish(RECORD)
    assert second.replicas()[0]["instance"] == "first"


def test_joining_waits_for_an_earlier_start_to_go(cluster, pair):
    """A replica that was killed and started again takes its place when the old session is over."""
    first, second, _ = pair
    first.join(RECORD, wait_timeout_s=0)
    restarted = cluster.coordinator(0, "restarted")
    timer = threading.Timer(0.3, first.close)
    timer.start()

    restarted.join(RECORD, wait_timeout_s=5)
    timer.join()

    assert second.replicas()[0]["instance"] == "restarted"


def test_pausing_is_seen_by_all_and_can_be_repeated(pair):
    """On, on, off, off."""
    first, second, _ = pair

    for is_paused in (True, True, False, False):
        first.set_paused(is_paused)
        assert second.view().is_paused is is_paused


def test_a_switchover_request_ends_with_the_next_leadership(pair):
    """It can be replaced and withdrawn, and whoever leads next clears it."""
    first, second, _ = pair
    leadership = first.campaign("start")
    first.request_switchover(None)
    assert second.view().switchover.candidate is None
    first.request_switchover(1)
    assert second.view().switchover.candidate == 1
    first.clear_switchover()
    first.clear_switchover()
    assert second.view().switchover is None

    first.request_switchover(1)
    first.resign(leadership)
    second.campaign("switchover")

    assert first.view().switchover is None


def test_closing_frees_the_leadership(pair, eventually):
    """A replica that stops in order is gone for the others without a timeout."""
    first, second, _ = pair
    first.join(RECORD, wait_timeout_s=0)
    first.campaign("start")

    first.close()

    eventually(lambda: second.campaign("the leader stopped") is not None, timeout_s=5)
    assert second.replicas() == {}


def _campaign(candidate):
    """Campaign until the lost session's leader entry is gone."""
    deadline_s = time.monotonic() + 10
    while (leadership := candidate.campaign("the leader is gone")) is None:
        assert time.monotonic() < deadline_s
    return leadership
