"""What a replica decides: traces of single replicas, event by event."""

from __future__ import annotations

import pytest

from flwr_ha.replica.machine import ImpossibleEventError, MachineState, Phase, Timing, step
from flwr_ha.replica.messages import (
    Action,
    Campaign,
    Crashed,
    Elected,
    Event,
    Exit,
    ExtendLease,
    Fenced,
    NotElected,
    Renewed,
    Resign,
    RunSettled,
    Seen,
    StandDown,
    StartSuperLink,
    StopAsked,
    SuperLinkGone,
    SuperLinkReady,
    SwitchoverAsked,
    TakeOver,
    TakeoverFailed,
    Tick,
    TookOver,
)

TIMING = Timing(rest_s=3.0, longest_rest_s=10.0, defer_s=3.0, drain_s=600.0)
NOBODY = Seen(leader=None, term=3)
ELECTION = (SuperLinkReady(), NOBODY, Elected(4, 10.0))
RUNS = frozenset({"17", "18"})


class Trace:
    """Feed one replica, number 1, and remember what it was told to do."""

    def __init__(self, *events: Event) -> None:
        self.state = MachineState(replica_id=1)
        self.feed(*events)

    def feed(self, *events: Event, now_s: float = 0.0) -> list[Action]:
        """Apply the events at one moment and return all actions."""
        actions: list[Action] = []
        for event in events:
            self.state, more = step(self.state, event, now_s=now_s, timing=TIMING)
            actions += more
        return actions

    def kinds(self, *events: Event, now_s: float = 0.0) -> list[type[Action]]:
        """Apply the events and return the kinds of the actions alone."""
        return [type(action) for action in self.feed(*events, now_s=now_s)]


def leading() -> Trace:
    """Return a replica that leads in term 4 under a lease until 10 s."""
    return Trace(*ELECTION, TookOver(4))


def test_leadership_from_the_first_look_to_the_open_socket() -> None:
    """The plain way: warm, campaign, elected, lease before takeover, leading."""
    trace = Trace()
    assert trace.feed(NOBODY) == []  # its SuperLink is not ready
    assert trace.feed(SuperLinkReady(), NOBODY) == [Campaign("the leader of term 3 is gone")]
    assert trace.feed(Elected(4, 10.0)) == [
        ExtendLease(10.0, "elected for term 4"),
        TakeOver(4, "elected for term 4"),
    ]
    assert trace.state.phase is Phase.TAKING_OVER
    assert trace.feed(TookOver(4)) == []
    assert (trace.state.phase, trace.state.term) == (Phase.LEADING, 4)


def test_campaign_is_not_repeated_before_its_answer() -> None:
    """The coordinator is slow: many looks, one campaign."""
    trace = Trace(SuperLinkReady())
    assert trace.kinds(NOBODY, NOBODY, NOBODY) == [Campaign]
    assert trace.kinds(NotElected("another replica leads"), NOBODY) == [Campaign]


def test_lease_that_runs_out_ends_the_leadership() -> None:
    """The coordinator is gone: the leader stops by its own clock, at the lease and not a moment later."""
    trace = leading()
    assert trace.feed(Tick(), now_s=9.999) == []
    assert trace.feed(Tick(), now_s=10.0) == [
        StandDown(4, "the lease ran out before it was renewed"),
        StartSuperLink("start again as a standby"),
    ]
    assert trace.feed(Renewed(4, 99.0), now_s=10.0) == []  # too late


def test_renewal_that_comes_after_the_lease_is_no_renewal() -> None:
    """Between the end of the lease and the answer somebody else may have been elected."""
    assert leading().kinds(Renewed(4, 20.0), now_s=10.0) == [StandDown, StartSuperLink]


def test_lease_never_gets_shorter() -> None:
    """Two renewals whose answers overtake each other: what was proven stays proven."""
    trace = leading()
    assert trace.feed(Renewed(4, 14.0), now_s=1.0) == [ExtendLease(14.0, "the leadership is confirmed")]
    assert trace.feed(Renewed(4, 12.0), now_s=1.0) == [ExtendLease(14.0, "the leadership is confirmed")]
    assert trace.state.lease_until_s == 14.0


@pytest.mark.parametrize(
    "event",
    [
        SuperLinkGone("its SuperLink ended with status -9"),
        Fenced(4, "term 5 has begun"),
        Crashed("ValueError: a bug"),
        Seen(leader=2, term=5),
        TakeoverFailed(4, "the port is taken"),
    ],
)
@pytest.mark.parametrize("is_serving", [False, True])
def test_leader_that_cannot_go_on_stands_down(event: Event, is_serving: bool) -> None:
    """Whatever the reason, while it takes over or serves: the SuperLink ends and is started afresh."""
    trace = Trace(*ELECTION, *([TookOver(4)] if is_serving else []))
    actions = trace.feed(event, now_s=1.0)
    assert [type(action) for action in actions] == [StandDown, StartSuperLink]
    assert isinstance(actions[0], StandDown)
    assert actions[0].term == 4
    assert trace.state.phase is Phase.STANDBY
    assert not trace.state.is_warm


@pytest.mark.parametrize(
    "late", [TookOver(3), TakeoverFailed(3, "late"), Renewed(3, 99.0), Fenced(3, "late"), RunSettled("17")]
)
def test_news_of_a_leadership_that_is_over_changes_nothing(late: Event) -> None:
    """Threads of an older term report late; a standby and the leader of a newer term ignore them."""
    for trace in (leading(), Trace(SuperLinkReady())):
        before = trace.state
        assert trace.feed(late, now_s=1.0) == []
        assert trace.state == before


def test_leader_does_not_believe_an_old_look() -> None:
    """A look from before the election shows another leader or none: the term tells that it is old."""
    trace = leading()
    assert trace.feed(Seen(leader=2, term=3), Seen(leader=None, term=4), now_s=1.0) == []
    assert trace.state.phase is Phase.LEADING


def test_replica_that_could_not_take_over_lets_the_others_try() -> None:
    """It lacks the bytes, say: it rests for 3 s though its SuperLink is warm again."""
    trace = Trace(*ELECTION, TakeoverFailed(4, "no copy"), SuperLinkReady())
    assert trace.feed(NOBODY, now_s=2.9) == []
    assert trace.kinds(NOBODY, now_s=3.0) == [Campaign]


def test_replica_that_never_can_take_over_tries_more_and_more_seldom() -> None:
    """Each election is an entry in the coordinator and a pause for who else could lead; a success starts anew."""
    trace, term, now_s, rests = Trace(SuperLinkReady()), 3, 0.0, []
    for _ in range(50):
        began_s = now_s
        while trace.kinds(Seen(leader=None, term=term), now_s=now_s) != [Campaign]:
            now_s += 0.5
        rests.append(now_s - began_s)
        term += 1
        trace.feed(Elected(term, now_s + 10.0), TakeoverFailed(term, "no copy"), SuperLinkReady(), now_s=now_s)
    assert rests == [0.0, 3.0, 6.0, *[10.0] * 47]

    now_s += 10.0
    trace.feed(Seen(leader=None, term=term), Elected(term + 1, now_s + 10.0), TookOver(term + 1), now_s=now_s)
    assert trace.state.failed_takeovers == 0


def test_own_entry_that_nobody_wants_any_more_is_withdrawn() -> None:
    """The answer to a campaign or a resignation was lost: without this the cluster would stay without a leader."""
    (action,) = Trace(SuperLinkReady()).feed(Seen(leader=1, term=4))
    assert isinstance(action, Resign)
    assert action.term == 4
    assert Trace(SuperLinkReady(), NOBODY).kinds(Seen(leader=1, term=4)) == []  # its election may be on its way


def test_paused_cluster_has_a_first_election_but_no_failover() -> None:
    """An operator's pause forbids failover; a new cluster must still come up."""
    assert Trace(SuperLinkReady()).kinds(Seen(leader=None, term=0, is_paused=True)) == [Campaign]
    assert Trace(SuperLinkReady()).kinds(Seen(leader=None, term=1, is_paused=True)) == []


def test_candidate_of_a_switchover_goes_first() -> None:
    """The others wait 3 s for it, then anybody may."""
    candidate = Trace(SuperLinkReady())
    assert candidate.feed(Seen(leader=None, term=3, candidate=1)) == [Campaign("switchover to this replica")]
    other = Trace(SuperLinkReady())
    assert other.kinds(Seen(leader=None, term=3, candidate=2), now_s=1.0) == []
    assert other.kinds(Seen(leader=None, term=3, candidate=2), now_s=3.9) == []
    assert other.kinds(Seen(leader=None, term=3, candidate=2), now_s=4.0) == [Campaign]


def test_switchover_waits_for_the_running_rounds() -> None:
    """Each run in training commits once more; then, and only then, the leadership changes hands."""
    trace = leading()
    assert trace.feed(SwitchoverAsked(RUNS, candidate=2), RunSettled("17"), RunSettled("17"), now_s=1.0) == []
    actions = trace.feed(RunSettled("18"), now_s=1.0)
    assert actions[0] == StandDown(4, "planned switchover to replica 2")


def test_switchover_without_a_running_round_is_at_once() -> None:
    """Nothing to wait for."""
    assert leading().feed(SwitchoverAsked(frozenset()), now_s=1.0)[0] == StandDown(4, "planned switchover")


def test_switchover_does_not_wait_for_ever() -> None:
    """A round that hangs must not keep an operator from moving the leadership."""
    trace = leading()
    trace.feed(SwitchoverAsked(RUNS), Renewed(4, 1000.0), now_s=1.0)
    assert trace.kinds(Tick(), now_s=600.9) == []
    assert trace.kinds(Tick(), now_s=601.0) == [StandDown, StartSuperLink]


def test_second_switchover_does_not_start_the_wait_again() -> None:
    """The request stays in the coordinator until it is done, and is read again and again."""
    trace = leading()
    trace.feed(SwitchoverAsked(RUNS), RunSettled("17"), SwitchoverAsked(RUNS), now_s=1.0)
    assert trace.kinds(RunSettled("18"), now_s=1.0) == [StandDown, StartSuperLink]


def test_stop_of_a_leader_hands_over_and_ends() -> None:
    """SIGTERM: stand down first, then exit, and start nothing."""
    trace = leading()
    assert trace.kinds(StopAsked("SIGTERM was received")) == [StandDown, Exit]
    assert trace.kinds(Tick(), NOBODY, SuperLinkReady(), StopAsked("again"), now_s=99.0) == []


def test_stop_during_a_campaign_waits_for_its_answer() -> None:
    """The answer may be a leadership that must be given up, or the others would wait for the session to end."""
    for answer, kinds in ((Elected(4, 10.0), [StandDown, Exit]), (NotElected("another replica leads"), [Exit])):
        trace = Trace(SuperLinkReady(), NOBODY)
        assert trace.feed(StopAsked("SIGTERM was received")) == []
        assert trace.kinds(answer) == kinds


def test_election_without_a_superlink_is_given_back() -> None:
    """The SuperLink died while the campaign ran."""
    trace = Trace(SuperLinkReady(), NOBODY, SuperLinkGone("it ended"))
    assert trace.kinds(Elected(4, 10.0)) == [StandDown, StartSuperLink]


def test_election_whose_lease_is_over_is_given_back() -> None:
    """The process was frozen during its campaign."""
    assert Trace(SuperLinkReady(), NOBODY).kinds(Elected(4, 10.0), now_s=10.0) == [StandDown, StartSuperLink]


def test_standby_starts_its_superlink_again() -> None:
    """A dead standby SuperLink costs nothing but its warmth."""
    trace = Trace(SuperLinkReady())
    assert trace.kinds(SuperLinkGone("it ended")) == [StartSuperLink]
    assert trace.kinds(NOBODY) == []


@pytest.mark.parametrize("event", [Elected(4, 10.0), NotElected("another replica leads")])
def test_ballot_that_nobody_asked_for_is_a_bug(event: Event) -> None:
    """It cannot happen, and the message says what was known."""
    with pytest.raises(ImpossibleEventError, match="in phase standby"):
        Trace(SuperLinkReady()).feed(event)


def test_election_that_a_newer_term_has_overtaken_is_no_leadership() -> None:
    """The answer took so long that the session was lost and another replica has led since."""
    overtaken = (SuperLinkReady(), NOBODY, Seen(leader=1, term=5))
    assert Trace(*overtaken).kinds(Elected(4, 10.0)) == [StandDown, StartSuperLink]
    assert Trace(*overtaken, StopAsked("SIGTERM")).kinds(Elected(4, 10.0)) == [StandDown, Exit]


def test_every_action_says_why() -> None:
    """The log and the history show these sentences to people."""
    trace = leading()
    actions = [*trace.feed(Renewed(4, 20.0), Crashed("a bug")), *Trace().feed(SuperLinkGone("it ended"))]
    assert all(getattr(action, "reason", "") for action in actions)
